# SPDX-License-Identifier: Apache-2.0
r"""How near the arithmetic floor we are: least work, XLA's counts, measured time.

python benchmarks/roofline.py                       # ViT-B/16, batch 8, 100 prompts
python benchmarks/roofline.py --variant=S/16 --batch=32 --prompts 50 100 200
python benchmarks/roofline.py --dtype=bfloat16 --batch=128       # on a GPU or TPU
python benchmarks/roofline.py --inference --prompts 200 --batch=1     # to 64
python benchmarks/roofline.py --remat                # memory and time of every policy
python benchmarks/roofline.py --compile              # seconds to compile an epoch

Rows: inference with prefilled prompts; a tuning step; a step of the score `removal`; a
fine-tuning step after global condensation to 100, 30 and 10 % (random scores, so that
counts differ from layer to layer). The least work of a training step is one product
for everything forward and, above the first prompt, one for every activation gradient;
frozen weights have none. The least traffic reads all weights once forward, once
backward. The machine's rate is measured first: the product that the MLP needs.
Programs take turns within a round; times are medians. Weights are random.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import turns
from ml_collections import ConfigDict

import vpt_jax
from vpt_jax import train
from vpt_jax.condense import _batch_values as score_step  # what `importance` compiles
from vpt_jax.files import cli
from vpt_jax.models.vit import REMATS

CLASSES = 100


class Program(NamedTuple):
    """A compiled program, what it must do at least, and how to run it."""

    what: str
    counts: tuple[int, ...]
    least_flop: float  # per picture
    least_bytes: float  # per step
    compiled: Any
    run: Callable[[], Any]
    compile_seconds: float


def parse() -> argparse.Namespace:
    parser = turns.parser(__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=(100,))
    parser.add_argument("--inference", action="store_true", help="inference alone")
    parser.add_argument("--remat", action="store_true", help="the policies' table")
    parser.add_argument("--compile", action="store_true", help="compilation alone")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    return parser.parse_args()


def least_training_macs(
    model: vpt_jax.ViT, counts: Sequence[int], batch: int, learn: bool = True
) -> float:
    """Multiply-accumulates per picture of a step that learns deep prompts.

    Forward as `vpt_jax.macs` counts it. Backward, from the top down to the first layer
    with prompts: for every product the gradient of the input that depends on prompts.
    Without `learn` it ends at keys and values, where the score's gates are.
    """
    forward = vpt_jax.macs(model, counts, prompt_batch=batch)
    d, m, t = model.width, model.mlp_dim, (model.image_size // model.patch) ** 2 + 1
    total, first = 0.0, next((i for i, n in enumerate(counts) if n), model.depth)
    for i in range(first, model.depth):
        n, q = counts[i], 1 if i == model.depth - 1 else t
        mlp_and_out = 2 * q * d * m + q * d * d
        prompts = 2 * n * d * d / batch if learn else 0.0
        if i == first:  # the tokens do not depend on any prompt yet
            attention, projections = q * (t + n) * d + 2 * q * n * d, 0
        else:
            attention, projections = 4 * q * (t + n) * d, q * d * d + 2 * t * d * d
        total += mlp_and_out + prompts + attention + projections
    return forward + total


def matrix_rate(model: vpt_jax.ViT, batch: int) -> float:
    """FLOP per second of the MLP's first product, the best of twenty."""
    t = (model.image_size // model.patch) ** 2 + 1
    # Of one picture it is over before both cores are at work.
    x = jnp.ones((max(batch, 8) * t, model.width), model.dtype)
    w = jnp.ones((model.width, model.mlp_dim), model.dtype)
    product = jax.jit(jnp.matmul).lower(x, w).compile()
    seconds = min(turns.timed(lambda: product(x, w)) for _ in range(20))
    return 2 * x.size * model.mlp_dim / seconds


def compiled(
    what: str,
    counts: Any,
    least: tuple,
    function: Any,
    *args: Any,
    options: dict[str, Any] | None = None,  # of the compiler
    **static: Any,
) -> Program:
    lowered = function.lower(*args, **static)
    start = time.perf_counter()
    program = lowered.compile(options)
    seconds = time.perf_counter() - start
    return Program(what, counts, *least, program, lambda: program(*args), seconds)


class Inputs(NamedTuple):
    """What every program takes."""

    model: vpt_jax.ViT
    backbone: Any
    batch: dict[str, jax.Array]
    key: jax.Array


def make_inputs(model: vpt_jax.ViT, size: int, backbone: Any = None) -> Inputs:
    side, key = model.image_size, jax.random.key(0)
    if backbone is None:
        backbone = jax.jit(model.init)(key, jnp.zeros((1, side, side, 3)))["params"]
    pictures = np.random.default_rng(0).integers(0, 256, (size, side, side, 3))
    batch = {
        "image": jnp.asarray(pictures, jnp.uint8),
        "label": jnp.arange(size) % CLASSES,
        "mask": jnp.ones(size, bool),
    }
    return Inputs(model, backbone, batch, key)


def least_training(given: Inputs, counts: Sequence[int]) -> tuple[float, float]:
    """FLOP per picture and bytes per step of learning deep prompts."""
    macs = least_training_macs(given.model, counts, len(given.batch["label"]))
    return 2 * macs, 2 * sum(x.nbytes for x in jax.tree.leaves(given.backbone))


def trainable_of(given: Inputs, num: Any) -> dict[str, Any]:
    return {
        "prompts": vpt_jax.init_prompts(given.key, given.model, num),
        "head": vpt_jax.init_head(given.key, given.model.width, CLASSES),
    }


def step_program(given: Inputs, what: str, trainable: dict[str, Any]) -> Program:
    """One training step; not donated, so that it can run again and again."""
    model, backbone, batch, key = given
    recipe = train.Recipe(dropout=0.0)
    step = jax.jit(train.train_step, static_argnames=("model", "recipe"))
    state = train.init_state(trainable, recipe)
    counts = vpt_jax.counts(trainable["prompts"])
    least = least_training(given, counts)
    inputs = (state, backbone, batch, 0.1, 1e-3, key)
    return compiled(what, counts, least, step, *inputs, model=model, recipe=recipe)


def inference_program(given: Inputs, what: str, prompts: Any) -> Program:
    """Answers with prompts whose keys and values are made beforehand."""
    model, backbone, batch, _ = given
    counts = vpt_jax.counts(prompts)
    ready = vpt_jax.prefill(model, backbone, prompts)
    ready = {**trainable_of(given, 0), "prompts": ready}
    inputs = (ready, backbone, batch["image"], batch["label"], batch["mask"])
    traffic = sum(x.nbytes for x in jax.tree.leaves(backbone))
    least = (2 * vpt_jax.macs(model, counts), traffic)
    static = {"model": model, "recipe": train.Recipe(dropout=0.0)}
    return compiled(what, counts, least, train.eval_step, *inputs, **static)


def score_program(given: Inputs, what: str, trainable: dict[str, Any]) -> Program:
    """Every example's value of every prompt, by `removal`."""
    model, backbone, batch, _ = given
    counts = vpt_jax.counts(trainable["prompts"])
    pictures = {**batch, "image": train.normalise(batch["image"], "half")}
    macs = least_training_macs(model, counts, len(batch["label"]), learn=False)
    least = (2 * macs, least_training(given, counts)[1])
    inputs = (backbone, trainable, pictures, None)
    static = {"score": "removal", "reduction": "mean_abs", "deep": True}
    static |= {"model": model, "loss_fn": vpt_jax.cross_entropy}
    return compiled(what, counts, least, score_step, *inputs, **static)


def condensed(prompts: Any, ratio: float, key: jax.Array) -> Any:
    """Prompts kept by random scores over all layers."""
    scores = tuple(
        jax.random.uniform(jax.random.fold_in(key, i), (len(p),))
        for i, p in enumerate(prompts)
    )
    return vpt_jax.condense(prompts, vpt_jax.keep_mask(scores, keep_ratio=ratio))


def programs(given: Inputs, num: int) -> list[Program]:
    """All rows for one number of prompts."""
    trainable = trainable_of(given, num)
    found = [inference_program(given, "inference", trainable["prompts"])]
    if not num:
        return found
    found.append(step_program(given, "tuning step", trainable))
    found.append(score_program(given, "score step", trainable))
    for ratio in (0.3, 0.1):
        kept = condensed(trainable["prompts"], ratio, given.key)
        small = {**trainable, "prompts": kept}
        found.append(step_program(given, f"fine-tuning, {ratio:.0%}", small))
    return found


def inference_programs(given: Inputs, num: int) -> list[Program]:
    """Without prompts, with all, and after condensing."""
    prompts = trainable_of(given, num)["prompts"]
    return [
        inference_program(given, "no prompts", trainable_of(given, 0)["prompts"]),
        inference_program(given, "all prompts", prompts),
        *(
            inference_program(given, f"{r:.0%} kept", condensed(prompts, r, given.key))
            for r in (0.3, 0.1)
        ),
    ]


def remat_programs(given: Inputs, num: int) -> list[Program]:
    """The tuning step with every policy."""
    trainable = trainable_of(given, num)
    models = {name: given.model.clone(remat=name) for name in REMATS}
    return [
        step_program(given._replace(model=model), f"remat={name}", trainable)
        for name, model in models.items()
    ]


def epoch_program(
    given: Inputs,
    what: str,
    trainable: dict[str, Any],
    dropout: float,
    mask: Any = None,
    *,
    shared: bool = False,
    steps: int = 2,
    donate: bool = True,
    options: dict[str, Any] | None = None,
) -> Program:
    """What the command compiles: an epoch, here of few steps at a rate of 0."""
    model, backbone, batch, key = given
    recipe = train.Recipe(dropout=dropout, shared_dropout=shared)
    size = len(batch["label"])
    counts = vpt_jax.counts(trainable["prompts"])
    rest = (
        *(backbone, batch["image"], batch["label"]),
        *(jnp.tile(jnp.arange(size), (steps, 1)), jnp.ones((steps, size), bool)),
        *(jnp.zeros(steps), jnp.float32(1e-3), key, mask),
    )
    epoch = train.train_epoch
    if not donate:
        epoch = jax.jit(epoch.__wrapped__, static_argnames=("model", "recipe"))
    least = least_training(given, counts)
    what = f"{what}, dropout" if dropout else what
    # A copy, which each call gives away for the next one's.
    held = [train.init_state(jax.tree.map(jnp.copy, trainable), recipe)]
    static = {"model": model, "recipe": recipe, "options": options}
    program = compiled(what, counts, least, epoch, held[0], *rest, **static)

    def run() -> Any:
        held[0], metrics = program.compiled(held[0], *rest)
        return held[0], metrics

    return program._replace(run=run)


def compile_programs(given: Inputs, num: int) -> list[Program]:
    """Epochs with equal counts, and with as many as layers."""
    depth = given.model.depth
    equal = trainable_of(given, num)
    rising = trainable_of(given, [num - depth // 2 + i for i in range(depth)])
    return [
        epoch_program(given, what, trainable, dropout)
        for dropout in (train.Recipe().dropout, 0.0)
        for what, trainable in (("equal counts", equal), ("counts differ", rising))
    ]


def measure(found: list[Program], rounds: int) -> list[float]:
    """Median seconds of each."""
    times = turns.rounds({i: p.run for i, p in enumerate(found)}, rounds)
    return [float(np.median(mine)) for mine in times.values()]


def main() -> None:
    args = parse()
    if args.remat:  # as the command does, for all rows
        cli.spare_memory(ConfigDict({"backbone": {"remat": "block"}}))
    model = vpt_jax.ViT(args.variant, dtype=jnp.dtype(args.dtype))
    given = make_inputs(model, args.batch)
    rate = matrix_rate(model, args.batch)
    where = f"{turns.where(args)}; matrix products at {rate / 1e9:.0f} GFLOP/s"
    print(where, flush=True)
    print(
        f"\n{'':22}{'prompts':>8}{'GFLOP/picture':>18}{'GB/step':>16}{'temp.':>9}"
        f"{'compile':>9}{'ms per':>9}{'of the':>8}\n{'':22}{'':>8}{'least':>9}"
        f"{'XLA':>9}{'least':>8}{'XLA':>8}{'MB':>9}{'s':>9}{'picture':>9}{'rate':>8}"
    )
    rows, make = [], programs
    if args.compile:
        make = compile_programs
    elif args.remat or args.inference:
        make = remat_programs if args.remat else inference_programs
    for num in args.prompts:
        found = make(given, num)
        if args.compile:  # of several compilations, taken in turns, the median
            again = []
            for _ in range(args.rounds - 1):
                jax.clear_caches()
                again.append(make(given, num))
            for i, same in enumerate(zip(found, *again, strict=True)):
                median = float(np.median([p.compile_seconds for p in same]))
                found[i] = found[i]._replace(compile_seconds=median)
        seconds = [None] * len(found) if args.compile else measure(found, args.rounds)
        for program, second in zip(found, seconds, strict=True):
            cost = program.compiled.cost_analysis()
            memory = program.compiled.memory_analysis().temp_size_in_bytes
            row = {
                "what": program.what,
                "counts": program.counts,
                "least_gflop": program.least_flop / 1e9,
                "xla_gflop": cost["flops"] / args.batch / 1e9,
                "least_gb": program.least_bytes / 1e9,
                "xla_gb": cost["bytes accessed"] / 1e9,
                "temp_mb": memory / 2**20,
                "compile_s": program.compile_seconds,
                "ms": second and 1000 * second / args.batch,
                "rate": second and program.least_flop * args.batch / second / rate,
            }
            rows.append(row)
            mean = sum(program.counts) / len(program.counts)
            time_text = f"{row['ms']:9.1f}{row['rate']:8.2f}" if second else ""
            print(
                f"{program.what:22}{mean:8.1f}{row['least_gflop']:9.2f}"
                f"{row['xla_gflop']:9.2f}{row['least_gb']:8.2f}{row['xla_gb']:8.2f}"
                f"{row['temp_mb']:9.0f}{row['compile_s']:9.1f}{time_text}",
                flush=True,
            )
    print(
        "\nprompts: mean over the layers; of the rate: least work per second, as a part"
        " of the machine's matrix products"
    )
    if args.json:
        args.json.write_text(json.dumps({"where": where, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
