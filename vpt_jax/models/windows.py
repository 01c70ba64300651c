# SPDX-License-Identifier: Apache-2.0
"""Attention within windows (Liu et al., arXiv 2103.14030), with keys that all share."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vpt_jax.models.attention import wide
from vpt_jax.models.layers import KeyValue, projections


def relative_position_index(window: int) -> np.ndarray:
    """Row of the bias table for every query and key of a window, `[m*m, m*m]`."""
    row, column = np.divmod(np.arange(window * window), window)
    down = row[:, None] - row[None] + window - 1
    right = column[:, None] - column[None] + window - 1
    return down * (2 * window - 1) + right


def shift_mask(side: int, window: int, shift: int) -> np.ndarray:
    """What is added to the logits of shifted windows, `[w, m*m, m*m]`, 0 or -100.

    Rolling the picture brings opposite edges into one window; patches that were not
    neighbours must not meet. The weights were trained with -100 and not minus
    infinity, so very large logits do pass: kept, for the same numbers.
    """
    wrapped = np.arange(side) >= side - shift
    region = (2 * wrapped[:, None] + wrapped[None]).reshape(1, side * side, 1)
    region = np.asarray(to_windows(region, window, 0))[0, :, :, 0]
    apart = region[:, :, None] != region[:, None, :]
    return np.where(apart, np.float32(-100), np.float32(0))


# Reshapes go through [b, t, d]: explicit meshes split and merge one axis at a time.


def to_windows(x: Any, window: int, shift: int) -> Any:
    """Tokens `[b, s*s, d]`, row by row, to windows `[b, w, m*m, d]`."""
    b, t, d = x.shape
    n, area = math.isqrt(t) // window, window * window
    x = roll(x, -shift).reshape(b, n, window, n, window, d)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, t, d).reshape(b, n * n, area, d)


def from_windows(x: jax.Array, shift: int) -> jax.Array:
    """The inverse of `to_windows`."""
    b, w, area, d = x.shape
    n, window = math.isqrt(w), math.isqrt(area)
    x = x.reshape(b, w * area, d).reshape(b, n, n, window, window, d)
    return roll(x.transpose(0, 1, 3, 2, 4, 5).reshape(b, w * area, d), shift)


def roll(x: Any, shift: int) -> Any:
    """Moves the picture `[b, s*s, d]` down and to the right, cyclically."""
    if not shift:
        return x
    b, t, d = x.shape
    side = math.isqrt(t)
    x = jnp.roll(x.reshape(b, side, side, d), (shift, shift), (1, 2))
    return x.reshape(b, t, d)


def exponentials(
    groups: Sequence[tuple[jax.Array, jax.Array | None]],
) -> tuple[list[jax.Array], jax.Array]:
    """One softmax over several groups of keys, before the division.

    The groups stay apart, so that keys which all windows share are not copied. For the
    reasons of the two guards see `attention.attend`.

    Args:
      groups: Logits `[b, h, w, q, t]` and the keys' weights: None, `[b or 1, t]`, or
        `[b, h, w, q, t]`.

    Returns:
      Every group's exponentials, and the sum of all `[b, h, w, q, 1]`.
    """
    expanded = [
        (x, w[:, None, None, None] if w is not None and w.ndim == 2 else w)
        for x, w in groups
    ]
    counted = (x if w is None else jnp.where(w > 0, x, -jnp.inf) for x, w in expanded)
    tops = [x.max(axis=-1, keepdims=True) for x in counted]
    top = lax.stop_gradient(functools.reduce(jnp.maximum, tops))
    powers = [
        jnp.exp(x - top) if w is None else w * jnp.exp(jnp.minimum(x - top, 80.0))
        for x, w in expanded
    ]
    sums = [x.sum(axis=-1, keepdims=True) for x in powers]
    return powers, functools.reduce(jnp.add, sums)


def product(axes: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum whose sums are in float32."""
    return jnp.einsum(axes, x, y, preferred_element_type=wide(x.dtype))


