# SPDX-License-Identifier: Apache-2.0
"""Many trainings in one program: several sets of prompts, one backbone, one data set.

Runs that differ in initial prompts, order of pictures, dropout, rates, decay or mask
have the same shapes, so `vmap` makes one program of them. The backbone and the pictures
are there once, and a matrix product sees the tokens of all runs: meant for a device
that a small run alone leaves idle, which a CPU core is not (docs/benchmarks.md). Where
all runs have one seed (a grid of rates and decays), they see the same batches and
patches are embedded once.

`fit` trains any number of runs, so many at a time; `train_epoch` and `answers` are its
parts. The random numbers are those of separate trainings; what else is the same, and
how closely, is in `tests/test_together.py`.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax import train
from vpt_jax.data import strips
from vpt_jax.prompts import Mask
from vpt_jax.train import Recipe, TrainState


def stack(trees: Sequence[Any]) -> Any:
    """Trees of equal shapes as one; a new first axis `[r]` of all leaves counts runs.

    Raises:
      ValueError: If shapes differ.
    """
    first, *others = [jax.tree.map(jnp.shape, tree) for tree in trees]
    for number, other in enumerate(others, start=1):
        if other != first:
            raise ValueError(
                f"run {number} has shapes {other} and run 0 {first}; all must be the"
                " same. Instead of condensed prompts train all of them under a mask."
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: Any) -> list[Any]:
    """The inverse of `stack`."""
    leaves, treedef = jax.tree.flatten(tree)
    return [treedef.unflatten(own) for own in zip(*leaves, strict=True)]


def init_states(trainables: Any, recipe: Recipe) -> TrainState:
    """The states before the first step, of stacked `{'prompts', 'head'}`.

    `step` has no axis: all runs have done the same number of steps.
    """
    state = jax.vmap(lambda t: train.init_state(t, recipe))(trainables)
    return state._replace(step=jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames=("model", "recipe"), donate_argnums=0)
def train_epoch(
    states: TrainState,
    backbone: Any,
    images: jax.Array | strips.Strip,
    labels: jax.Array,
    order: jax.Array,
    mask: jax.Array,
    learning_rates: jax.Array,
    weight_decay: jax.Array,
    key: jax.Array,
    prompt_mask: Sequence[jax.Array] | None = None,
    *,
    model: Any,
    recipe: Recipe,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One epoch of `r` runs, each as `train.train_epoch` would do it.

    Args:
      states: Of all runs, see `init_states`; donated.
      backbone: Frozen parameters, shared.
      images: The resident set, shared.
      labels: int32 `[n]`, shared.
      order: Indices `[r, steps, b]`; or `[steps, b]`, the same batches for all runs,
        which then have one key.
      mask: bool `[steps, b]`, False where `order` is padding.
      learning_rates: `[r, steps]`.
      weight_decay: `[r]`.
      key: Keys `[r]`, or the one key `[]` of runs with the same batches.
      prompt_mask: None, or bool `[r, n_i]` per layer, see `train.train_step`.
      model: Static.
      recipe: Static.

    Returns:
      The states, and mean `loss [r]` and `accuracy [r]` over the epoch's examples.

    Raises:
      ValueError: If there is one order and many keys, or the reverse.
    """
    if (order.ndim == 2) != (key.ndim == 0):
        raise ValueError(
            f"order has shape {order.shape} and key {key.shape}; pass [r, steps, b]"
            " and [r], or [steps, b] and one key for runs that see the same batches."
        )
    own = None if order.ndim == 2 else 0
    # What is not mapped stays without the axis of runs, inside the scan too.
    state = TrainState(None, 0, 0)  # pyright: ignore[reportArgumentType]
    epoch = jax.vmap(
        functools.partial(train.train_epoch, model=model, recipe=recipe),
        in_axes=(state, None, None, None, own, None, 0, 0, own, 0),
        out_axes=(state, 0),
    )
    return epoch(
        states,
        backbone,
        images,
        labels,
        order,
        mask,
        learning_rates,
        weight_decay,
        key,
        prompt_mask,
    )


@functools.partial(jax.jit, static_argnames=("model", "recipe"))
def eval_step(
    trainables: Any,
    backbone: Any,
    images: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    prompt_mask: Sequence[jax.Array] | None = None,
    *,
    model: Any,
    recipe: Recipe,
) -> jax.Array:
    """Which answers of one batch are right, bool `[b, r]`, see `train.eval_step`."""
    step = functools.partial(train.eval_step, model=model, recipe=recipe)
    each = jax.vmap(step, in_axes=(0, None, None, None, None, 0), out_axes=1)
    return each(trainables, backbone, images, labels, mask, prompt_mask)


