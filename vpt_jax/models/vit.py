# SPDX-License-Identifier: Apache-2.0
"""Vision transformer (Dosovitskiy et al., arXiv 2010.11929) that takes prompts.

Parameter paths are those of `vit_jax`'s Linen `VisionTransformer`, byte for byte, so
parameters move between the two without a rename table. Prompts are an argument.

Deep prompts enter as keys and values (`formulation="kv"`): every layer throws the
previous layer's prompt outputs away and only the class token is read, so a prompt acts
on the network only as one more key and value of its layer's attention. Queries, output
projection and MLP of prompt tokens are work without effect and are not computed. The
reference formulation, prompts as tokens through every block, is kept as
`formulation="tokens"`: the oracle in tests, the peer in benchmarks, and what
VPT-Shallow needs, where prompts evolve from layer to layer.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpt_jax.models.inputs import Inputs, check_prompts, prepare
from vpt_jax.models.layers import (
    AddPositionEmbs,
    Block,
    KeyValue,
    LayerNorm,
    PatchEmbedding,
    batched,
)

VARIANTS = {
    # Dosovitskiy et al., table 1; Ti and S: Touvron et al., arXiv 2012.12877, table 1.
    "Ti": {"width": 192, "depth": 12, "num_heads": 3, "mlp_dim": 768},
    "S": {"width": 384, "depth": 12, "num_heads": 6, "mlp_dim": 1536},
    "B": {"width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072},
    "L": {"width": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096},
    "H": {"width": 1280, "depth": 32, "num_heads": 16, "mlp_dim": 5120},
    # The small backbone that ships with the package (32x32 pictures).
    "demo": {
        "width": 128,
        "depth": 6,
        "num_heads": 4,
        "mlp_dim": 512,
        "image_size": 32,
    },
}
NAMED_VARIANTS = ("Ti/16", "S/16", "B/16", "B/32", "L/16", "H/14", "demo/4")


def decode_variant(variant: str) -> dict[str, int]:
    """Sizes of a variant string such as `"B/16"` (size, then patch in pixels).

    Raises:
      ValueError: If the string is not `SIZE/PATCH` with a known size.
    """
    size, _, patch = variant.partition("/")
    if size not in VARIANTS or not patch.isdecimal() or int(patch) == 0:
        raise ValueError(
            f"unknown variant {variant!r}; known: {', '.join(NAMED_VARIANTS)}, or"
            f" another patch size for one of {', '.join(VARIANTS)}. For free sizes pass"
            " width=, depth=, num_heads=, mlp_dim= and patch= instead."
        )
    return {"image_size": 224, **VARIANTS[size], "patch": int(patch)}


class Encoder(nn.Module):
    """Position table, blocks, final norm; `prompts` in one of two formulations."""

    depth: int
    num_heads: int
    mlp_dim: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.posembed_input = AddPositionEmbs(self.param_dtype)
        self.encoderblock = [
            Block(self.num_heads, self.mlp_dim, **kinds) for _ in range(self.depth)
        ]
        self.encoder_norm = LayerNorm(**kinds)

    def prefill(self, prompts: Sequence[jax.Array]) -> tuple[KeyValue, ...]:
        return tuple(
            block.prefill(p)
            for block, p in zip(self.encoderblock, prompts, strict=True)
        )

    def __call__(self, x: jax.Array, given: Inputs) -> tuple[jax.Array, dict[str, Any]]:
        x = self.posembed_input(x)
        out: dict[str, Any] = {"embedded": x, "blocks": []}
        run = self._as_tokens if given.formulation == "tokens" else self._as_keys
        x = run(x, given, out["blocks"])
        return self.encoder_norm(x[:, :1])[:, 0], out

    def _as_keys(self, x: jax.Array, given: Inputs, out: list) -> jax.Array:
        t = x.shape[1]
        for i, (block, p, w) in enumerate(
            zip(self.encoderblock, given.prompts, given.weights, strict=True)
        ):
            # Only the class token of the last block is read.
            queries = 1 if i == self.depth - 1 else None
            if w is not None:
                w = jnp.concatenate([jnp.ones((w.shape[0], t), w.dtype), w], axis=1)
            x, attention = block(x, p, w, queries)
            out.append({"tokens": x, "prompt_attention": attention[..., t:]})
        return x

    def _as_tokens(self, x: jax.Array, given: Inputs, out: list) -> jax.Array:
        num = 0
        for i, (block, p, w) in enumerate(
            zip(self.encoderblock, given.prompts, given.weights, strict=True)
        ):
            if given.deep or i == 0:
                num = p.shape[-2]
                x = insert(x, p.astype(x.dtype))
            if w is not None:
                ones = functools.partial(jnp.ones, dtype=w.dtype)
                patches = x.shape[1] - 1 - num
                w = jnp.concatenate(
                    [ones((w.shape[0], 1)), w, ones((w.shape[0], patches))], axis=1
                )
            x, attention = block(x, None, w)
            out.append(
                {
                    "tokens": drop(x, num),
                    "prompts": x[:, 1 : 1 + num],
                    # Rows: class token and patches, as in the other formulation.
                    "prompt_attention": jnp.concatenate(
                        [attention[:, :, :1], attention[:, :, 1 + num :]], axis=2
                    )[..., 1 : 1 + num],
                }
            )
            if given.deep:
                x = drop(x, num)
        return x


def insert(x: jax.Array, prompts: jax.Array) -> jax.Array:
    """Puts prompts `[n, d]` or `[b, n, d]` between class token and patches."""
    # zeros_like instead of broadcast_to keeps x's batch sharding (explicit meshes).
    return jnp.concatenate(
        [x[:, :1], jnp.zeros_like(x[:, :1]) + batched(prompts, 3), x[:, 1:]], 1
    )


def drop(x: jax.Array, num: int) -> jax.Array:
    """Removes `num` prompts again; the inverse of `insert`."""
    return jnp.concatenate([x[:, :1], x[:, 1 + num :]], axis=1)


class ViT(nn.Module):
    """Vision transformer with a class token, pre-norm blocks and prompts as input.

    Attributes:
      variant: `"Ti/16" "S/16" "B/16" "B/32" "L/16" "H/14"`, or `"demo/4"`, the small
        backbone of the package. Empty for free sizes; a size given beside a variant
        overrides it.
      width: Token width `d`.
      depth: Number of blocks.
      num_heads: Attention heads; divides `width`.
      mlp_dim: Width of the MLP.
      patch: Side of a patch in pixels.
      image_size: Side of the square input in pixels; a multiple of `patch`.
      dtype: Of the computation. Softmax, normalisation statistics and the head stay in
        float32.
      param_dtype: Of the parameters that `init` makes.
    """

    variant: str = ""
    width: int = 0
    depth: int = 0
    num_heads: int = 0
    mlp_dim: int = 0
    patch: int = 0
    image_size: int = 0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        sizes = decode_variant(self.variant) if self.variant else {"image_size": 224}
        for name, size in sizes.items():
            if not getattr(self, name):
                object.__setattr__(self, name, size)
        names = ("width", "depth", "num_heads", "mlp_dim", "patch", "image_size")
        missing = [n for n in names if getattr(self, n) < 1]
        if missing:
            raise ValueError(
                f"ViT needs {', '.join(missing)} (at least 1), or a variant such as"
                f" {NAMED_VARIANTS}."
            )
        if self.width % self.num_heads:
            raise ValueError(
                f"width {self.width} is not a multiple of num_heads {self.num_heads}."
            )
        if self.image_size % self.patch:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch {self.patch};"
                f" the next smaller is {self.image_size // self.patch * self.patch}."
            )
        super().__post_init__()

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the prompts that each layer takes."""
        return (self.width,) * self.depth

    def setup(self) -> None:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embedding = PatchEmbedding(self.width, self.patch, **kinds)
        self.cls = self.param(
            "cls", nn.initializers.zeros, (1, 1, self.width), self.param_dtype
        )
        self.Transformer = Encoder(self.depth, self.num_heads, self.mlp_dim, **kinds)

    def prefill(self, prompts: Sequence[jax.Array]) -> tuple[KeyValue, ...]:
        """Keys and values of deep prompts: one `KeyValue` of `[h, n_i, d/h]` a layer.

        They do not depend on the image: compute them once, pass them as `prompts=`.
        """
        check_prompts(prompts, self.widths)
        return self.Transformer.prefill([p.astype(self.dtype) for p in prompts])

    def __call__(
        self,
        images: jax.Array,
        *,
        prompts: Sequence[Any] | None = None,
        prompt_mask: Sequence[jax.Array] | None = None,
        prompt_gate: Sequence[jax.Array] | None = None,
        deep: bool = True,
        formulation: str = "kv",
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Features of the class token after the final norm.

        Args:
          images: `[b, s, s, 3]` with `s = image_size`, normalised as the backbone
            expects.
          prompts: None, or one array per layer, `[n_i, d]` or (one set per example,
            as `prompt_dropout` makes) `[b, n_i, d]`; or what `prefill` returned.
          prompt_mask: Boolean `[n_i]` per layer; False takes the prompt out of
            attention exactly, as if it had been removed.
          prompt_gate: Float `[n_i]` or `[b, n_i]` per layer that multiplies the
            prompt's softmax numerator: 1 leaves it, 0 removes it. For scoring.
          deep: False runs VPT-Shallow: the first layer's prompts are inserted as
            tokens once and evolve; masks and gates act on them in every layer.
          formulation: `"kv"` (keys and values, exact and cheap) or `"tokens"`
            (the reference's). Shallow prompts always run as tokens.

        Returns:
          `features [b, d]` and `out`, a dict of named intermediates: `embedded`
          `[b, t, d]`, and `blocks`, a list with, per layer, `tokens` `[b, t, d]` (the
          last layer of `"kv"` only holds the class token) and `prompt_attention`
          `[b, h, q, n_i]`, the weight that each query gives to each prompt; with
          `"tokens"` also `prompts` `[b, n_i, d]`, the prompts' own outputs. Under jit
          what is not used is not computed.

        Raises:
          ValueError: If a shape does not fit, with got, expected and what to do.
        """
        side = self.image_size
        if images.ndim != 4 or images.shape[1:] != (side, side, 3):
            raise ValueError(
                f"images have shape {tuple(images.shape)} but the model expects"
                f" [b, {side}, {side}, 3]; resize them, or build the model with"
                " image_size= (load_backbone resizes the position table)."
            )
        given = prepare(
            prompts,
            prompt_mask,
            prompt_gate,
            widths=self.widths,
            deep=deep,
            formulation=formulation,
            dtype=self.dtype,
        )
        x = self.embedding(images)
        # zeros_like keeps the batch sharding under explicit meshes.
        cls = jnp.zeros_like(x[:, :1]) + self.cls.astype(x.dtype)
        x = jnp.concatenate([cls, x], axis=1)
        return self.Transformer(x, given)


def prefill(model: ViT, backbone: Any, prompts: Sequence[jax.Array]):
    """The prompts' keys and values for inference, computed once.

    Args:
      model: The model that will take them.
      backbone: Its parameters.
      prompts: One `[n_i, d]` array per layer (deep prompts).

    Returns:
      One `KeyValue` per layer; pass it as `prompts=` in place of the prompts.
    """
    return model.apply({"params": backbone}, prompts, method="prefill")
