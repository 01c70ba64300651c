# SPDX-License-Identifier: Apache-2.0
"""The blocks of a `ViT` one after the other, with prompts beside or among the tokens.

Tokens lie as class token, registers, prompts, patches.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpt_jax.models.inputs import Inputs
from vpt_jax.models.layers import AddPositionEmbs, Block, LayerNorm, mean_tokens
from vpt_jax.models.rotary import rotation
from vpt_jax.models.xla import remat
from vpt_jax.prompts import per_example


class Encoder(nn.Module):
    """Positions, registers, blocks, final norm; see `ViT` for the attributes."""

    depth: int
    patches: int  # of a picture
    class_token: bool
    registers: int
    readout: str
    norm: str
    posemb: str
    pre_norm: bool
    remat: str
    block: Mapping[str, Any]  # the attributes of a `Block`

    def setup(self) -> None:
        kinds = {k: self.block[k] for k in ("dtype", "param_dtype", "epsilon")}
        self.posembed_input = AddPositionEmbs(self.posemb, kinds["param_dtype"])
        if self.pre_norm:
            self.input_norm = LayerNorm(**kinds)
        self.encoderblock = [Block(**self.block) for _ in range(self.depth)]
        self.encoder_norm = LayerNorm(**kinds)

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
        if self.pre_norm:
            x = self.input_norm(x)
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
        turn = None
        if self.posemb == "rotary":
            turn = rotation(x.shape[1], self.patches, x.shape[2] // block.num_heads)

        def call(block: Block, x: jax.Array, p: Any, w: Any) -> Any:
            return block(x, p, w, read, turn)

        return remat(call, self.remat)(block, x, p, w)

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
        """Features `[b, d]` of the tokens that are read; `num` prompts come first.

        Of `"map"` the tokens `[b, t, d]`, which the model pools.
        """
        if self.norm == "before":
            x = self.encoder_norm(x)
        if self.readout == "map":
            return x
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
