# SPDX-License-Identifier: Apache-2.0
"""Vision transformer (Dosovitskiy et al., arXiv 2010.11929) that takes prompts.

Parameter paths are those of `vit_jax`'s Linen `VisionTransformer`, byte for byte.

Deep prompts enter as keys and values (`formulation="kv"`): every layer throws the
previous layer's prompt outputs away and only the class token is read, so a prompt acts
only as one more key and value of its layer's attention; what else published code
computes of it is work without effect. That form, prompts as tokens through every block,
is `formulation="tokens"`: the oracle in tests, the peer in benchmarks, and what
VPT-Shallow needs, where prompts evolve from layer to layer. A read-out that averages
over the prompts' outputs needs it too, in the last block only.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpt_jax.files.checks import expect
from vpt_jax.files.messages import did_you_mean
from vpt_jax.models.attention import ATTENTIONS
from vpt_jax.models.encoder import Encoder, insert
from vpt_jax.models.inputs import check_prompts, given_to
from vpt_jax.models.layers import LayerNorm, PatchEmbedding
from vpt_jax.models.pooling import MAPHead
from vpt_jax.models.variants import EXAMPLES, canonical
from vpt_jax.models.xla import ACTIVATIONS, REMATS
from vpt_jax.prompts import check_choice

_SIZES = ("width", "depth", "num_heads", "mlp_dim")
VARIANTS = {
    # Dosovitskiy et al., table 1; Ti and S: Touvron et al., arXiv 2012.12877, table 1.
    "Ti": {"width": 192, "depth": 12, "num_heads": 3, "mlp_dim": 768},
    "S": {"width": 384, "depth": 12, "num_heads": 6, "mlp_dim": 1536},
    "B": {"width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072},
    "L": {"width": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096},
    "H": {"width": 1280, "depth": 32, "num_heads": 16, "mlp_dim": 5120},
    # Oquab et al., arXiv 2304.07193 (DINOv2): SwiGLU, so `mlp_dim` is 8/3 of the width.
    "g": {"width": 1536, "depth": 40, "num_heads": 24, "mlp_dim": 4096, "swiglu": True},
    # Alabdulmohsin et al., arXiv 2305.13035 (SigLIP's largest but one).
    "So400m": {"width": 1152, "depth": 27, "num_heads": 16, "mlp_dim": 4304},
    # Siméoni et al., arXiv 2508.10104 (DINOv3): those with a gated MLP.
    **{
        size: {**dict(zip(_SIZES, sizes, strict=True)), "swiglu": True}
        for size, sizes in {
            "S+": (384, 12, 6, 1536),
            "H+": (1280, 32, 20, 5120),
            "7B": (4096, 40, 32, 8192),
        }.items()
    },
    # The small backbone that ships with the package (32x32 pictures).
    "demo": {
        "width": 128,
        "depth": 6,
        "num_heads": 4,
        "mlp_dim": 512,
        "image_size": 32,
    },
}
NAMED_VARIANTS = ("Ti/16", "S/16", "B/16", "B/32", "L/16", "H/14", "g/14", "demo/4")
READOUTS = ("cls", "mean", "mean_with_prompts", "map")
NORMS = ("before", "after")
POSEMBS = ("learned", "sincos", "rotary")


def decode_variant(variant: str) -> dict[str, Any]:
    """Sizes of a variant string such as `"B/16"` (size, then patch in pixels).

    Other people's names of it, such as timm's, are understood (`canonical`).

    Raises:
      ValueError: If the string is not `SIZE/PATCH` with a known size.
    """
    expect(isinstance(variant, str), "variant", variant, "a text such as 'B/16'")
    name = canonical(variant)
    size, _, patch = name.partition("/")
    if size not in VARIANTS or not patch.isdecimal() or int(patch) == 0:
        near = did_you_mean(name, (*NAMED_VARIANTS, *EXAMPLES))
        raise ValueError(
            f"unknown variant {variant!r}; {near}known: {', '.join(NAMED_VARIANTS)}, or"
            f" another patch size for one of {', '.join(VARIANTS)}. For free sizes pass"
            " width=, depth=, num_heads=, mlp_dim= and patch= instead."
        )
    return {"image_size": 224, **VARIANTS[size], "patch": int(patch)}


_OF_THE_ENCODER = ("depth", "class_token", "registers", "readout", "norm", "posemb")
_OF_THE_ENCODER += ("pre_norm", "remat")
_OF_A_BLOCK = ("num_heads", "mlp_dim", "layer_scale", "attention", "activation")
_OF_A_BLOCK += ("epsilon", "dtype", "param_dtype")


class ViT(nn.Module):
    """Vision transformer with pre-norm blocks that takes prompts as input.

    Attributes:
      variant: `"Ti/16" "S/16" "B/16" "B/32" "L/16" "H/14"` and other patch sizes,
        `"g/14"` (DINOv2's giant), `"So400m/14"` (SigLIP), `"S+/16" "H+/16" "7B/16"`
        (DINOv3), or `"demo/4"`, the small backbone of the package.
        Empty for free sizes; a size given beside a variant overrides it.
      width: Token width `d`.
      depth: Number of blocks.
      num_heads: Attention heads; divides `width`.
      mlp_dim: Width of the MLP.
      patch: Side of a patch in pixels.
      image_size: Side of the square input in pixels; a multiple of `patch`.
      class_token: Whether there is one; without it, `readout` must be a mean.
      registers: Learned tokens without position (Darcet et al., arXiv 2309.16588).
      readout: `"cls"` the class token; `"mean"` of the patches; `"mean_with_prompts"`
        of prompts and patches, as the reference reads MAE; `"map"`, attention pooling
        of the patches (SigLIP; see `MAPHead`).
      norm: The final norm `"before"` or `"after"` the read-out; makes no difference to
        `"cls"`.
      posemb: `"learned"`; `"sincos"`, a fixed table (see `sincos_table`); or
        `"rotary"`, no table: every block turns the patches (DINOv3; see `rotation`).
      layer_scale: A learned factor per channel after attention and MLP (DINOv2).
      swiglu: SwiGLU instead of GELU in the MLP (DINOv2's giant).
      remat: What training computes a second time rather than keep in memory, with the
        same numbers: `"none"`; `"attention"`, the attention weights and elementwise
        work (little time, a third less memory); `"block"`, everything but the blocks'
        inputs (a third more time, a fraction of the memory). `docs/performance.md`.
      attention: `"products"`, everywhere; or `"cudnn"`, the fused kernel of NVIDIA GPUs
        for bfloat16. With masks or gates it is products, which the kernel has not.
      dtype: Of the computation. Softmax, normalisation statistics and the head stay in
        float32.
      param_dtype: Of the parameters that `init` makes.
      activation: Of the MLP: `"gelu"`, exact; `"gelu_tanh"`; or `"quick_gelu"`.
      epsilon: Of every LayerNorm.
      pre_norm: A LayerNorm before the blocks (CLIP).

    Example:
      >>> model = ViT("demo/4")
      >>> features, out = model.apply({"params": backbone}, images, prompts=prompts)
      >>> features.shape, len(out["blocks"])
      ((4, 128), 6)
    """

    variant: str = ""
    width: int = 0
    depth: int = 0
    num_heads: int = 0
    mlp_dim: int = 0
    patch: int = 0
    image_size: int = 0
    class_token: bool = True
    registers: int = 0
    readout: str = "cls"
    norm: str = "before"
    posemb: str = "learned"
    layer_scale: bool = False
    swiglu: bool | None = None
    remat: str = "none"
    attention: str = "products"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    activation: str = "gelu"
    epsilon: float = LayerNorm.epsilon
    pre_norm: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "variant", canonical(self.variant))
        sizes = decode_variant(self.variant) if self.variant else {"image_size": 224}
        sizes = {"swiglu": False, **sizes}
        for name, size in sizes.items():
            if getattr(self, name) in (0, None):
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
        check_choice("readout", self.readout, READOUTS)
        check_choice("norm", self.norm, NORMS)
        check_choice("posemb", self.posemb, POSEMBS)
        check_choice("attention", self.attention, ATTENTIONS)
        check_choice("remat", self.remat, tuple(REMATS))
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        if self.readout == "cls" and not self.class_token:
            raise ValueError(
                "readout 'cls' needs class_token=True; a model without a class token is"
                " read by 'mean'."
            )
        if self.readout == "map" and self.norm == "after":
            raise ValueError(
                "readout 'map' pools normalised patches; leave norm='after' out, there"
                " is no other."
            )
        if self.posemb == "rotary" and self.width // self.num_heads % 4:
            raise ValueError(
                f"posemb 'rotary' has heads of width {self.width // self.num_heads};"
                " expected a multiple of 4, sine and cosine on two axes."
            )
        super().__post_init__()

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the prompts that each layer takes."""
        return (self.width,) * self.depth

    def setup(self) -> None:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embedding = PatchEmbedding(self.width, self.patch, **kinds)
        if self.class_token:
            self.cls = self.param(
                "cls", nn.initializers.zeros, (1, 1, self.width), self.param_dtype
            )
        self.register_tokens = None
        if self.registers:
            self.register_tokens = self.param(
                "registers",
                nn.initializers.normal(0.02),
                (1, self.registers, self.width),
                self.param_dtype,
            )
        block = {name: getattr(self, name) for name in _OF_A_BLOCK}
        self.Transformer = Encoder(
            patches=(self.image_size // self.patch) ** 2,
            block={**block, "swiglu": bool(self.swiglu)},
            **{name: getattr(self, name) for name in _OF_THE_ENCODER},
        )
        if self.readout == "map":
            self.MAPHead_0 = MAPHead(
                self.num_heads, self.mlp_dim, self.activation, self.epsilon, **kinds
            )

    def prefill(self, prompts: Sequence[jax.Array]) -> tuple[Any, ...]:
        """Keys and values of deep prompts: one `KeyValue` of `[h, n_i, d/h]` a layer.

        They do not depend on the image: compute them once, pass them as `prompts=`.
        With `readout="mean_with_prompts"` the last layer's stay as they are.
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
        """Features: the class token after the final norm, or as `readout` says.

        Args:
          images: `[b, s, s, 3]` with `s = image_size`, normalised as the backbone
            expects.
          prompts: None, or one array per layer, `[n_i, d]` or (one set per example,
            as `prompt_dropout` makes) `[b, n_i, d]`; or what `prefill` returned.
          prompt_mask: Boolean `[n_i]` per layer; False takes the prompt out of
            attention exactly, as if it had been removed.
          prompt_gate: Float `[n_i]` or `[b, n_i]` per layer that multiplies the
            prompt's softmax numerator: 1 leaves it, 0 removes it. For scoring. Of deep
            prompts also by head and query, with the shape of `prompt_attention` below.
          deep: False runs VPT-Shallow: the first layer's prompts are inserted as
            tokens once and evolve; masks and gates act on them in every layer.
          formulation: `"kv"` (keys and values, exact and cheap) or `"tokens"`
            (the reference's). Shallow prompts always run as tokens.

        Returns:
          `features [b, d]` and `out`, a dict of named intermediates: `embedded`
          `[b, t, d]`, and `blocks`, a list with, per layer, `tokens` `[b, t, d]` (the
          last layer of `"kv"` only holds those that are read) and `prompt_attention`
          `[b, h, q, n_i]`, the weight that each of them gives to each prompt; where
          prompts are tokens also `prompts` `[b, n_i, d]`, their own outputs. Under jit
          what is not used is not computed.

        Raises:
          ValueError: If a shape does not fit, with got, expected and what to do.
        """
        given = given_to(
            self, images, prompts, prompt_mask, prompt_gate, deep, formulation
        )
        x = self.embedding(images)
        if self.class_token:
            x = insert(x, self.cls, 0)
        features, out = self.Transformer(x, self.register_tokens, given)
        return (self.MAPHead_0(features) if self.readout == "map" else features), out