def answers(
    trainables: Any,
    backbone: Any,
    images: Any,
    labels: np.ndarray,
    *,
    model: Any,
    recipe: Recipe,
    batch_size: int,
    prompt_mask: Sequence[jax.Array] | None = None,
) -> np.ndarray:
    """Which pictures each run classifies right, bool `[r, n]`, see `train.answers`.

    Args:
      trainables: Stacked; prompts may be what `prefill` made of them, stacked.
      backbone: Frozen parameters, shared.
      images: An array, a memory map or a strip.
      labels: `[n]`.
      model: Static.
      recipe: Static.
      batch_size: Pictures that all runs look at, at once.
      prompt_mask: None, or bool `[r, n_i]` per layer: of one set of prompts repeated,
        a whole curve of keep ratios.
    """
    found = (
        eval_step(
            trainables,
            backbone,
            batch,
            labels[index],
            mask,
            prompt_mask,
            model=model,
            recipe=recipe,
        )
        for batch, index, mask in train.batches(images, batch_size)
    )
    return np.concatenate(list(train.one_late(found)))[: len(labels)].T


class Training(NamedTuple):
    """What a run has of its own.

    `prompt_mask` is None for all runs or for none.
    """

    trainable: dict[str, Any]  # {'prompts', 'head'} to start from
    learning_rates: np.ndarray  # [epochs, steps], see `train.learning_rates`
    weight_decay: float
    seed: int = 0  # of the order of pictures, and of dropout
    prompt_mask: Mask | None = None


class Trained(NamedTuple):
    """A run's end: after its last epoch, or the last one in which all was finite."""

    trainable: dict[str, Any]  # of NumPy arrays
    epochs: int


def fit(
    runs: Sequence[Training],
    backbone: Any,
    images: jax.Array | strips.Strip,
    labels: jax.Array,
    *,
    model: Any,
    recipe: Recipe,
    batch_size: int,
    at_once: int,
    progress: Callable[[int, dict[int, dict[str, float]]], None] | None = None,
) -> list[Trained]:
    """Trains all runs, `at_once` at a time, as each would be trained alone.

    One program is compiled: runs are cut into parts of one size, the last part filled
    up by repeating its last run. What a run learns depends on that size by rounding,
    not on the other runs or its place. A run whose loss or prompts are no longer finite
    keeps those of the epoch before, and does not touch the others.

    Args:
      runs: What is trained; shapes, and numbers of epochs and steps, are the same.
      backbone: Frozen parameters, shared.
      images: The resident set, shared.
      labels: int32 `[n]`, shared.
      model: Static; None trains heads on features, see `train.predict`.
      recipe: Static.
      batch_size: Of each run.
      at_once: At most so many runs in one program. Memory grows with it as with the
        batch size: activations of `at_once * batch_size` pictures are held.
      progress: Called after each epoch of a program as `(epoch, metrics)`: from 1, and
        `loss` and `accuracy` by the number of each run that is still finite.

    Returns:
      One `Trained` per run, in their order.

    Raises:
      ValueError: If `at_once` is below 1, there are no runs, or their shapes differ.
    """
    if at_once < 1 or not runs:
        raise ValueError(
            f"got at_once={at_once} and {len(runs)} runs; expected at least 1 of each."
        )
    parts = math.ceil(len(runs) / at_once)
    size = math.ceil(len(runs) / parts)
    one_seed = len({run.seed for run in runs}) == 1
    found: list[Trained] = []
    for start in range(0, len(runs), size):
        part = list(runs[start : start + size])
        ended = [Trained(_on_host(run.trainable), 0) for run in part]
        epochs = _epochs(
            part + part[-1:] * (size - len(part)),
            one_seed,
            (backbone, images, labels),
            batch_size,
            model=model,
            recipe=recipe,
        )
        alive = set(range(len(part)))
        for epoch, (trainables, metrics) in enumerate(epochs, start=1):
            now = unstack(trainables)
            alive = {i for i in alive if _is_finite((metrics[i]["loss"], now[i]))}
            for i in alive:
                ended[i] = Trained(now[i], epoch)
            if progress is not None:
                progress(epoch, {start + i: metrics[i] for i in sorted(alive)})
            if not alive:
                break
        found += ended
    return found


def _epochs(
    runs: Sequence[Training],
    one_seed: bool,
    shared: tuple[Any, Any, jax.Array],
    batch_size: int,
    **static: Any,
) -> Iterator[tuple[Any, list[dict[str, float]]]]:
    """Prompts and heads (stacked, on the host) and metrics after every epoch."""
    seeds = [run.seed for run in (runs[:1] if one_seed else runs)]
    keys = [jax.random.key(seed) for seed in seeds]
    masks = [run.prompt_mask for run in runs]
    masked = any(mask is not None for mask in masks)
    rates = np.stack([run.learning_rates for run in runs])
    states = init_states(stack([run.trainable for run in runs]), static["recipe"])
    for epoch in range(rates.shape[1]):
        orders, reals = zip(
            *(train.epoch_order(s, epoch, len(shared[2]), batch_size) for s in seeds),
            strict=True,
        )
        states, metrics = train_epoch(
            states,
            *shared,
            orders[0] if one_seed else np.stack(orders),
            reals[0],
            rates[:, epoch],
            jnp.asarray([run.weight_decay for run in runs], jnp.float32),
            keys[0] if one_seed else jnp.stack(keys),
            stack(masks) if masked else None,
            **static,
        )
        yield (
            # A copy: the states are donated.
            _on_host(states.trainable),
            [{k: float(v) for k, v in own.items()} for own in unstack(metrics)],
        )


def _on_host(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)


def _is_finite(tree: Any) -> bool:
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))
