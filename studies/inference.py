# SPDX-License-Identifier: Apache-2.0
"""What one forward pass costs: by formula, by XLA's own count, by the clock."""

import concurrent.futures
import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import vpt_jax

# How prompts take part; prefilled: their keys and values are made beforehand, once.
HOW = ("tokens", "kv", "prefilled")
RATIOS = (1.0, 0.5, 0.3, 0.2, 0.1)  # kept, of the most prompts
KEPT = 0.3  # the paper's: about 70 % can go
ROUNDS = (5, 31)  # of timing: at least, at most
SPREAD = (0.1, 0.9)  # quantiles over the rounds
Counts = tuple[int, ...]  # prompts of every layer
Program = tuple[str, Counts]  # one of HOW, with its counts


def macs(model: Any, how: str, counts: Sequence[int], batch: int = 1) -> int:
    """Multiply-accumulates per picture; `kv` projects the prompts once per batch."""
    return vpt_jax.macs(
        model,
        counts,
        formulation="tokens" if how == "tokens" else "kv",
        prompt_batch=batch if how == "kv" else None,
    )


def kept(full: int, ratio: float) -> int:
    """Prompts per layer that a cut leaves, rounded half up as `keep_mask` does."""
    return max(1, math.floor(ratio * full + 0.5))


def uneven(mean: int, depth: int) -> tuple[int, ...]:
    """Counts of this mean that rise steadily from layer to layer."""
    ends = [round(mean * i * (i + 1) / (depth + 1)) for i in range(depth + 1)]
    return tuple(int(n) for n in np.diff(ends))


def plain(how: str) -> str:
    """The formulation without prompts: there is nothing to prefill."""
    return "kv" if how == "prefilled" else how


def abstract(model: Any) -> Any:
    """The shapes of a model's parameters."""
    side = model.image_size
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def initial(model: Any) -> Any:
    """Random parameters of a model."""
    side = model.image_size
    images = jnp.zeros((1, side, side, 3))
    return jax.jit(model.init)(jax.random.key(0), images)["params"]


def compiled(
    model: Any, backbone: Any, how: str, counts: Counts, batch: int
) -> tuple[Any, dict[str, Any]]:
    """A compiled forward pass (features, without the head), and what XLA says of it.

    Args:
      model: A `ViT` or `Swin`.
      backbone: Its parameters, or their shapes.
      how: One of `HOW`.
      counts: Prompts per layer.
      batch: Pictures per call.

    Returns:
      The program, which takes `(backbone, prompts, images)`; and a row: FLOP and
      multiply-accumulates per picture, bytes per call. None where XLA does not say.
    """
    formulation = "tokens" if how == "tokens" else "kv"

    def features(backbone: Any, prompts: Any, images: Any) -> Any:
        variables = {"params": backbone}
        both = model.apply(variables, images, prompts=prompts, formulation=formulation)
        return both[0]

    prompts = tuple(
        jax.ShapeDtypeStruct((n, width), jnp.float32)
        for n, width in zip(counts, model.widths, strict=True)
    )
    if how == "prefilled":
        ready = functools.partial(vpt_jax.prefill, model)
        prompts = jax.eval_shape(ready, backbone, prompts)
    side = model.image_size
    images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
    program = jax.jit(features).lower(backbone, prompts, images).compile()
    memory, costs = program.memory_analysis(), program.cost_analysis() or {}
    return program, {
        "how": how,
        "counts": list(counts),
        "batch": batch,
        "macs": macs(model, how, counts, batch),
        "flops": costs["flops"] / batch if "flops" in costs else None,
        "temporary": memory and memory.temp_size_in_bytes,
        "arguments": memory and memory.argument_size_in_bytes,
        "outputs": memory and memory.output_size_in_bytes,
    }


def all_compiled(
    model: Any, backbone: Any, which: Sequence[Program], batch: int
) -> list[tuple[Any, dict[str, Any]]]:
    """`compiled` of all, in threads: XLA compiles a program mostly on one core."""

    def one(which: Program) -> tuple[Any, dict[str, Any]]:
        return compiled(model, backbone, *which, batch)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, which))


def ready_to_run(
    program: Any, model: Any, backbone: Any, how: str, counts: Counts, batch: int
) -> Callable[[], Any]:
    """A call of what `compiled` made; random prompts and pictures are on the device."""
    keys, side = jax.random.split(jax.random.key(0)), model.image_size
    prompts = vpt_jax.init_prompts(keys[0], model, counts)
    if how == "prefilled":
        prompts = vpt_jax.prefill(model, backbone, prompts)
    images = jax.random.normal(keys[1], (batch, side, side, 3))
    inputs = jax.block_until_ready((backbone, prompts, images))
    return lambda: program(*inputs)


def interleaved(
    programs: Sequence[Callable[[], Any]], seconds: float
) -> list[list[float]]:
    """Milliseconds of each program in every round.

    All programs take turns within a round, so that a drift of the machine's speed hits
    all alike, in another order each round, so that none has always the same one before
    it. The first round warms up and is dropped.

    Args:
      programs: What to time.
      seconds: After which no new round begins, within the limits of `ROUNDS`.
    """
    times: list[list[float]] = [[] for _ in programs]
    random, end = np.random.default_rng(0), math.inf
    for number in range(ROUNDS[1] + 1):
        for i in random.permutation(len(programs)):
            start = time.perf_counter()
            jax.block_until_ready(programs[i]())
            if number:
                times[i].append(round(1000 * (time.perf_counter() - start), 4))
        if not number:
            end = time.perf_counter() + seconds
        elif number >= ROUNDS[0] and time.perf_counter() > end:
            break
    return times


class Ratio(NamedTuple):
    """Median of the rounds' own ratios, and their spread."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def ratio(mine: Sequence[float], other: Sequence[float]) -> Ratio:
    """How long one program takes against another, round by round."""
    rounds = np.array(mine) / np.array(other)
    low, high = np.quantile(rounds, SPREAD)
    return Ratio(float(np.median(rounds)), float(low), float(high))
