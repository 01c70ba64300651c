# SPDX-License-Identifier: Apache-2.0
"""What removing a prompt does to every example: exactly, and by estimates.

`condense.importance` reduces over examples as it goes; studies need every example's own
value, of every prompt, and the exact change beside them.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vpt_jax
from studies.study import Lab, tuned
from vpt_jax import parallel
from vpt_jax.data.strips import view
from vpt_jax.files import workdirs
from vpt_jax.models.inputs import normalise
from vpt_jax.models.scores import example_values
from vpt_jax.prompts import Prompts, counts
from vpt_jax.run.stages import Run

ESTIMATES = ("removal", "key_gate", "taylor", "grad_norm", "attention")
# Prompts of a layer that are left out side by side: they share the layers before.
TOGETHER = 20


def examples(lab: Lab, limit: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Normalised pictures and labels of the training set (its first `limit`)."""
    labels = lab.pictures.labels[:limit]
    pictures = view(lab.pictures.images, jnp.arange(len(labels)))
    return normalise(pictures, lab.model.info["normalisation"]), labels


def kept(
    lab: Lab, run: Run, seed: int, what: str, dtype: str = "float32"
) -> np.ndarray:
    """`values` of a seed's tuned prompts over the training set, kept with the run.

    Exact removal takes minutes, and several studies need it.
    """
    path = run.workdir / "removal" / f"seed{seed}-{what}-{dtype}.npy"
    if path.exists():
        return np.load(path, allow_pickle=False)
    cast = lab.model.model.clone(dtype=jnp.dtype(dtype))
    trainable, size = tuned(run, seed), lab.config.score.batch_size
    found = values(what, cast, lab.model.backbone, trainable, examples(lab), size)
    if workdirs.writes():
        with workdirs.atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.save(file, found)
    run.log.line(f"seed{seed}: {what} in {dtype}, {found.shape[1]} prompts")
    return found


@parallel.everywhere()
def values(
    what: str,
    model: Any,
    backbone: Any,
    trainable: dict[str, Any],
    data: tuple[jax.Array, jax.Array],
    batch_size: int,
    masks: Any = None,
) -> np.ndarray:
    """Every example's value of every prompt (of every mask), `[examples, prompts]`.

    Args:
      what: One of `ESTIMATES`; `"exact"`, the loss without the prompt minus the loss;
        or `"masked"`, the loss under each of `masks`.
      model: The model.
      backbone: Its parameters.
      trainable: `{'prompts', 'head'}`.
      data: Pictures `[n, s, s, 3]` and labels `[n]`.
      batch_size: Examples at a time.
      masks: For `"masked"`: one `[masks, n_i]` array per layer, True is kept.
    """
    parts = [
        np.asarray(batch_values(backbone, trainable, batch, masks, model, what))
        for batch in batches(data, batch_size)
    ]
    return np.concatenate(parts).astype(np.float64)


def batches(data: tuple[Any, Any], size: int) -> Iterator[dict[str, Any]]:
    """Pictures and labels, `size` at a time; the last batch may be smaller."""
    for start in range(0, len(data[1]), size):
        image, label = (x[start : start + size] for x in data)
        yield {"image": image, "label": label}


@functools.partial(jax.jit, static_argnames=("model", "what"))
def batch_values(
    backbone: Any,
    trainable: dict[str, Any],
    batch: dict[str, jax.Array],
    masks: Any,
    model: Any,
    what: str,
) -> jax.Array:
    """One batch of `values`."""
    batch = parallel.spread(batch)

    def losses(prompts: Any, **kwargs: Any) -> tuple[jax.Array, dict[str, Any]]:
        inputs = {"params": backbone}
        features, out = model.apply(inputs, batch["image"], prompts=prompts, **kwargs)
        logits = vpt_jax.apply_head(trainable["head"], features)
        return vpt_jax.cross_entropy(logits, batch), out

    prompts = trainable["prompts"]
    if what == "loss":
        return losses(prompts)[0][:, None]
    if what == "masked":
        return jax.lax.map(lambda m: losses(prompts, prompt_mask=m)[0], masks).T
    if what == "exact":
        return _exact(losses, prompts)
    return jnp.concatenate(example_values(what, losses, prompts), axis=1)


def _exact(losses: Any, prompts: Prompts) -> jax.Array:
    """As `leave_one_out`; a layer's prompts share the work of the layers before it."""
    num = counts(prompts)

    def without(i: int, j: jax.Array) -> jax.Array:
        mask = [jnp.ones(n, bool) for n in num]
        mask[i] = jnp.arange(num[i]) != j
        return losses(prompts, prompt_mask=tuple(mask))[0]

    parts = []
    for i, n in enumerate(num):
        if n:
            one, size = functools.partial(without, i), min(n, TOGETHER)
            parts.append(jax.lax.map(one, jnp.arange(n), batch_size=size))
    return (jnp.concatenate(parts) - losses(prompts)[0][None]).T
