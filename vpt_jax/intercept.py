# SPDX-License-Identifier: Apache-2.0
"""Prompts for Flax's vision transformers that were not written for them.

`with prompted(prompts): model.apply(...)`, of an NNX module `with prompted(prompts,
model=module, block=...): module(...)`, puts each layer's prompts among the tokens of
its encoder block, and takes them out of what the block returns. The model's code and
parameters stay as they are. `PromptedModel` gives such a model the calls of
`vpt_jax.ViT`, so that scoring and condensing work on it unchanged.

Prompts are tokens here (what `vpt_jax.ViT` calls `formulation="tokens"`): a block that
is not ours cannot be told to use them as keys and values only.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpt_jax.files.checks import check_layers
from vpt_jax.models.foreign import ATTENTION
from vpt_jax.models.inputs import check_normalised, prepare
from vpt_jax.models.passes import (
    BLOCK,
    Run,
    compiled,
    first,
    no_attention,
    under_jit,
)

# Part of the key under which JAX caches what it has traced: nothing that was traced
# with prompts is used without them, or the other way round. The value is an object of
# its own in a context within a compiled function. Around one it is the same for all, or
# every operation would compile anew; `Run` meets the model there and refuses it.
_traced_with = jax.make_user_context(default_value=None)
_EAGER = "eager"


@contextlib.contextmanager
def prompted(
    prompts: Sequence[jax.Array],
    prompt_mask: Sequence[jax.Array] | None = None,
    prompt_gate: Sequence[jax.Array] | None = None,
    deep: bool = True,
    *,
    block: str = BLOCK,
    model: Any = None,
) -> Iterator[None]:
    r"""Inside this context, vision transformers run with prompts.

    Deep prompts are inserted before each block and removed after it; shallow ones are
    inserted before the first block, evolve, and are removed after the last. They stand
    after the first token, without position embedding. A model may be applied several
    times, each time through all its blocks. What a block returns beside its tokens
    passes as it is; where that has a row per token, rows `1 : 1 + n` are the prompts'.

    Under `jax.jit`, write the context inside the compiled function, with the prompts
    among its arguments. What was compiled around the model would keep these prompts for
    ever, so calling it inside the context is an error. (Not seen: other threads, and
    programs without Python left to run, `lower().compile()` or `export`.)

    Of an NNX module, which is passed as `model`, the blocks are found by their paths.
    Transformations of NNX (`nnx.jit`, `nnx.grad`) copy the module: write the context
    inside the function that is transformed, with that function's own module.

    Masks and gates need blocks whose attention is a
    `flax.linen.MultiHeadDotProductAttention` or, in NNX, a
    `flax.nnx.MultiHeadAttention` (or a subclass) with an `attention_fn` that takes
    `bias` and `mask`. An NNX block without one is traced, and the weight multiplies the
    numerators of its softmax over `[b, h, t, t]`: it must not change its own state.
    With `mutable=["prompt_attention"]`, Linen's `apply` also returns the attention
    weights `[b, h, t, n_i]` that the model's own tokens give to the prompts (softmax
    attention, no dropout).

    Args:
      prompts: One array per layer, `[n_i, d]` or (one set per example) `[b, n_i, d]`;
        `n_i` may be 0.
      prompt_mask: Boolean `[n_i]` per layer; False takes the prompt out of attention
        exactly, as if it had been removed.
      prompt_gate: Float `[n_i]` or `[b, n_i]` per layer that multiplies the prompt's
        softmax numerator: 1 leaves it, 0 removes it (at 0 the gate's gradient is 0).
        Of deep prompts also `[b, h, t, n_i]`, by head and the model's own token.
      deep: False runs VPT-Shallow: later layers have 0 prompts.
      block: Regular expression for the end of a block's path, with one group, the
        layer's number from 0. Narrow it when a model has several encoders:
        `r"img/Transformer/encoderblock_(\d+)"`. Of an NNX module a path consists of
        attributes and numbers: `r"transformer/blocks/layers/(\d+)"`.
      model: The NNX module that will run; None for Linen.

    Raises:
      ValueError: If a layer was not reached in some call of a transformer, a block has
        no prompts, the encoder is scanned, the context stands around a compiled
        function, or something does not fit, with got, expected and what to do.

    Example:
      >>> class Model(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         for i in range(2):
      ...             x += nn.MultiHeadAttention(2, name=f"encoderblock_{i}")(x)
      ...         return x
      >>> tokens = jnp.ones((1, 5, 8))
      >>> variables = Model().init(jax.random.key(0), tokens)
      >>> with prompted((jnp.ones((3, 8)), jnp.ones((1, 8)))):
      ...     Model().apply(variables, tokens).shape
      (1, 5, 8)
    """
    with _prompting(prompts, prompt_mask, prompt_gate, deep, block, model):
        yield


@contextlib.contextmanager
def _prompting(
    prompts: Sequence[jax.Array],
    mask: Any,
    gate: Any,
    deep: bool,
    block: str,
    model: Any = None,
    received: dict[int, list[jax.Array]] | None = None,
) -> Iterator[None]:
    """`prompted`; the attention that an NNX module's prompts receive is collected."""
    check_layers("prompts", prompts, 2, 3, shape="[n_i, d]")
    given = prepare(
        prompts,
        mask,
        gate,
        widths=tuple(p.shape[-1] for p in prompts),
        deep=deep,
        formulation="tokens",
        dtype=jnp.result_type(float),
    )
    run = Run(given, compiled(block), under_jit(), received=received)
    key = object() if run.traced else _EAGER
    linen = model is None
    calls = nn.intercept_methods(run.intercept) if linen else run.within(model)
    with _traced_with(key), calls:
        yield
    run.finish()


@dataclasses.dataclass(frozen=True, eq=False)
class PromptedModel:
    r"""A vision transformer of Linen or NNX with the calls of `vpt_jax.ViT`.

    Hashed by identity (static under jit, whatever the model's attributes): make it
    once, or everything compiles again.

    Attributes:
      model: The Linen module, or the `GraphDef` of an NNX one, from `nnx.split`; its
        read-out must be features, not logits (in vit_jax and big_vision:
        `num_classes=None`).
      depth: Number of its encoder blocks.
      width: Token width `d`.
      patch: Side of a patch in pixels; `init_prompts` reads it.
      call: Further arguments of the module's `__call__`; None is `train=False` in
        Linen and nothing in NNX.
      read: Makes features `[b, d]` of what the module returns; by default that itself,
        or the first entry of a tuple. For a model with a head, e.g. (big_vision)
        `lambda result: result[1]["pre_logits"]`.
      block: See `prompted`.

    Example:
      With vit_jax's `VisionTransformer(num_classes=None, ...)` and its parameters:

      >>> other = PromptedModel(module, depth=2, width=16, patch=4)
      >>> own = init_prompts(jax.random.key(0), other, num_prompts=3)
      >>> features, out = other.apply({"params": params}, images, prompts=own)
      >>> features.shape, out["blocks"][0]["prompt_attention"].shape
      ((4, 16), (4, 2, 65, 3))

      With a module of NNX, `vit`::

        graphdef, params = nnx.split(vit)
        model = vpt_jax.PromptedModel(
            graphdef, depth=12, width=768, block=r"layers/(\d+)"
        )
    """

    model: Any
    depth: int
    width: int
    patch: int = 16
    call: Mapping[str, Any] | None = None
    read: Callable[[Any], Any] = first
    block: str = BLOCK

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the prompts that each layer takes."""
        return (self.width,) * self.depth

    def apply(
        self,
        variables: Any,
        images: jax.Array,
        *,
        prompts: Sequence[jax.Array] | None = None,
        prompt_mask: Sequence[jax.Array] | None = None,
        prompt_gate: Sequence[jax.Array] | None = None,
        deep: bool = True,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Features of a batch.

        Args:
          variables: Of the module: `{"params": backbone}`; of NNX the state that was
            split from the `GraphDef`.
          images: What the module takes, batch first, normalised: floats. (A module that
            normalises uint8 pictures itself runs in `prompted`.)
          prompts: None runs the model as it is; else see `prompted`.
          prompt_mask: Likewise.
          prompt_gate: Likewise.
          deep: Likewise.

        Returns:
          `features [b, d]` and `out`: `result`, what the module returned, and `blocks`,
          a list with, per layer, `prompt_attention` `[b, h, t, n_i]`, the weight that
          each of the model's own tokens gives to each prompt (empty without prompts).

        Raises:
          ValueError: As `prompted`; if a block has no attention module that Flax knows
            (use `prompted` itself there); if the features have another shape.
        """
        check_normalised(images)
        if prompts is None:
            if prompt_mask is not None or prompt_gate is not None:
                raise ValueError("prompt_mask and prompt_gate need prompts; got None.")
            result, found = self._ran(variables, images), []
        else:
            given = prompts, prompt_mask, prompt_gate, deep, self.block
            result, by_layer = self._ran(variables, images, given)
            found = _received(by_layer, len(prompts))
        blocks = [{"prompt_attention": weights} for weights in found]
        features = self.read(result)
        expected = (images.shape[0], self.width)
        if jnp.shape(features) != expected:
            raise ValueError(
                f"read= returned shape {jnp.shape(features)}; expected features"
                f" {expected}. Build the model without its head (num_classes=None), or"
                " pass read= that finds the features in what the model returns."
            )
        return features, {"blocks": blocks, "result": result}

    def _ran(self, variables: Any, images: Any, given: Any = None) -> Any:
        """The module's result; with prompts, also their attention by layer."""
        received: dict[int, list[jax.Array]] = {}
        if isinstance(self.model, nn.Module):
            call = {"train": False} if self.call is None else self.call
            apply = functools.partial(self.model.apply, variables, images, **call)
            if given is None:
                return apply()
            with _prompting(*given):
                result, state = apply(mutable=[ATTENTION])
            return result, _sown(state)
        from flax import nnx

        # A copy for this call alone, of whatever trace it is in.
        module = nnx.merge(self.model, variables["params"])
        if given is None:
            return module(images, **(self.call or {}))
        with _prompting(*given, model=module, received=received):
            return module(images, **(self.call or {})), received


def _sown(state: Any) -> dict[int, list[jax.Array]]:
    """Attention weights by layer, of what a Linen module returned beside its result."""
    found: dict[int, list[jax.Array]] = {}
    for path, weights in jax.tree_util.tree_leaves_with_path(state):
        # path: ..., layer, position in tuple
        found.setdefault(int(path[-2].key), []).append(weights)
    return found


def _received(found: dict[int, list[jax.Array]], depth: int) -> list[jax.Array]:
    """Attention weights per layer; heads of several attentions side by side."""
    for i in range(depth):
        if i not in found:
            raise ValueError(no_attention(i))
    return [jnp.concatenate(found[i], axis=1) for i in range(depth)]
