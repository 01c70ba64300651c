# SPDX-License-Identifier: Apache-2.0
"""What every prompt is worth to every example: the scores of `importance`.

A score is a name in `DEFAULT_REDUCTION` and a branch of `example_values`, or a function
of one's own (`Score`).
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax.models.attention import wide
from vpt_jax.prompts import Mask, Prompts, counts

Score = Callable[..., Sequence[jax.Array]]
"""A score of one's own: `score(losses, prompts, prompt_mask, deep)`, under jit.

`prompts` are one `[n_i, d]` array per layer; `prompt_mask` (or None) says which of them
are there; `losses(prompts, prompt_gate=, prompt_mask=)` returns the losses `[b]` of a
batch and the model's intermediates. The score returns every example's own value of
every prompt, `[b, n_i]` per layer; the reduction over examples is `mean` unless another
is asked for. As `loss_fn`, it has to be the same object at every call.

Example (how much the loss changes if every prompt is a little longer)::

    def growth(losses, prompts, prompt_mask, deep):
        b = losses(prompts)[0].shape[0]
        own = tuple(jnp.broadcast_to(p, (b, *p.shape)) for p in prompts)
        grads = jax.grad(lambda p: losses(p)[0].sum())(own)
        return tuple((p * g).sum(-1) for p, g in zip(own, grads, strict=True))
"""

# What each score does with its examples when the caller does not say.
DEFAULT_SCORE = "removal"
DEFAULT_REDUCTION = {
    "removal": "mean_abs",
    "key_gate": "mean_abs",
    "taylor": "mean_abs",
    "grad_norm": "mean",
    "signed": "mean",
    "attention": "mean",
    "leave_one_out": "mean",
}
SCORES = (*DEFAULT_REDUCTION, "l2_norm", "random")
# reduction: (applied to every example's value, applied to their mean)
REDUCTIONS: dict[str, tuple[Callable, Callable]] = {
    "mean_abs": (abs, lambda x: x),
    "abs_mean": (lambda x: x, abs),
    "mean_square": (lambda x: x * x, lambda x: x),
    "mean": (lambda x: x, lambda x: x),
    "second_order": (lambda x: x + 0.5 * x * x, lambda x: x),
}


def example_values(
    score: str | Score,
    losses: Callable[..., tuple[jax.Array, dict[str, Any]]],
    prompts: Prompts,
    prompt_mask: Mask | None = None,
    deep: bool = True,
) -> tuple[jax.Array, ...]:
    """Every example's own value of every prompt, `[b, n_i]` per layer.

    Args:
      score: One that reads data, or a function of one's own.
      losses: `(prompts, prompt_gate=, prompt_mask=) -> ([b] losses, out)`, where the
        prompts may carry a batch axis and `out` is the model's second result.
      prompts: One `[n_i, d]` array per layer.
      prompt_mask: Prompts that are in the network at all; None for all.
      deep: False for shallow prompts, whose attention is averaged over the layers.
    """
    b = jax.eval_shape(lambda p: losses(p)[0], prompts).shape[0]
    if callable(score):
        found = tuple(score(losses, prompts, prompt_mask, deep))
        shapes, expected = (
            [np.shape(v) for v in found],
            [(b, n) for n in counts(prompts)],
        )
        if shapes != expected:
            raise ValueError(
                f"the score returned shapes {shapes}; expected {expected}: a value for"
                " each example and prompt, layer by layer."
            )
        return found
    if score == "removal":
        return _removal(losses, prompts, b, deep)
    if score in ("key_gate", "signed"):
        gates = tuple(jnp.ones((b, p.shape[0]), wide(p.dtype)) for p in prompts)
        grads = jax.grad(lambda g: losses(prompts, prompt_gate=g)[0].sum())(gates)
        return tuple(-g for g in grads)
    if score in ("taylor", "grad_norm"):
        own = tuple(jnp.zeros((b, 1, 1), p.dtype) + p[None] for p in prompts)
        grads = jax.grad(lambda p: losses(p)[0].sum())(own)
        if score == "taylor":
            pairs = zip(own, grads, strict=True)
            return tuple(-(p * g).astype(jnp.float32).sum(-1) for p, g in pairs)
        return tuple(jnp.linalg.norm(g.astype(jnp.float32), axis=-1) for g in grads)
    if score == "attention":
        blocks = losses(prompts)[1]["blocks"]
        received = [block["prompt_attention"].mean(axis=(1, 2)) for block in blocks]
        if deep:
            return tuple(received)
        mean = functools.reduce(jnp.add, received) / len(received)
        return (mean, *(jnp.zeros((b, 0)) for _ in prompts[1:]))
    return _leave_one_out(losses, prompts, prompt_mask)


def _removal(
    losses: Callable, prompts: Prompts, b: int, deep: bool
) -> tuple[jax.Array, ...]:
    """The score `removal`: how a removed key's attention goes to the others, exactly.

    A query that gave the prompt's key the weight `a` and attended to `o` attends to
    `o + a / (1 - a) (o - v)` without it, `v` the prompt's value. The derivative of a
    gate at 1 is `a (v - o)`: removal is that, divided by `-(1 - a)`, head by head and
    query by query. Where a prompt is more than a key of one layer (shallow prompts;
    outputs that are averaged), it is the derivative of a gate on all that it is.
    """

    def gated(gates: Any) -> tuple[jax.Array, list[jax.Array]]:
        loss, out = losses(prompts, prompt_gate=gates)
        return loss.sum(), [block["prompt_attention"] for block in out["blocks"]]

    blocks = jax.eval_shape(lambda p: losses(p)[1]["blocks"], prompts)
    only_keys = [deep and "prompts" not in block for block in blocks]
    gates = tuple(
        jnp.ones(
            block["prompt_attention"].shape if fine else (b, p.shape[0]),
            wide(p.dtype),
        )
        for p, block, fine in zip(prompts, blocks, only_keys, strict=True)
    )
    grads, attention = jax.grad(gated, has_aux=True)(gates)
    # A prompt with all of the attention cannot be spared; 1e-6 is float32's limit.
    return tuple(
        -(g / jnp.maximum(1 - a, 1e-6)).sum(axis=(1, 2)) if fine else -g
        for g, a, fine in zip(grads, attention, only_keys, strict=True)
    )


def _leave_one_out(
    losses: Callable, prompts: Prompts, prompt_mask: Mask | None
) -> tuple[jax.Array, ...]:
    num = counts(prompts)
    present = prompt_mask or tuple(jnp.ones(n, bool) for n in num)
    starts = np.cumsum((0, *num))

    def without(j: jax.Array) -> jax.Array:
        mask = tuple(
            m & (jnp.arange(n) + start != j)
            for m, n, start in zip(present, num, starts[:-1], strict=True)
        )
        return losses(prompts, prompt_mask=mask)[0]

    change = jax.lax.map(without, jnp.arange(sum(num))) - losses(prompts)[0][None]
    return tuple(change[start:end].T for start, end in itertools.pairwise(starts))
