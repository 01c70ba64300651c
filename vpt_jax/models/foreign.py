# SPDX-License-Identifier: Apache-2.0
"""Flax's attention with weights on the prompts among its keys."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpt_jax.models.encoder import drop, with_rows

ATTENTION = "prompt_attention"
"""The variable collection that holds attention weights, if it is mutable."""

FIRST = 1  # Prompts stand after the class token; attention does not see where.


def weighted_attention(
    attend: Callable,
    weight: jax.Array | None,
    sow_in: nn.Module | None,
    layer: int,
    num: int,
    num_tokens: int,
) -> Callable:
    """`attend` with `log weight` added to the prompts' logits.

    `weight` is None, `[b or 1, n]` or, by head and token, `[b, h, t, n]`; 0 removes a
    key. `num` of the block's `num_tokens` are prompts. `sow_in`, if given, keeps the
    attention weights. Raises ValueError if `attend` takes no bias and mask, or (when it
    runs) its keys are not the block's tokens.
    """
    accepted = inspect.signature(attend).parameters
    if weight is not None and not {"bias", "mask"} <= set(accepted):
        raise ValueError(
            f"the attention_fn of block {layer} takes {tuple(accepted)}; masks and"
            " gates need bias= and mask=, as flax.linen.dot_product_attention has."
        )

    # wraps: the module reads the signature to see what it may pass.
    @functools.wraps(attend)
    def weighted(
        query: Any, key: Any, value: Any, bias: Any = None, mask: Any = None, **rest
    ) -> Any:
        if key.shape[-3] != num_tokens:
            raise ValueError(
                f"an attention of block {layer} has {key.shape[-3]} keys where the"
                f" block has {num_tokens} tokens, so it is not known which are"
                " prompts. (With nested contexts, masks and gates go to the inner.)"
            )
        if weight is not None:
            w = _among_tokens(weight, num, query.shape[-2], num_tokens)
            # Not log 0: its gradient is not finite. Masked weights are exactly 0.
            keep = w > 0
            log = jnp.log(jnp.where(keep, w, jnp.ones((), w.dtype)))
            log = log.astype(query.dtype)
            bias = log if bias is None else bias + log
            mask = keep if mask is None else mask.astype(bool) & keep
        if sow_in is not None:
            received = nn.dot_product_attention_weights(
                query, key, bias, mask, deterministic=True
            )
            received = drop(received, num, FIRST, axis=2)
            received = received[..., FIRST : FIRST + num]
            sow_in.sow(ATTENTION, str(layer), received)
        given = {"bias": bias, "mask": mask}
        given = {name: x for name, x in given.items() if x is not None}
        return attend(query, key, value, **given, **rest)

    return weighted


def _among_tokens(weight: jax.Array, num: int, heads: int, tokens: int) -> jax.Array:
    """The weights `[b or 1, h or 1, t or 1, t]` of all keys: those of tokens are 1."""
    if weight.ndim == 4:
        if weight.shape[1:3] != (heads, tokens - num):
            raise ValueError(
                f"prompt_gate has shape {weight.shape}; its attention has {heads} heads"
                f" and {tokens - num} tokens besides the prompts. Pass [b, n_i]."
            )
        # What the prompts attend to ends with this block.
        w = with_rows(weight, num, FIRST)
    else:  # for all heads and queries alike
        w = weight[:, None, None, :]
    own = jnp.ones((*w.shape[:-1], tokens - num), w.dtype)
    return jnp.concatenate([own[..., :FIRST], w, own[..., FIRST:]], axis=-1)
