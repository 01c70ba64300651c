# SPDX-License-Identifier: Apache-2.0
"""The layers of a pre-norm vision transformer, with vit_jax's parameter names.

A `Block` takes tokens and, beside them, prompts: keys and values that the tokens may
attend to, and nothing else. Everything here is per block; see `vit.py` for the model.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from vpt_jax.models.attention import attend, attend_fused, wide
from vpt_jax.models.posemb import grid_side, sincos_table
from vpt_jax.models.rotary import rotate
from vpt_jax.models.xla import ACTIVATIONS, swiglu
from vpt_jax.prompts import per_example


class KeyValue(NamedTuple):
    """A layer's prompts after the key and value projections, ready for inference.

    Example:
      >>> ready = prefill(model, backbone, prompts)
      >>> ready[0].key.shape
      (4, 2, 32)
    """

    key: jax.Array  # [h, n, d / h]
    value: jax.Array  # [h, n, d / h]


def batched(x: jax.Array, rank: int) -> jax.Array:
    """Adds a batch axis of 1 in front unless `x` has `rank` axes already."""
    return x if x.ndim == rank else x[None]


def mean_tokens(x: jax.Array, num: int, weight: jax.Array | None) -> jax.Array:
    """Mean over tokens `[b, t, d]`, of which the first `num` are prompts.

    A prompt that is masked or gated out of attention leaves the mean in the same
    measure, so that removing it is the same network: `weight [b or 1, num]` or None.
    """
    if weight is None or not num:
        return x.mean(axis=1)
    prompts = x[:, :num].astype(weight.dtype) * weight[..., None]
    total = prompts.sum(axis=1) + x[:, num:].astype(weight.dtype).sum(axis=1)
    count = weight.sum(axis=1, keepdims=True) + (x.shape[1] - num)
    return (total / count).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation; statistics in float32 whatever the dtype.

    The variance is the mean of squared differences, as in the reference, not
    `E[x^2] - E[x]^2`, which cancels when the mean is large. `epsilon` is 1e-6 in ViTs
    and 1e-5 in Swin.
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        kind = wide(x.dtype)
        scale, bias = (
            jnp.expand_dims(v.astype(kind), range(x.ndim - 1)) for v in (scale, bias)
        )
        x = x.astype(kind)
        x = x - x.mean(axis=-1, keepdims=True)
        x = x * lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + self.epsilon)
        return (x * scale + bias).astype(self.dtype)


class HeadProjection(nn.Module):
    """Dense layer from `[..., t, d]` to heads `[..., h, t, d / h]`."""

    num_heads: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, h = x.shape[-1], self.num_heads
        kernel = self.param(
            "kernel",
            nn.initializers.xavier_uniform(in_axis=0, out_axis=(1, 2)),
            (width, h, width // h),
            self.param_dtype,
        )
        bias = self.param(
            "bias", nn.initializers.zeros, (h, width // h), self.param_dtype
        )
        # A plain product and a transpose of its result: of the one einsum
        # `...td,dhc->...htc` XLA makes a product with a transposed kernel, which it
        # copies in every step (on CPU 23 + 3 ms against 17 of ViT-B/16, batch 8).
        y = x @ kernel.astype(self.dtype).reshape(width, width)
        y = y + jnp.expand_dims(bias.astype(self.dtype).reshape(-1), range(y.ndim - 1))
        return y.reshape(*y.shape[:-1], h, width // h).swapaxes(-3, -2)


class OutProjection(nn.Module):
    """Dense layer from heads `[b, h, t, d / h]` back to `[b, t, d]`."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h, c = x.shape[1], x.shape[3]
        kernel = self.param(
            "kernel",
            nn.initializers.xavier_uniform(in_axis=(0, 1), out_axis=2),
            (h, c, h * c),
            self.param_dtype,
        )
        bias = self.param("bias", nn.initializers.zeros, (h * c,), self.param_dtype)
        b, t = x.shape[0], x.shape[2]
        y = x.swapaxes(1, 2).reshape(b, t, h * c)
        y = y @ kernel.astype(self.dtype).reshape(h * c, h * c)
        return y + bias.astype(self.dtype)[None, None]


def projections(attention: Any) -> tuple[nn.Module, ...]:
    """Query, key, value and out of a multi-head attention."""
    kinds = {"dtype": attention.dtype, "param_dtype": attention.param_dtype}
    heads = [HeadProjection(attention.num_heads, **kinds) for _ in range(3)]
    return *heads, OutProjection(**kinds)


