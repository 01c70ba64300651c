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

Tokens lie as class token, registers, prompts, patches.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpt_jax.files.checks import expect
from vpt_jax.files.messages import did_you_mean
from vpt_jax.models.attention import ATTENTIONS
from vpt_jax.models.inputs import Inputs, check_prompts, given_to
from vpt_jax.models.layers import (
    AddPositionEmbs,
    Block,
    LayerNorm,
    PatchEmbedding,
    mean_tokens,
)
from vpt_jax.models.variants import EXAMPLES, canonical
from vpt_jax.models.xla import ACTIVATIONS
from vpt_jax.prompts import check_choice, per_example

VARIANTS = {
    # Dosovitskiy et al., table 1; Ti and S: Touvron et al., arXiv 2012.12877, table 1.
    "Ti": {"width": 192, "depth": 12, "num_heads": 3, "mlp_dim": 768},
    "S": {"width": 384, "depth": 12, "num_heads": 6, "mlp_dim": 1536},
    "B": {"width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072},
    "L": {"width": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096},
    "H": {"width": 1280, "depth": 32, "num_heads": 16, "mlp_dim": 5120},
    # Oquab et al., arXiv 2304.07193 (DINOv2): SwiGLU, so `mlp_dim` is 8/3 of the width.
    "g": {"width": 1536, "depth": 40, "num_heads": 24, "mlp_dim": 4096, "swiglu": True},
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
READOUTS = ("cls", "mean", "mean_with_prompts")
NORMS = ("before", "after")
POSEMBS = ("learned", "sincos")
# What the backward pass finds in memory; the rest it computes once more.
REMATS: dict[str, Any] = {
    "none": None,
    # Outputs of projections and MLP; attention weights are the largest of the rest.
    "attention": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,  # only the inputs of blocks
}


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


class Encoder(nn.Module):
    """Position table, registers, blocks, final norm; see `ViT` for the attributes."""

    depth: int
    num_heads: int
    mlp_dim: int
    class_token: bool
    registers: int
    readout: str
    norm: str
    posemb: str
    layer_scale: bool
    swiglu: bool
    remat: str = "none"
    attention: str = "products"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    activation: str = "gelu"
    epsilon: float = LayerNorm.epsilon

    def setup(self) -> None:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.posembed_input = AddPositionEmbs(self.posemb, self.param_dtype)
        self.encoderblock = [
            Block(
                self.num_heads,
                self.mlp_dim,
                self.layer_scale,
                self.swiglu,
                self.attention,
                activation=self.activation,
                epsilon=self.epsilon,
                **kinds,
            )
            for _ in range(self.depth)
        ]
        self.encoder_norm = LayerNorm(**kinds, epsilon=self.epsilon)

    @property
    def prefix(self) -> int:
        """Tokens before the prompts: class token and registers."""
        return int(self.class_token) + self.registers

    def prefill(self, prompts: Sequence[jax.Array]) -> tuple[Any, ...]:
        ready: list[Any] = list(prompts)
        # Where the read-out averages over prompts, those of the last layer are tokens.
        for i in range(self.depth - (self.readout == "mean_with_prompts")):
            ready[i] = self.encoderblock[i].prefill(prompts[i])
        return tuple(ready)

    def __call__(
        self, x: jax.Array, registers: jax.Array | None, given: Inputs
    ) -> tuple[jax.Array, dict[str, Any]]:
        x = self.posembed_input(x, self.class_token)
        if registers is not None:
            x = insert(x, registers, int(self.class_token))
        out: dict[str, Any] = {"embedded": x, "blocks": []}
        run = self._as_tokens if given.formulation == "tokens" else self._as_keys
        # `x` holds the tokens that the read-out averages, `num` of them prompts.
        x, num = run(x, given, out["blocks"])
        return self._read(x, num, given.weights[-1]), out

    @property
    def _last(self) -> slice:
        """Tokens of the last block that are read."""
        return slice(0, 1) if self.readout == "cls" else slice(self.prefix, None)

    def _run(
        self, block: Block, x: jax.Array, p: Any, w: Any, read: slice = slice(None)
    ) -> tuple[jax.Array, jax.Array]:
        """The block, of which the backward pass keeps what `remat` says."""
        if self.remat == "none":
            return block(x, p, w, read)

        def call(block: Block, x: jax.Array, p: Any, w: Any) -> Any:
            return block(x, p, w, read)

        return nn.remat(call, policy=REMATS[self.remat])(block, x, p, w)

    def _as_keys(
        self, x: jax.Array, given: Inputs, out: list[Any]
    ) -> tuple[jax.Array, int]:
        t, num = x.shape[1], 0
        for i, (block, p, w) in enumerate(
            zip(self.encoderblock, given.prompts, given.weights, strict=True)
        ):
            last = i == self.depth - 1
            read = self._last if last else slice(None)
            if last and self.readout == "mean_with_prompts" and p is not None:
                num = p.shape[-2]
                x = insert(x, p, self.prefix)
                w = _spread(w, self.prefix, t - self.prefix)
                x, attention = self._run(block, x, None, w, read)
                attention = attention[..., self.prefix : self.prefix + num]
                out.append(
                    {
                        "tokens": x[:, num:],
                        "prompts": x[:, :num],
                        "prompt_attention": attention[:, :, num:],
                    }
                )
            else:
                x, attention = self._run(block, x, p, _spread(w, t, 0), read)
                out.append({"tokens": x, "prompt_attention": attention[..., t:]})
        return x, num

    def _as_tokens(
        self, x: jax.Array, given: Inputs, out: list[Any]
    ) -> tuple[jax.Array, int]:
        t, first, num = x.shape[1], self.prefix, 0
        for i, (block, p, w) in enumerate(
            zip(self.encoderblock, given.prompts, given.weights, strict=True)
        ):
            if given.deep and i:  # the previous layer's prompt outputs end here
                x = drop(x, num, first)
            if given.deep or i == 0:
                num = p.shape[-2]
                x = insert(x, p, first)
            w = with_rows(w, num, first) if w is not None and w.ndim == 4 else w
            w = _spread(w, first, t - first)
            x, attention = self._run(block, x, None, w)
            out.append(
                {
                    "tokens": drop(x, num, first),
                    "prompts": x[:, first : first + num],
                    # Rows: the model's own tokens, as in the other formulation.
                    "prompt_attention": drop(attention, num, first, axis=2)[
                        ..., first : first + num
                    ],
                }
            )
        if self.readout != "mean_with_prompts":
            x, num = drop(x, num, first), 0
        return x[:, self._last], num

    def _read(self, x: jax.Array, num: int, weight: jax.Array | None) -> jax.Array:
        """Features `[b, d]` of the tokens that are read; `num` prompts come first."""
        if self.norm == "before":
            x = self.encoder_norm(x)
        x = x[:, 0] if self.readout == "cls" else mean_tokens(x, num, weight)
        return self.encoder_norm(x) if self.norm == "after" else x


def insert(x: jax.Array, tokens: jax.Array, at: int) -> jax.Array:
    """Puts tokens `[n, d]` or `[b, n, d]` into `x [b, t, d]` before token `at`."""
    new = per_example(tokens.astype(x.dtype), x)
    return jnp.concatenate([x[:, :at], new, x[:, at:]], axis=1)


def drop(x: jax.Array, num: int, at: int, axis: int = 1) -> jax.Array:
    """Removes `num` tokens from place `at` on; the inverse of `insert`."""
    parts = (slice(0, at), slice(at + num, None))
    before = (slice(None),) * axis
    return jnp.concatenate([x[(*before, part)] for part in parts], axis)


def with_rows(weight: jax.Array, num: int, at: int) -> jax.Array:
    """Puts `num` rows of ones into `weight [b, h, t, n]` before row `at`."""
    ones = jnp.ones((*weight.shape[:2], num, weight.shape[3]), weight.dtype)
    return jnp.concatenate([weight[:, :, :at], ones, weight[:, :, at:]], axis=2)


def _spread(weight: jax.Array | None, before: int, after: int) -> jax.Array | None:
    """The prompts' key weights `[..., n]` among those of other tokens, which are 1."""
    if weight is None:
        return None
    ones = [jnp.ones((*weight.shape[:-1], n), weight.dtype) for n in (before, after)]
    return jnp.concatenate([ones[0], weight, ones[1]], axis=-1)


class ViT(nn.Module):
    """Vision transformer with pre-norm blocks that takes prompts as input.

    Attributes:
      variant: `"Ti/16" "S/16" "B/16" "B/32" "L/16" "H/14"` and other patch sizes,
        `"g/14"` (DINOv2's giant), or `"demo/4"`, the small backbone of the package.
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
        of prompts and patches, as the reference reads MAE.
      norm: The final norm `"before"` or `"after"` the read-out; makes no difference to
        `"cls"`.
      posemb: `"learned"`, or `"sincos"`, a fixed table (see `sincos_table`).
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
        self.Transformer = Encoder(
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            class_token=self.class_token,
            registers=self.registers,
            readout=self.readout,
            norm=self.norm,
            posemb=self.posemb,
            layer_scale=self.layer_scale,
            swiglu=bool(self.swiglu),
            remat=self.remat,
            attention=self.attention,
            activation=self.activation,
            epsilon=self.epsilon,
            **kinds,
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
        return self.Transformer(x, self.register_tokens, given)
