# SPDX-License-Identifier: Apache-2.0
"""Softmax attention whose keys may weigh more or less."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from vpt_jax.models.xla import in_blocks, weighted_exp


def wide(dtype: Any) -> Any:
    """Float32, or float64 where the input is: the dtype of sums and softmax."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


@in_blocks
def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, key_weight: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention with an optional weight on every key's exponential.

    A weight of 1 leaves a key as it is, 0 removes it exactly
    (`log g` added to its logit). Plain products, and exponentials normalised only
    after the product with the values: on XLA's CPU code this is about 4 times as fast
    as `jax.nn.dot_product_attention`, with the same numbers to rounding. The softmax
    is in float32 whatever the computation dtype.

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
