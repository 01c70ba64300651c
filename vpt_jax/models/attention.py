# SPDX-License-Identifier: Apache-2.0
"""Softmax attention whose keys may weigh more or less."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero


def wide(dtype: Any) -> Any:
    """Float32, or float64 where the input is: the dtype of sums and softmax."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


@jax.custom_jvp
def weighted_exp(weight: jax.Array, x: jax.Array) -> jax.Array:
    """`weight * exp(x)` with `weight >= 0`, and `x <= 0` where it is positive.

    Where the weight is 0, `x` may be large: no `inf * 0`. The derivative by `x` is the
    result itself, so that a mask, by which nothing is differentiated, costs a backward
    pass no more memory than no mask (of ViT-B/16, batch 8, 0.9 GB).
    """
    return weight * jnp.exp(jnp.minimum(x, 80.0))


@functools.partial(weighted_exp.defjvp, symbolic_zeros=True)
def _weighted_exp_jvp(primals: Any, tangents: Any) -> Any:
    (weight, x), (dweight, dx) = primals, tangents
    y = weighted_exp(weight, x)
    dy = jnp.zeros_like(y)
    if not isinstance(dx, SymbolicZero):
        dy = dy + y * dx
    if not isinstance(dweight, SymbolicZero):
        dy = dy + dweight * jnp.exp(jnp.minimum(x, 80.0))
    return y, dy


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, key_weight: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention with an optional weight on every key's exponential.

    A weight of 1 leaves a key as it is, 0 removes it exactly
    (`log g` added to its logit). Plain products, and exponentials normalised only
    after the product with the values: on XLA's CPU code this is about 4 times as fast
    as `jax.nn.dot_product_attention`, with the same numbers to rounding. The softmax
    is in float32 whatever the computation dtype. Where nothing is differentiated, a CPU
    takes many queries in `blocks`, to the same numbers.

    Args:
      q: `[b, h, q, c]`, already scaled.
      k: `[b, h, t, c]`.
      v: `[b, h, t, c]`.
      key_weight: None, or `[b or 1, t]` float32, at least one positive per row; or
        `[b, h, q, t]`, where every query and head weighs the keys for itself.

    Returns:
      The attended values `[b, h, q, c]`, and the attention weights
      `[b, h, q, t]` (float32, rows sum to 1; not computed under jit if unused).
    """
    run = _at_once if blocks(q, k) == 1 else _in_blocks
    return run(q, k, v, key_weight)


def blocks(q: jax.Array, k: jax.Array) -> int:
    """Into how many blocks a CPU splits the queries.

    XLA's CPU code (jaxlib 0.10) multiplies, normalises and multiplies again head by
    head without writing the weights to memory, as long as those of one head are at most
    256 KB and all results at least 1 MB. So ViT-B/16 answers 64 pictures with 200
    prompts in 0.86 of the time (`docs/performance.md`).
    """
    b, h, queries, c = q.shape
    num = -(-queries * k.shape[2] // 2**16)
    b = b if isinstance(b, int) else 1  # of jax.export: not known yet
    return num if b * h * (queries // num) * c >= 2**18 else 1


def _at_once(
    q: jax.Array, k: jax.Array, v: jax.Array, key_weight: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    product = functools.partial(jnp.einsum, preferred_element_type=wide(q.dtype))
    logits = product("bhqc,bhtc->bhqt", q, k)
    if key_weight is None:
        top = lax.stop_gradient(logits.max(axis=-1, keepdims=True))
        weights = jnp.exp(logits - top)
    else:
        w = key_weight if key_weight.ndim == 4 else key_weight[:, None, None, :]
        # The largest logit among keys that count, or a removed key could make the
        # others underflow.
        top = jnp.where(w > 0, logits, -jnp.inf).max(axis=-1, keepdims=True)
        weights = weighted_exp(w, logits - lax.stop_gradient(top))
    total = weights.sum(axis=-1, keepdims=True)
    out = product("bhqt,bhtc->bhqc", weights.astype(v.dtype), v)
    return (out / total).astype(v.dtype), weights / total


@jax.custom_jvp
def _in_blocks(
    q: jax.Array, k: jax.Array, v: jax.Array, key_weight: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The same, where nothing is differentiated and on a CPU block by block."""

    def in_blocks(q: jax.Array, k: jax.Array, v: jax.Array, w: jax.Array | None) -> Any:
        num = blocks(q, k)
        own = [w] * num
        if w is not None and w.ndim == 4:
            own = jnp.array_split(w, num, axis=2)
        queries = jnp.array_split(q, num, axis=2)
        parts = [_at_once(q, k, v, w) for q, w in zip(queries, own, strict=True)]
        return tuple(jnp.concatenate(part, axis=2) for part in zip(*parts, strict=True))

    return lax.platform_dependent(
        *(q, k, v, key_weight), cpu=in_blocks, default=_at_once
    )


@functools.partial(_in_blocks.defjvp, symbolic_zeros=True)
def _in_blocks_jvp(primals: Any, tangents: Any) -> Any:
    # A backward pass needs all weights in memory: blocks would only copy them.
    values, tree = jax.tree.flatten(primals)
    moves = jax.tree.leaves(tangents)
    moved = [i for i, t in enumerate(moves) if not isinstance(t, SymbolicZero)]

    def at_once(*some: jax.Array) -> Any:
        given = dict(enumerate(values)) | dict(zip(moved, some, strict=True))
        return _at_once(*jax.tree.unflatten(tree, given.values()))

    return jax.jvp(at_once, [values[i] for i in moved], [moves[i] for i in moved])


def attend_fused(
    q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`attend` without key weights by cuDNN's fused kernel: NVIDIA GPUs, 16 bits.

    The kernel keeps no attention weights; those returned are computed if they are used
    (under jit), as `attend` does.

    Raises:
      ValueError: If the arrays are not bfloat16 or float16.
      RuntimeError: By JAX, where there is no cuDNN.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"attention='cudnn' has dtype {q.dtype}; the kernel takes bfloat16. Build"
            " the model with dtype=jnp.bfloat16, or leave attention= out."
        )
    # JAX trains with even lengths only: one more query whose answer is dropped, one
    # more key that does not count.
    lengths = (q.shape[2], k.shape[2])
    padded = (
        jnp.pad(x, ((0, 0), (0, 0), (0, x.shape[2] % 2), (0, 0))) for x in (q, k, v)
    )
    count = None
    if any(n % 2 for n in lengths):
        count = jnp.full(q.shape[0], lengths[1], jnp.int32)
    out = jax.nn.dot_product_attention(
        *(x.swapaxes(1, 2) for x in padded),
        scale=1.0,  # the queries are scaled already
        key_value_seq_lengths=count,
        implementation="cudnn",
    )
    out = out.swapaxes(1, 2)[:, :, : lengths[0]]
    return out, attend(q, k, v, None)[1]


ATTENTIONS = ("products", "cudnn")
