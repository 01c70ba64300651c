# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning under masks: every selection of prompts runs the same compiled program.

A mask takes prompts out of attention exactly, so training under it is training what
`condense` would leave (but for which random numbers dropout draws). Shapes do not
depend on the selection: a study of hundreds of selections compiles once.
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import vpt_jax
from vpt_jax import parallel, train
from vpt_jax.files import workdirs
from vpt_jax.prompts import Mask, counts
from vpt_jax.run import fitting, stages
from vpt_jax.run.fitting import MaskOf
from vpt_jax.run.stages import Run

TOGETHER = 16  # masks that one call measures
Measure = Callable[[np.ndarray], np.ndarray]
"""Logits `[c, n, k]` of n pictures under each of the masks `[c, m]`."""


class Outcome(NamedTuple):
    """What is known of a selection: accuracies in per cent, prompts kept per layer.

    `right` says which validation pictures are classified right, one `0` or `1` each.
    """

    val: float
    test: float
    counts: list[int]
    right: str


def outcome(
    run: Run,
    seed: int,
    name: str,
    trainable: dict[str, Any],
    mask_of: MaskOf,
    *,
    tune: bool,
) -> Outcome:
    """Evaluates a selection, fine-tuned or not; from disk if it is there.

    Args:
      run: The run (`study.running`) in whose folder it is kept.
      seed: Of the training; part of the name.
      name: Stands for one way to select in this run.
      trainable: `{'prompts', 'head'}` to start from.
      mask_of: The mask of every epoch.
      tune: Whether to fine-tune with the config's recipe; else epoch 0's mask counts.

    Raises:
      ValueError: If the task has no validation or no test pictures.
    """
    path = run.workdir / "masked" / f"seed{seed}-{name}{'-tuned' if tune else ''}.json"
    if path.exists():
        return Outcome(**json.loads(path.read_text(encoding="utf-8")))
    if tune:
        trainable, mask = finetuned(run, seed, trainable, mask_of)
    else:
        mask = mask_of(0, trainable)
    found = evaluated(run, trainable, mask)
    if workdirs.writes():
        workdirs.write_json(path, found._asdict())
    # What is not trained takes a second; there are hundreds.
    (run.log.line if tune else run.log.note)(
        f"{path.stem}: {sum(found.counts)} prompts, val {found.val:.2f} %, test"
        f" {found.test:.2f} %"
    )
    return found


def train_in_memory(
    trainable: dict[str, Any], *args: Any, recipe: train.Recipe, **kwargs: Any
) -> tuple[dict[str, Any], Mask | None]:
    """Prompts and head after `calls`, and the last mask; nothing is written.

    Raises:
      FloatingPointError: If the loss is not finite.
    """
    # A copy: the state is donated, and the caller's arrays must live on.
    state, mask = train.init_state(jax.tree.map(jnp.array, trainable), recipe), None
    for call in fitting.calls(state, *args, recipe=recipe, **kwargs):
        state, mask = call.state, call.mask
        if not math.isfinite(call.metrics["loss"]):
            raise FloatingPointError(
                f"the loss is {call.metrics['loss']} in epoch {call.epoch + 1} at rate"
                f" {call.rates.max():g}; lower base_lr."
            )
    return state.trainable, mask


@parallel.everywhere()
def finetuned(
    run: Run, seed: int, trainable: dict[str, Any], mask_of: MaskOf
) -> tuple[dict[str, Any], Mask]:
    """Prompts and head after the config's fine-tuning, and the last epoch's mask."""
    settings = run.config.finetune
    given = trainable, run.backbone, run.images, run.labels, settings, seed
    found, mask = train_in_memory(
        *given,
        mask_of=mask_of,
        head_rates=stages.head_rates_of(run, settings),
        model=run.model,
        recipe=stages.make_recipe(run, settings, "finetune"),
    )
    assert mask is not None
    return found, mask


@parallel.everywhere()
def evaluated(run: Run, trainable: dict[str, Any], mask: Mask) -> Outcome:
    """The outcome of prompts and head under a mask."""
    right, fixed = {}, stages.fixed_of(run)
    for name, split in (("val", run.task.val), ("test", run.task.test)):
        if split is None:
            raise ValueError(
                f"the study chooses on val and reports on test, and {run.task.name} was"
                f" loaded without {name}; use config.task.splits 'all'."
            )
        given = trainable, run.backbone, split.images, split.labels
        right[name] = train.answers(
            *given,
            **fixed,
            batch_size=run.config.eval_batch_size,
            prompt_mask=mask,
        )
    return Outcome(
        100 * float(right["val"].mean()),
        100 * float(right["test"].mean()),
        [int(np.sum(m)) for m in mask],
        "".join("01"[int(x)] for x in right["val"]),
    )


def measure_of(run: Run, trainable: dict[str, Any], pictures: jax.Array) -> Measure:
    """What `run`'s network says of normalised pictures without some prompts."""
    num = counts(trainable["prompts"])

    def measure(masks: np.ndarray) -> np.ndarray:
        padded = np.resize(masks, (-(-len(masks) // TOGETHER) * TOGETHER, sum(num)))
        parts = []
        for at in range(0, len(padded), TOGETHER):
            some = split(padded[at : at + TOGETHER], num)
            found = logits_under(run.backbone, trainable, pictures, some, run.model)
            parts.append(np.asarray(found))
            run.log.progress(f"masks: {at + TOGETHER}/{len(padded)}")
        return np.concatenate(parts)[: len(masks)]

    return measure


@functools.partial(jax.jit, static_argnames="model")
def logits_under(
    backbone: Any, trainable: dict[str, Any], pictures: Any, masks: Mask, model: Any
) -> jax.Array:
    """Logits `[c, n, k]` of pictures under masks, `[c, n_i]` per layer."""

    def logits(mask: Mask) -> jax.Array:
        given = {"prompts": trainable["prompts"], "prompt_mask": mask}
        features, _ = model.apply({"params": backbone}, pictures, **given)
        return vpt_jax.apply_head(trainable["head"], features)

    return jax.lax.map(logits, masks)


def split(flat: np.ndarray, num: Sequence[int]) -> tuple[jax.Array, ...]:
    """Of all prompts (last axis), those of each layer."""
    return tuple(map(jnp.asarray, np.split(flat, np.cumsum(num)[:-1], axis=-1)))


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`[..., n]` of `logits [..., n, k]` and `labels [n]`."""
    top = logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
    return total - logits[..., np.arange(len(labels)), labels]
