# SPDX-License-Identifier: Apache-2.0
"""Swin Transformer (Liu et al., arXiv 2103.14030) that takes prompts.

Attention stays within windows of `M * M` patches, every second block moves them by
half a window, and between stages 2 x 2 patches become one of twice the width.

Deep prompts enter as keys and values (`formulation="kv"`): every block throws the
previous block's prompt outputs away, so a prompt is one more key and value, the same
for all windows of a picture, with no position bias and no mask. The reference
formulation (`"tokens"`, VPT's released code) puts a copy of the prompts in front of
every window, averages their attention outputs over the windows and runs the MLP on
them too. VPT-Shallow needs it, and so does the last block where the prompts' outputs
are read. The released code pairs windows with prompts of other examples of the batch
in VPT-Shallow; here examples are independent.

Parameters, `i` a stage and `j` a block in it:

    patch_embed/{kernel,bias}                           the convolution
    patch_norm/{scale,bias}
    blocks_{i}_{j}/LayerNorm_0/{scale,bias}
    blocks_{i}_{j}/attention/{query,key,value}/kernel   [d, h, d / h], bias [h, d / h]
    blocks_{i}_{j}/attention/out/kernel                 [h, d / h, d], bias [d]
    blocks_{i}_{j}/attention/relative_position_bias_table   [(2 * M - 1)**2, h]
    blocks_{i}_{j}/LayerNorm_1/{scale,bias}
    blocks_{i}_{j}/MlpBlock_0/Dense_{0,1}/{kernel,bias}
    merging_{i}/norm/{scale,bias}                       from stage i to i + 1
    merging_{i}/reduction/kernel                        [4 * d, 2 * d]
    norm/{scale,bias}
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpt_jax.files.messages import did_you_mean
from vpt_jax.models.inputs import check_prompts, given_to
from vpt_jax.models.layers import (
    KeyValue,
    LayerNorm,
    MlpBlock,
    PatchEmbedding,
    mean_tokens,
)
from vpt_jax.models.variants import canonical
from vpt_jax.models.windows import WindowAttention, from_windows, to_windows
from vpt_jax.models.xla import REMATS, remat
from vpt_jax.prompts import check_choice, per_example

VARIANTS = {
    # Liu et al., section 3.3.
    "T": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "S": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "B": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "L": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}
READOUTS = ("mean", "mean_with_prompts")
EPSILON = 1e-5  # of every LayerNorm of the released models


class Block(nn.Module):
    """Pre-norm block: `x + attention(LN(x))`, then `x + MLP(LN(x))`."""

    num_heads: int
    mlp_dim: int
    window: int
    shift: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.LayerNorm_0 = LayerNorm(**kinds, epsilon=EPSILON)
        self.attention = WindowAttention(
            self.num_heads, self.window, self.shift, **kinds
        )
        self.LayerNorm_1 = LayerNorm(**kinds, epsilon=EPSILON)
        self.MlpBlock_0 = MlpBlock(self.mlp_dim, **kinds)

    def prefill(self, prompts: jax.Array) -> KeyValue:
        """Keys and values `[(b,) h, n, d / h]` of prompts `[(b,) n, d]`."""
        return self.attention.key_value(self.LayerNorm_0(prompts))

    def __call__(
        self,
        x: jax.Array,
        prompts: jax.Array | KeyValue | None = None,
        key_weight: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Prompts as keys and values.

        Args:
          x: Patches `[b, s*s, d]`, row by row.
          prompts: None, `[n, d]`, `[b, n, d]`, or what `prefill` made of them.
          key_weight: None or the prompts' `[b or 1, n]`.

        Returns:
          The patches, and the weights they give to prompts `[b, h, s*s, n]`.
        """
        if prompts is not None and not isinstance(prompts, KeyValue):
            prompts = self.prefill(prompts)
        windows = to_windows(self.LayerNorm_0(x), self.window, self.shift)
        windows, attention = self.attention(windows, prompts, key_weight)
        x = x + from_windows(windows, self.shift)
        return x + self.MlpBlock_0(self.LayerNorm_1(x)), attention

    def as_tokens(
        self, x: jax.Array, prompts: jax.Array, key_weight: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Prompts `[b, n, d]` as tokens; they come second among the results."""
        n = prompts.shape[1]
        windows = to_windows(self.LayerNorm_0(x), self.window, self.shift)
        copies = jnp.zeros_like(windows[:, :, :1]) + self.LayerNorm_0(prompts)[:, None]
        windows = jnp.concatenate([copies, windows], axis=2)
        windows, attention = self.attention(windows, None, key_weight, n)
        prompts = prompts + windows[:, :, :n].mean(axis=1)
        x = x + from_windows(windows[:, :, n:], self.shift)
        x = jnp.concatenate([prompts, x], axis=1)
        x = x + self.MlpBlock_0(self.LayerNorm_1(x))
        return x[:, n:], x[:, :n], attention


class PatchMerging(nn.Module):
    """Concatenates 2 x 2 patches, normalises, projects to `width`."""

    width: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        self.norm = LayerNorm(self.dtype, self.param_dtype, EPSILON)
        self.reduction = nn.Dense(
            self.width,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.xavier_uniform(),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Patches `[b, s*s, d]` to `[b, s*s / 4, width]`."""
        b, t, d = x.shape
        side = math.isqrt(t)
        x = x.reshape(b, side, side, d)
        # The released models' order: upper left, lower left, upper right, lower right.
        quarters = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        x = jnp.concatenate(quarters, axis=-1).reshape(b, t // 4, 4 * d)
        return self.reduction(self.norm(x))

    def prompts(self, x: jax.Array) -> jax.Array:
        """Prompts `[b, n, d]`, four copies of each, to `[b, n, width]`."""
        return self.reduction(self.norm(jnp.concatenate([x] * 4, axis=-1)))


class Swin(nn.Module):
    """Swin Transformer with prompts as input.

    Attributes:
      variant: `"Swin-T"`, `"Swin-S"`, `"Swin-B"`, `"Swin-L"`, or the letter alone.
        Empty for free sizes; a size given beside a variant overrides it.
      embed_dim: Width of the first stage; it doubles from stage to stage.
      depths: Blocks of every stage.
      num_heads: Attention heads of every stage.
      window: Side of a window in patches. A stage that is not larger has one window.
      patch: Side of a patch in pixels.
      image_size: Side of the square input in pixels; 0 for the smallest whose last
        stage fills a window (224 for window 7, 384 for window 12).
      mlp_ratio: Width of the MLP over that of its stage.
      readout: `"mean"` over the patches after the last norm, or `"mean_with_prompts"`,
        over the last block's prompt outputs too, as VPT's released code does.
      dtype: Of the computation. Softmax, normalisation statistics and the head stay in
        float32.
      param_dtype: Of the parameters that `init` makes.
      remat: What training computes a second time, see `ViT`.

    Example:
      >>> model = Swin("T")
      >>> counts(init_prompts(jax.random.key(0), model, 5))
      (5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5)
    """

    variant: str = ""
    embed_dim: int = 0
    depths: Sequence[int] = ()
    num_heads: Sequence[int] = ()
    window: int = 7
    patch: int = 4
    image_size: int = 0
    mlp_ratio: int | float = 4
    readout: str = "mean"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"

    def __post_init__(self) -> None:
        def put(**sizes: Any) -> None:
            for name, size in sizes.items():
                object.__setattr__(self, name, size)

        if self.variant:
            letter = canonical(self.variant).removeprefix("Swin-")
            if letter not in VARIANTS:
                known = [f"Swin-{v}" for v in VARIANTS]
                raise ValueError(
                    f"unknown variant {self.variant!r};"
                    f" {did_you_mean(canonical(self.variant), known)}known:"
                    f" {', '.join(known)}. For free sizes pass embed_dim=, depths= and"
                    " num_heads= instead."
                )
            put(variant=f"Swin-{letter}")
            put(**{k: v for k, v in VARIANTS[letter].items() if not getattr(self, k)})
        put(depths=tuple(self.depths), num_heads=tuple(self.num_heads))
        if not self.image_size:
            put(image_size=self.patch * self.window * 2 ** max(self.num_stages - 1, 0))
        check_choice("readout", self.readout, READOUTS)
        check_choice("remat", self.remat, tuple(REMATS))
        check_sizes(self)
        super().__post_init__()

    @property
    def num_stages(self) -> int:
        return len(self.depths)

    @property
    def depth(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)

    @property
    def width(self) -> int:
        """Width of the features."""
        return self.embed_dim * 2 ** (self.num_stages - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the prompts that each block takes."""
        stages = enumerate(self.depths)
        return tuple(self.embed_dim * 2**i for i, n in stages for _ in range(n))

    def setup(self) -> None:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.patch_embed = PatchEmbedding(self.embed_dim, self.patch, **kinds)
        self.patch_norm = LayerNorm(**kinds, epsilon=EPSILON)

        def block(i: int, j: int) -> Block:
            width = self.embed_dim * 2**i
            side = self.image_size // self.patch // 2**i
            window = min(side, self.window)
            shift = window // 2 if j % 2 and window < side else 0
            mlp_dim = int(width * self.mlp_ratio)
            return Block(self.num_heads[i], mlp_dim, window, shift, **kinds)

        self.blocks = [
            [block(i, j) for j in range(depth)] for i, depth in enumerate(self.depths)
        ]
        self.merging = [
            PatchMerging(self.embed_dim * 2 ** (i + 1), **kinds)
            for i in range(self.num_stages - 1)
        ]
        self.norm = LayerNorm(**kinds, epsilon=EPSILON)

    def prefill(self, prompts: Sequence[jax.Array]) -> tuple[Any, ...]:
        """Keys and values of deep prompts: one `KeyValue` of `[h, n_i, d/h]` a block.

        They do not depend on the image: compute them once, pass them as `prompts=`.
        With `readout="mean_with_prompts"` the last block's prompts stay as they are,
        because their outputs are read.
        """
        check_prompts(prompts, self.widths)
        blocks = [block for stage in self.blocks for block in stage]
        ready: list[Any] = [
            block.prefill(p.astype(self.dtype))
            for block, p in zip(blocks, prompts, strict=True)
        ]
        if self.readout == "mean_with_prompts":
            ready[-1] = prompts[-1]
        return tuple(ready)

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
        """Features: the mean over tokens after the final norm.

        Arguments and results are those of `ViT.__call__`, except:

        Args:
          images: `[b, s, s, 3]` with `s = image_size`, normalised as the backbone
            expects.
          prompts: One array per block, `[n_i, widths[i]]` or `[b, n_i, widths[i]]`.
          prompt_mask: False also takes the prompt out of the read-out.
          prompt_gate: Also multiplies the prompt's share of the read-out.
          deep: False runs VPT-Shallow.
          formulation: `"kv"` or `"tokens"`.

        Returns:
          `features [b, width]` and `out`, whose `prompt_attention` `[b, h, t, n_i]`
          lists the patches window after window. `prompts` `[b, n_i, d]`, their own
          outputs, stand where prompts are tokens.

        Raises:
          ValueError: If a shape does not fit, with got, expected and what to do.
        """
        given = given_to(
            self, images, prompts, prompt_mask, prompt_gate, deep, formulation
        )
        last, reads_prompts = self.depth - 1, self.readout == "mean_with_prompts"
        if reads_prompts and isinstance(given.prompts[last], KeyValue):
            raise ValueError(
                "the last block's prompts are keys and values, but readout"
                " 'mean_with_prompts' reads their outputs; pass what prefill of this"
                " model returns, or the last block's prompts themselves."
            )
        x = self.patch_norm(self.patch_embed(images))
        out: dict[str, Any] = {"embedded": x, "blocks": []}
        state: Any = None  # prompts as tokens [b, n, d]
        layer = 0
        for i, stage in enumerate(self.blocks):
            for block in stage:
                p, weight = given.prompts[layer], given.weights[layer]
                tokens = given.formulation == "tokens"
                if p is not None and (tokens or (reads_prompts and layer == last)):
                    if given.deep or layer == 0:
                        state = per_example(p, x)
                    run = remat(Block.as_tokens, self.remat)
                    x, state, attention = run(block, x, state, weight)
                    out["blocks"].append({"prompts": state})
                else:
                    run = remat(Block.__call__, self.remat)
                    x, attention = run(block, x, p, weight)
                    out["blocks"].append({})
                out["blocks"][-1] |= {"tokens": x, "prompt_attention": attention}
                layer += 1
            if layer <= last:
                x = self.merging[i](x)
                if not given.deep:
                    state = self.merging[i].prompts(state)
        if reads_prompts and state is not None:
            x = self.norm(jnp.concatenate([state, x], axis=1))
            return mean_tokens(x, state.shape[1], given.weights[last]), out
        return self.norm(x).mean(axis=1), out


def check_sizes(model: Swin) -> None:
    """Raises ValueError unless stages, heads and windows fit together."""
    stages, width, heads = len(model.depths), model.embed_dim, model.num_heads
    numbers = (width, model.window, model.patch, model.image_size, *model.depths)
    if not stages or min(numbers) < 1 or model.mlp_ratio <= 0:
        raise ValueError(
            "Swin needs embed_dim, depths, num_heads, window, patch, image_size (at"
            " least 1) and mlp_ratio, or a variant such as 'Swin-B'."
        )
    if len(heads) != stages or min(heads) < 1:
        raise ValueError(
            f"num_heads is {heads} but there are {stages} stages (depths"
            f" {model.depths}); pass one number per stage."
        )
    for i, h in enumerate(heads):
        if width * 2**i % h:
            raise ValueError(
                f"stage {i} has width {width * 2**i}, which is not a multiple of its"
                f" num_heads {h}."
            )
    # Merging halves the side exactly when it is a multiple of this.
    unit = model.patch * 2 ** (stages - 1)

    def fits(size: int) -> bool:
        sides = [size // model.patch // 2**i for i in range(stages)]
        return size % unit == 0 and all(
            s <= model.window or s % model.window == 0 for s in sides
        )

    size, largest = model.image_size, model.image_size + unit * model.window
    if not fits(size):
        smaller = [s for s in range(unit, size, unit) if fits(s)][-1:]
        larger = [s for s in range(unit, largest + 1, unit) if s > size and fits(s)][:1]
        raise ValueError(
            f"image_size {size} does not divide into patches of {model.patch},"
            f" {stages - 1} mergings and windows of {model.window}; the nearest sizes"
            f" that work: {', '.join(map(str, smaller + larger))}."
        )
