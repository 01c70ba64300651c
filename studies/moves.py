# SPDX-License-Identifier: Apache-2.0
"""Prompts that move while they are tuned: growth and relocation of the study `sets`.

Masks say what is there, so every move runs the same compiled program.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vpt_jax
from studies import removal, study
from studies.masked import Measure, cross_entropy, measure_of, split
from vpt_jax.prompts import Importance, Mask
from vpt_jax.run import stages
from vpt_jax.run.fitting import MaskOf
from vpt_jax.run.stages import Run

NAMES = ("growth", "relocation")
Move = Callable[[dict[str, Any], Mask], Mask]
"""The next mask, of prompts and head as they are and the mask until now."""


def with_candidates(
    run: Run, seed: int, start: dict[str, Any], mask: Mask, tokens: int = 10
) -> tuple[dict[str, Any], Mask]:
    """All prompts and, behind each layer's own, candidates; which are there at first.

    Candidates are the prompts of the layers before and after, and tokens that enter the
    block on training pictures. So are the layer's own that the mask has dropped.
    """
    rng, prompts = np.random.default_rng(seed), start["prompts"]
    pool, there = [], []
    for i, found in enumerate(stages.tokens_of(run)):
        chosen = found[rng.permutation(len(found))[:tokens]]
        near = [prompts[j] for j in (i - 1, i + 1) if 0 <= j < len(prompts)]
        pool.append(jnp.concatenate([prompts[i], *near, jnp.asarray(chosen)]))
        more = len(pool[-1]) - len(mask[i])
        there.append(jnp.concatenate([jnp.asarray(mask[i]), jnp.zeros(more, bool)]))
    return {**start, "prompts": tuple(pool)}, tuple(there)


def moving(
    lab: study.Lab,
    run: Run,
    seed: int,
    way: str,
    start: dict[str, Any],
    scores: Importance,
    mask: Mask,
    rounds: int = 3,
) -> tuple[dict[str, Any], MaskOf]:
    """What to fine-tune, and masks that move kept prompts `rounds` times, evenly.

    Epochs of fine-tuning are the config's: what is tuned before a move is tuned as long
    in all as without any.

    Args:
      lab: The lab.
      run: The run.
      seed: Draws the tokens among the candidates.
      way: One of `NAMES`.
      start: `{'prompts', 'head'}`, tuned.
      scores: Of its prompts, the default score's.
      mask: What is kept at first.
      rounds: How many times something moves.
    """
    if way == "growth":
        start, mask = with_candidates(run, seed, start, mask)
        move = growth(lab, run)
    else:
        move = relocation(lab, run, np.concatenate([*map(np.asarray, scores)]))
    epochs = run.config.finetune.epochs
    at, current = {epochs * i // rounds for i in range(rounds)}, [mask]

    def mask_of(epoch: int, trainable: dict[str, Any]) -> Mask:
        if epoch in at:
            current.append(move(trainable, current[-1]))
            at.discard(epoch)
        return current[-1]

    return start, mask_of


def some_pictures(lab: study.Lab) -> tuple[Any, Any]:
    """128 of the training pictures, and their labels."""
    pictures, labels = removal.examples(lab)
    at = np.linspace(0, len(labels) - 1, min(128, len(labels))).astype(int)
    return pictures[at], labels[at]


def growth(lab: study.Lab, run: Run) -> Move:
    """Replaces the least useful third by the candidates of most gain."""
    pictures, labels = some_pictures(lab)
    batch = {"image": pictures, "label": labels}

    def move(trainable: dict[str, Any], mask: Mask) -> Mask:
        worth = stages.score_over(run, trainable, "removal", prompt_mask=mask)
        gain = gains(run.backbone, trainable, batch, mask, model=run.model)
        return replaced(mask, worth, gain)

    return move


def relocation(lab: study.Lab, run: Run, worth: np.ndarray) -> Move:
    """Moves a third at most: those of which the loss says that it would fall without.

    To a layer comes the most worthy, `[m]`, of its prompts that are not there.
    """
    pictures, labels = some_pictures(lab)

    def move(trainable: dict[str, Any], mask: Mask) -> Mask:
        signed = stages.score_over(run, trainable, "signed", prompt_mask=mask)
        there, cost = (np.concatenate([*map(np.asarray, t)]) for t in (mask, signed))
        idle = [j for j in np.argsort(cost, kind="stable") if there[j] and cost[j] < 0]
        measure = measure_of(run, trainable, pictures)
        idle = idle[: int(there.sum()) // 3]
        return relocated(measure, np.asarray(labels), mask, worth, idle)

    return move


def relocated(
    measure: Measure,
    labels: np.ndarray,
    mask: Mask,
    worth: np.ndarray,
    idle: Sequence[int],
) -> Mask:
    """The mask with each of `idle` in turn in the layer where the loss is least."""
    num = [len(x) for x in mask]
    there = np.concatenate([*map(np.asarray, mask)])
    layers = np.split(np.arange(sum(num)), np.cumsum(num)[:-1])
    for gone in idle:
        free = [layer[~there[layer]] for layer in layers]
        come = [f[np.argmax(worth[f])] for f in free if len(f)]
        tries = np.stack([there] * len(come))
        tries[:, gone] = False
        tries[range(len(come)), come] = True
        losses = cross_entropy(measure(tries), labels).mean(axis=1)
        there = tries[int(np.argmin(losses))]
    return split(there, num)


def replaced(mask: Mask, worth: Sequence[Any], gain: Sequence[Any]) -> Mask:
    """The mask without its least worthy third, with as many others of most gain."""
    there, w, g = (np.concatenate([*map(np.asarray, t)]) for t in (mask, worth, gain))
    number = int(there.sum()) // 3
    gone = np.argsort(np.where(there, w, np.inf), kind="stable")[:number]
    come = np.argsort(np.where(there, -np.inf, g), kind="stable")[::-1][:number]
    new = there.copy()
    new[gone], new[come] = False, True
    return split(new, [len(x) for x in mask])


@functools.partial(jax.jit, static_argnames="model")
def gains(
    backbone: Any,
    trainable: dict[str, Any],
    batch: dict[str, jax.Array],
    mask: Mask,
    *,
    model: Any,
) -> tuple[jax.Array, ...]:
    """The slope `-dL/dg` of the mean loss along every prompt's gate, `[n_i]` per layer.

    Gates are 1 where the mask is True, else 0: there it is the first-order gain of
    putting the prompt in.
    """

    def loss(gates: Any) -> jax.Array:
        given = {"prompts": trainable["prompts"], "prompt_gate": gates}
        features, _ = model.apply({"params": backbone}, batch["image"], **given)
        logits = vpt_jax.apply_head(trainable["head"], features)
        return vpt_jax.cross_entropy(logits, batch).mean()

    gates = tuple(m.astype(jnp.float32) for m in mask)
    return tuple(-g for g in jax.grad(loss)(gates))
