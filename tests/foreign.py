# SPDX-License-Identifier: Apache-2.0
"""Small stand-ins for Linen vision transformers that others wrote.

Module names, parameter paths and calls are those of vit_jax's `VisionTransformer` and
of big_vision's `vit._Model`; what prompts do not meet is left out. GELU and variance
are exact (those models take Flax's defaults, the tanh form and `E[x^2] - E[x]^2`), so
that `vpt_jax.ViT` with the same parameters is an oracle. Nothing here knows of prompts.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

gelu = functools.partial(nn.gelu, approximate=False)
LayerNorm = functools.partial(nn.LayerNorm, use_fast_variance=False)


class MlpBlock(nn.Module):
    mlp_dim: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, deterministic):
        y = gelu(nn.Dense(self.mlp_dim)(x))
        y = nn.Dropout(self.dropout)(y, deterministic)
        return nn.Dense(x.shape[-1])(y)


class AddPositionEmbs(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(0.02)
        return x + self.param("pos_embedding", init, (1, *x.shape[1:]))


# --- vit_jax ------------------------------------------------------------------------


class VitJaxBlock(nn.Module):
    """Returns an array; takes `deterministic` by keyword only."""

    mlp_dim: int
    num_heads: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, inputs, *, deterministic):
        x = LayerNorm()(inputs)
        x = nn.MultiHeadDotProductAttention(
            num_heads=self.num_heads,
            broadcast_dropout=False,
            deterministic=deterministic,
            dropout_rate=self.dropout,
        )(x, x)
        x = nn.Dropout(self.dropout)(x, deterministic=deterministic) + inputs
        y = LayerNorm()(x)
        return x + MlpBlock(self.mlp_dim, self.dropout)(y, deterministic)


class VitJaxEncoder(nn.Module):
    depth: int
    mlp_dim: int
    num_heads: int
    dropout: float = 0.0
    block: Any = VitJaxBlock
    by_keyword: str = ""  # name of the block's argument, where it is called by name

    @nn.compact
    def __call__(self, x, *, train):
        x = AddPositionEmbs(name="posembed_input")(x)
        for i in range(self.depth):
            block = self.block(
                self.mlp_dim, self.num_heads, self.dropout, name=f"encoderblock_{i}"
            )
            args, kwargs = ((), {self.by_keyword: x}) if self.by_keyword else ((x,), {})
            x = block(*args, deterministic=not train, **kwargs)
        return LayerNorm(name="encoder_norm")(x)


class VitJax(nn.Module):
    """Class token, position table over class token and patches, features `[b, d]`."""

    width: int = 16
    depth: int = 3
    num_heads: int = 2
    mlp_dim: int = 24
    patch: int = 4
    num_classes: int | None = None
    dropout: float = 0.0
    block: Any = VitJaxBlock
    by_keyword: str = ""

    @nn.compact
    def __call__(self, inputs, *, train):
        p = (self.patch, self.patch)
        x = nn.Conv(self.width, p, p, padding="VALID", name="embedding")(inputs)
        x = x.reshape(x.shape[0], -1, self.width)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(cls, [x.shape[0], 1, 1]), x], axis=1)
        x = VitJaxEncoder(
            self.depth,
            self.mlp_dim,
            self.num_heads,
            self.dropout,
            self.block,
            self.by_keyword,
            name="Transformer",
        )(x, train=train)[:, 0]
        if self.num_classes:
            x = nn.Dense(self.num_classes, name="head")(x)
        return x


# --- big_vision ---------------------------------------------------------------------


class BigVisionBlock(nn.Module):
    """Returns tokens and a dict of what happened on the way."""

    mlp_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, x, deterministic=True):
        out = {}
        y = LayerNorm()(x)
        y = out["sa"] = nn.MultiHeadDotProductAttention(
            num_heads=self.num_heads, deterministic=deterministic
        )(y, y)
        x = out["+sa"] = x + y
        y = LayerNorm()(x)
        y = out["mlp"] = MlpBlock(self.mlp_dim)(y, deterministic)
        return x + y, out


class BigVisionEncoder(nn.Module):
    depth: int
    mlp_dim: int
    num_heads: int
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x, deterministic=True):
        out = {}
        sizes = {"mlp_dim": self.mlp_dim, "num_heads": self.num_heads}
        block: Any = BigVisionBlock
        if self.scan or self.remat:
            # Argument 2 counts from self.
            block = nn.remat(block, prevent_cse=False, static_argnums=(2,))
        if self.scan:
            x, scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=self.depth,
            )(name="encoderblock", **sizes)(x, deterministic)
            for i in range(self.depth):
                out[f"block{i:02d}"] = jax.tree.map(lambda o, i=i: o[i], scanned)
        else:
            for i in range(self.depth):
                name = f"encoderblock_{i}"
                x, out[f"block{i:02d}"] = block(name=name, **sizes)(x, deterministic)
            out["pre_ln"] = x
        return LayerNorm(name="encoder_norm")(x), out


class BigVision(nn.Module):
    """Position table at the top, over patches only; returns `(x, out)`."""

    width: int = 16
    depth: int = 3
    num_heads: int = 2
    mlp_dim: int = 24
    patch: int = 4
    num_classes: int | None = None
    pool_type: str = "gap"
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, image, *, train=False):
        out = {}
        p = (self.patch, self.patch)
        x = nn.Conv(self.width, p, p, padding="VALID", name="embedding")(image)
        x = x.reshape(x.shape[0], -1, self.width)
        init = nn.initializers.normal(self.width**-0.5)
        x = x + self.param("pos_embedding", init, (1, *x.shape[1:]))
        if self.pool_type == "tok":
            cls = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
            x = jnp.concatenate([jnp.tile(cls, [x.shape[0], 1, 1]), x], axis=1)
        x, out["encoder"] = BigVisionEncoder(
            self.depth,
            self.mlp_dim,
            self.num_heads,
            self.scan,
            self.remat,
            name="Transformer",
        )(x, deterministic=not train)
        out["encoded"] = x
        x = x[:, 0] if self.pool_type == "tok" else x.mean(axis=1)
        out["pre_logits"] = x
        if self.num_classes:
            x = out["logits"] = nn.Dense(self.num_classes, name="head")(x)
        return x, out


def to_vit(params: Any) -> Any:
    """big_vision's parameters in the places of vit_jax's, which are `vpt_jax.ViT`'s."""
    params = dict(params)
    table = params.pop("pos_embedding")
    if "cls" in params:  # the class token has no position there
        table = jnp.concatenate([jnp.zeros_like(params["cls"]), table], axis=1)
    encoder = {**params["Transformer"], "posembed_input": {"pos_embedding": table}}
    return {**params, "Transformer": encoder}