def shared_product(axes: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`"bhwqc->bhwqn"`, or back, with what all windows share: `y [(b,) h, n, c]`.

    Without a batch axis it is one product for all pictures. Heads come first there, so
    that `x` is the left operand: XLA's CPU code has no bfloat16 product with a
    transposed left one.
    """
    before, after = axes.split("->")
    if y.ndim == 4:
        return product(f"{before},bhnc->{after}", x, y)
    return product(f"{before},hnc->hb{after[2:]}", x, y).swapaxes(0, 1)


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a learned bias per relative position.

    Prompts are keys and values for all windows (`extra`), or `num_prompts` tokens in
    front of every window.
    """

    num_heads: int
    window: int
    shift: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        self.query, self.key, self.value, self.out = projections(self)
        self.relative_position_bias_table = self.param(
            "relative_position_bias_table",
            nn.initializers.truncated_normal(0.02),
            ((2 * self.window - 1) ** 2, self.num_heads),
            self.param_dtype,
        )

    def key_value(self, x: jax.Array) -> KeyValue:
        return KeyValue(self.key(x), self.value(x))

    def bias(self, num_windows: int, num_prompts: int) -> jax.Array:
        """Position bias and shift mask `[1, h, 1 or w, t, t]`, 0 for prompts."""
        index = relative_position_index(self.window)
        table = self.relative_position_bias_table.astype(wide(self.dtype))
        bias = table[index].transpose(2, 0, 1)[None, :, None]
        if self.shift:
            side = math.isqrt(num_windows) * self.window
            mask = shift_mask(side, self.window, self.shift)
            bias = bias + jnp.asarray(mask, bias.dtype)[None, None]
        front = (num_prompts, 0)
        return jnp.pad(bias, ((0, 0), (0, 0), (0, 0), front, front))

    def __call__(
        self,
        x: jax.Array,
        extra: KeyValue | None = None,
        key_weight: jax.Array | None = None,
        num_prompts: int = 0,
    ) -> tuple[jax.Array, jax.Array]:
        """Tokens attend to those of their own window, and to `extra`.

        Args:
          x: Windows `[b, w, t, d]`, the first `num_prompts` of the `t` are prompts.
          extra: None or prompts' keys and values `[(b,) h, n, d / h]`.
          key_weight: None or the prompts' weights `[b or 1, n]`, see `attend`;
            with `extra` also `[b, h, w * t, n]`, by head and query.
          num_prompts: Prompts among the tokens.

        Returns:
          `[b, w, t, d]`, and the weights that patches, window after window, give to
          prompts, `[b, h, w * m * m, n]` (not computed under jit if unused).
        """
        b, w, t, d = x.shape
        h, n = self.num_heads, num_prompts
        flat = x.reshape(b, w * t, d)
        q, k, v = (
            y.reshape(b, h, w, t, d // h)
            for y in (self.query(flat), *self.key_value(flat))
        )
        q = q * q.shape[-1] ** -0.5
        logits = product("bhwqc,bhwtc->bhwqt", q, k) + self.bias(w, n)
        if extra is None:
            weight = key_weight
            if weight is not None:
                if weight.ndim == 4:
                    raise ValueError(
                        f"prompt_gate has a shape {weight.shape}, by head and query,"
                        " where prompts are tokens of every window; pass [b, n_i]."
                    )
                ones = jnp.ones((weight.shape[0], t - n), weight.dtype)
                weight = jnp.concatenate([weight, ones], axis=1)
            (own,), total = exponentials([(logits, weight)])
            out = product("bhwqt,bhwtc->bhwqc", own.astype(self.dtype), v)
            given = own[..., n:, :n]
        else:
            key, value = (e.astype(self.dtype) for e in extra)
            if key_weight is not None and key_weight.ndim == 4:
                key_weight = key_weight.reshape(b, h, w, t, -1)
            groups = [
                (logits, None),
                (shared_product("bhwqc->bhwqn", q, key), key_weight),
            ]
            (own, given), total = exponentials(groups)
            out = product("bhwqt,bhwtc->bhwqc", own.astype(self.dtype), v)
            out = out + shared_product("bhwqn->bhwqc", given.astype(self.dtype), value)
        out = self.out((out / total).astype(self.dtype).reshape(b, h, w * t, d // h))
        given = given / total[..., n:, :]
        given = given.reshape(b, h, w * (t - n), given.shape[-1])
        return out.reshape(b, w, t, d), given
