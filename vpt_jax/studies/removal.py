# SPDX-License-Identifier: Apache-2.0
r"""What removing a prompt does to every example: exactly, and by estimates.

`key_gate` is the derivative at the gate's 1; removal is the gate's 0, and between them
softmax gives the prompt's weight `a` to the other keys. That part is known exactly:

    attended without j  =  o + a / (1 - a) (o - v_j)

for every query and head, with `o` what was attended before. `removal` puts a factor
`e_j = 0` before the second term and differentiates with respect to it: one backward
pass as `key_gate`, exact in the attention, first order in what follows.
`removal_curved` adds half the square of the same derivative for a label drawn from the
model's own prediction, whose mean is the loss's Gauss-Newton (Fisher) curvature: two
backward passes after one forward pass, for the sign of the mean change.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import vpt_jax
from vpt_jax.condense import example_values
from vpt_jax.data.augment import normalise
from vpt_jax.data.strips import view
from vpt_jax.models.layers import Attention, attend, batched
from vpt_jax.prompts import Prompts, counts
from vpt_jax.studies.study import Lab

ESTIMATES = (
    "key_gate",
    "taylor",
    "grad_norm",
    "attention",
    "removal",
    "removal_curved",
)
# Prompts of a layer that are left out side by side: they share the layers before.
TOGETHER = 20


def examples(lab: Lab, limit: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Normalised pictures and labels of the training set (its first `limit`)."""
    labels = lab.pictures.labels[:limit]
    pictures = view(lab.pictures.images, jnp.arange(len(labels)))
    return normalise(pictures, lab.model.info["normalisation"]), labels


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
    pictures, labels = data
    parts = []
    for start in range(0, len(labels), batch_size):
        batch = {
            "image": pictures[start : start + batch_size],
            "label": labels[start : start + batch_size],
        }
        key = jax.random.fold_in(jax.random.key(0), start)
        found = batch_values(backbone, trainable, batch, key, masks, model, what)
        parts.append(np.asarray(found, np.float64))
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnames=("model", "what"))
def batch_values(
    backbone: Any,
    trainable: dict[str, Any],
    batch: dict[str, jax.Array],
    key: jax.Array,
    masks: Any,
    model: Any,
    what: str,
) -> jax.Array:
    """One batch of `values`."""

    def forward(prompts: Any, **kwargs: Any) -> tuple[jax.Array, dict[str, Any]]:
        inputs = {"params": backbone}
        features, out = model.apply(inputs, batch["image"], prompts=prompts, **kwargs)
        return vpt_jax.apply_head(trainable["head"], features), out

    def losses(prompts: Any, **kwargs: Any) -> tuple[jax.Array, dict[str, Any]]:
        logits, out = forward(prompts, **kwargs)
        return vpt_jax.cross_entropy(logits, batch), out

    prompts = trainable["prompts"]
    if what == "loss":
        return losses(prompts)[0][:, None]
    if what == "masked":
        return jax.lax.map(lambda m: losses(prompts, prompt_mask=m)[0], masks).T
    if what == "exact":
        return _exact(losses, prompts)
    if what in ("removal", "removal_curved"):
        first, curved = _removal(forward, prompts, batch["label"], key)
        return first if what == "removal" else curved
    return jnp.concatenate(example_values(what, losses, prompts), axis=1)


def _exact(losses: Any, prompts: Prompts) -> jax.Array:
    """As `leave_one_out`; a layer's prompts share the work of the layers before it."""
    num = counts(prompts)

    def without(i: int, j: jax.Array) -> jax.Array:
        mask = [jnp.ones(n, bool) for n in num]
        mask[i] = jnp.arange(num[i]) != j
        return losses(prompts, prompt_mask=tuple(mask))[0]

    parts = [
        jax.lax.map(
            functools.partial(without, i), jnp.arange(n), batch_size=min(n, TOGETHER)
        )
        for i, n in enumerate(num)
        if n
    ]
    return (jnp.concatenate(parts) - losses(prompts)[0][None]).T


def _removal(
    forward: Any, prompts: Prompts, labels: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`removal` and `removal_curved` of every example, `[b, prompts]`."""
    present = tuple(i for i, n in enumerate(counts(prompts)) if n)
    removed = tuple(jnp.zeros((len(labels), prompts[i].shape[0])) for i in present)

    def logits_of(removed: tuple[jax.Array, ...]) -> jax.Array:
        left = list(removed)
        with nn.intercept_methods(functools.partial(_part_removed, left)):
            logits = forward(prompts)[0]
        if left:
            raise ValueError(
                "removal is estimated where prompts are keys and values of a ViT's"
                f" attention; {len(left)} layers of this model were not."
            )
        return logits

    logits, pull = jax.vjp(logits_of, removed)
    predicted = jax.nn.softmax(logits)

    def derivative(labels: jax.Array) -> jax.Array:
        # Of the cross entropy with respect to the logits, then to the factors.
        one_hot = jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)
        return jnp.concatenate(pull(predicted - one_hot)[0], axis=1)

    first = derivative(labels)
    drawn = derivative(jax.random.categorical(key, logits))
    return first, first + 0.5 * drawn * drawn


def _part_removed(
    left: list[jax.Array], call: Any, args: Any, kwargs: Any, context: Any
) -> Any:
    """An attention from which a factor of every prompt's share is removed.

    Takes the factors `[b, n]` of its layer from the front of `left`.
    """
    module = context.module
    if not isinstance(module, Attention) or context.method_name != "__call__":
        return call(*args, **kwargs)
    queries, x, extra, key_weight = args
    if extra is None:
        return call(*args, **kwargs)
    q = module.query(queries)
    q = q * q.shape[-1] ** -0.5
    own = module.key_value(x)
    # As in the module; the prompts come last.
    k, v = (
        jnp.concatenate([o, jnp.zeros_like(o[:, :, :1]) + batched(e, 4)], axis=2)
        for o, e in zip(own, extra, strict=True)
    )
    out, weights = attend(q, k, v, key_weight)
    factor = left.pop(0)
    n = factor.shape[1]
    a = weights[..., -n:].astype(jnp.float32)
    share = a / jnp.maximum(1 - a, 1e-6) * factor[:, None, None, :]
    o, v = (y.astype(jnp.float32) for y in (out, v[:, :, -n:]))
    moved = share.sum(axis=-1, keepdims=True) * o
    o = o + moved - jnp.einsum("bhqn,bhnc->bhqc", share, v)
    return module.out(o.astype(out.dtype)), weights