class Attention(nn.Module):
    """Multi-head attention whose keys and values may be extended."""

    num_heads: int
    attention: str = "products"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        self.query, self.key, self.value, self.out = projections(self)

    def key_value(self, x: jax.Array) -> KeyValue:
        return KeyValue(self.key(x), self.value(x))

    def __call__(
        self,
        queries: jax.Array,
        x: jax.Array,
        extra: KeyValue | None,
        key_weight: jax.Array | None,
        turns: tuple[Any, Any] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Tokens `queries [b, q, d]` attend to `x [b, t, d]`, then to `extra`.

        `turns` are the rotary positions of queries and of `x`, see `rotation`.
        """
        q = self.query(queries)
        q = q * q.shape[-1] ** -0.5
        k, v = self.key_value(x)
        if turns is not None:
            q, k = (rotate(y, turn) for y, turn in zip((q, k), turns, strict=True))
        if extra is not None:
            more_k, more_v = (per_example(e.astype(k.dtype), k) for e in extra)
            k = jnp.concatenate([k, more_k], axis=2)
            v = jnp.concatenate([v, more_v], axis=2)
        if self.attention == "cudnn" and key_weight is None:
            out, weights = attend_fused(q, k, v)
        else:  # the kernel has no weights for keys
            out, weights = attend(q, k, v, key_weight)
        return self.out(out), weights


class MlpBlock(nn.Module):
    """Two dense layers with one of `ACTIVATIONS` between them, or SwiGLU.

    `swiglu` (Shazeer, arXiv 2002.05202; DINOv2-g): the first layer makes two halves of
    `mlp_dim` columns, `silu(first) * second` goes on.
    """

    mlp_dim: int
    swiglu: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    activation: str = "gelu"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = functools.partial(
            nn.Dense,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.normal(1e-6),
        )
        y = dense(self.mlp_dim * (2 if self.swiglu else 1), name="Dense_0")(x)
        y = swiglu(y) if self.swiglu else ACTIVATIONS[self.activation](y)
        return dense(x.shape[-1], name="Dense_1")(y)


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al., arXiv 2103.17239; DINOv2)."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gamma = self.param(
            "gamma", nn.initializers.constant(1e-5), (x.shape[-1],), self.param_dtype
        )
        return x * jnp.expand_dims(gamma.astype(self.dtype), range(x.ndim - 1))


class Block(nn.Module):
    """Pre-norm transformer block: `x + MHA(LN(x))`, then `x + MLP(LN(x))`.

    With `layer_scale` both branches are multiplied by a learned factor per channel.
    """

    num_heads: int
    mlp_dim: int
    layer_scale: bool = False
    swiglu: bool = False
    attention: str = "products"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    activation: str = "gelu"
    epsilon: float = LayerNorm.epsilon

    def setup(self) -> None:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.LayerNorm_0 = LayerNorm(**kinds, epsilon=self.epsilon)
        self.MultiHeadDotProductAttention_0 = Attention(
            self.num_heads, self.attention, **kinds
        )
        self.LayerNorm_1 = LayerNorm(**kinds, epsilon=self.epsilon)
        self.MlpBlock_0 = MlpBlock(
            self.mlp_dim, self.swiglu, activation=self.activation, **kinds
        )
        if self.layer_scale:
            self.LayerScale_0 = LayerScale(**kinds)
            self.LayerScale_1 = LayerScale(**kinds)

    def prefill(self, prompts: jax.Array) -> KeyValue:
        """Keys and values `[(b,) h, n, d / h]` of prompts `[(b,) n, d]`."""
        return self.MultiHeadDotProductAttention_0.key_value(self.LayerNorm_0(prompts))

    def __call__(
        self,
        x: jax.Array,
        prompts: jax.Array | KeyValue | None = None,
        key_weight: jax.Array | None = None,
        read: slice = slice(None),
        turn: Any = None,
    ) -> tuple[jax.Array, jax.Array]:
        """One block.

        Args:
          x: Tokens `[b, t, d]`.
          prompts: None, `[n, d]`, `[b, n, d]`, or what `prefill` made of them.
          key_weight: None, `[b or 1, t + n]` or `[b, h, q, t + n]`, see `attend`.
          read: Only these `q` tokens are computed and returned; the others are keys and
            values alone.
          turn: Rotary positions of the tokens `[2, t, d / h]`, see `rotation`.

        Returns:
          Tokens `[b, q, d]` and attention weights `[b, h, q, t + n]`.
        """
        y = self.LayerNorm_0(x)
        if prompts is not None and not isinstance(prompts, KeyValue):
            prompts = self.prefill(prompts)
        turns = None if turn is None else (turn[:, read], turn)
        attended, weights = self.MultiHeadDotProductAttention_0(
            y[:, read], y, prompts, key_weight, turns
        )
        if self.layer_scale:
            attended = self.LayerScale_0(attended)
        x = x[:, read] + attended
        y = self.MlpBlock_0(self.LayerNorm_1(x))
        if self.layer_scale:
            y = self.LayerScale_1(y)
        return x + y, weights


class AddPositionEmbs(nn.Module):
    """Adds the position table, one row per token: learned, or fixed sines (`sincos`).

    The fixed table has no row for the class token: nothing is added there. With
    `rotary` there is no table.
    """

    posemb: str = "learned"
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, class_token: bool = True) -> jax.Array:
        first = int(class_token)
        if self.posemb == "rotary":
            return x
        if self.posemb == "sincos":
            grid = grid_side((1, *x.shape[1:]), class_token)
            table = jnp.asarray(sincos_table(grid, x.shape[2]), x.dtype)
            return jnp.concatenate([x[:, :first], x[:, first:] + table], axis=1)
        table = self.param(
            "pos_embedding",
            nn.initializers.normal(0.02),
            (1, *x.shape[1:]),
            self.param_dtype,
        )
        return x + table.astype(x.dtype)


class PatchEmbedding(nn.Module):
    """Convolution whose stride is its size: one token per patch, row by row."""

    width: int
    patch: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        p = self.patch
        kernel = self.param(
            "kernel",
            nn.initializers.lecun_normal(),
            (p, p, images.shape[-1], self.width),
            self.param_dtype,
        )
        bias = self.param(
            "bias", nn.initializers.zeros, (self.width,), self.param_dtype
        )
        x = lax.conv_general_dilated(
            images.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(p, p),
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = x.reshape(x.shape[0], -1, self.width)
        return x + bias.astype(self.dtype)[None, None]