def to_scan(params: Any) -> Any:
    """One tree for all blocks, stacked, as `scan=True` has it."""
    encoder = dict(params["Transformer"])
    names = sorted(name for name in encoder if name.startswith("encoderblock_"))
    blocks = [encoder.pop(name) for name in names]
    encoder["encoderblock"] = jax.tree.map(lambda *x: jnp.stack(x), *blocks)
    return {**params, "Transformer": encoder}


# --- NNX ----------------------------------------------------------------------------


class NnxBlock(nnx.Module):
    """As bonsai's and jimm's ViTs have it: Flax's own attention."""

    def __init__(self, width, mlp_dim, num_heads, rngs):
        norm = functools.partial(nnx.LayerNorm, use_fast_variance=False, rngs=rngs)
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attn = nnx.MultiHeadAttention(num_heads, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, mlp_dim, rngs=rngs)
        self.down = nnx.Linear(mlp_dim, width, rngs=rngs)

    def __call__(self, x, *, rngs=None):
        x = x + self.attn(self.norm1(x), rngs=rngs)
        return x + self.down(gelu(self.up(self.norm2(x))))


class NnxVit(nnx.Module):
    """Blocks in a list (bonsai) or in an `nnx.Sequential` (jimm)."""

    def __init__(self, rngs, width=16, depth=3, num_heads=2, mlp_dim=24, nested=False):
        self.patches = nnx.Conv(3, width, (4, 4), (4, 4), padding="VALID", rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((1, 1, width)))
        self.positions = nnx.Param(jnp.zeros((1, 5, width)))
        blocks = [NnxBlock(width, mlp_dim, num_heads, rngs) for _ in range(depth)]
        self.layers = nnx.Sequential(*blocks) if nested else nnx.List(blocks)
        self.norm = nnx.LayerNorm(width, use_fast_variance=False, rngs=rngs)

    def __call__(self, images):
        x = self.patches(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        cls = jnp.tile(self.cls[...], (x.shape[0], 1, 1))
        x = jnp.concatenate([cls, x], axis=1) + self.positions[...]
        if isinstance(self.layers, nnx.Sequential):
            x = self.layers(x)
        else:
            for layer in self.layers:
                x = layer(x, rngs=None)
        return self.norm(x)[:, 0]


def nnx_params(params, depth=3, nested=False):
    """Those of `vpt_jax.ViT` in the places of `NnxVit`'s."""
    encoder, blocks = params["Transformer"], {}
    for i in range(depth):
        block = encoder[f"encoderblock_{i}"]
        dense = block["MlpBlock_0"]
        blocks[i] = {
            "norm1": block["LayerNorm_0"],
            "norm2": block["LayerNorm_1"],
            "attn": block["MultiHeadDotProductAttention_0"],
            "up": dense["Dense_0"],
            "down": dense["Dense_1"],
        }
    return {
        "patches": params["embedding"],
        "cls": params["cls"],
        "positions": encoder["posembed_input"]["pos_embedding"],
        "layers": {"layers": blocks} if nested else blocks,
        "norm": encoder["encoder_norm"],
    }


class RotaryBlock(nnx.Module):
    """As bonsai's DINOv3 has it: its own attention, and positions as an argument."""

    def __init__(self, width, num_heads, rngs):
        self.num_heads = num_heads
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        linear = functools.partial(nnx.Linear, width, width, rngs=rngs)
        self.q, self.v, self.o = (linear() for _ in range(3))
        self.k = linear(use_bias=False)

    def __call__(self, x, angles):
        y = self.norm1(x)
        b, t, d = y.shape
        q, k, v = (
            f(y).reshape(b, t, self.num_heads, -1).transpose(0, 2, 1, 3)
            for f in (self.q, self.k, self.v)
        )
        q, k = rotated(q, angles), rotated(k, angles)
        scale = jnp.asarray((d // self.num_heads) ** -0.5, q.dtype)
        weights = nnx.softmax(jnp.matmul(q, k.transpose(0, 1, 3, 2)) * scale, axis=-1)
        y = jnp.matmul(weights, v).transpose(0, 2, 1, 3).reshape(b, t, d)
        return x + nnx.silu(self.o(y))


def rotated(x, angles):
    """Patches only, which come last: class token, registers and prompts are not."""
    first, rest = jnp.split(x, [x.shape[-2] - angles.shape[0]], axis=-2)
    a, b = jnp.split(rest, 2, axis=-1)
    cos, sin = jnp.cos(angles)[None, None], jnp.sin(angles)[None, None]
    return jnp.concatenate([first, jnp.concatenate([-b, a], -1) * sin + rest * cos], -2)


class RotaryVit(nnx.Module):
    """Class token, two registers, patches with rotary positions; returns a dict."""

    def __init__(self, rngs, width=16, depth=3, num_heads=2):
        self.patches = nnx.Conv(3, width, (4, 4), (4, 4), padding="VALID", rngs=rngs)
        self.prefix = nnx.Param(jnp.ones((1, 3, width)))
        self.layer = nnx.List(
            [RotaryBlock(width, num_heads, rngs) for _ in range(depth)]
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def embedded(self, images):
        x = self.patches(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        prefix = jnp.tile(self.prefix[...], (x.shape[0], 1, 1))
        return jnp.concatenate([prefix, x], axis=1), jnp.outer(
            jnp.arange(float(x.shape[1])), jnp.linspace(0.1, 1.0, 8)
        )

    def __call__(self, images):
        x, angles = self.embedded(images)
        for layer in self.layer:
            x = layer(x, angles)
        return {"pooled": self.norm(x)[:, 0]}
