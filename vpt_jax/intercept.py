# SPDX-License-Identifier: Apache-2.0
"""Prompts for Linen vision transformers that were not written for them.

`with prompted(prompts): model.apply(...)` puts each layer's prompts among the tokens of
its encoder block, and takes them out of what the block returns. The model's code and
parameters stay as they are. `PromptedModel` gives such a model the calls of
`vpt_jax.ViT`, so that scoring and condensing work on it unchanged.

Prompts are tokens here (what `vpt_jax.ViT` calls `formulation="tokens"`): a block that
is not ours cannot be told to use them as keys and values only.
"""

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer

from vpt_jax.files.checks import check_layers
from vpt_jax.models.foreign import ATTENTION, FIRST, weighted_attention
from vpt_jax.models.inputs import Inputs, check_normalised, check_prompts, prepare
from vpt_jax.models.vit import drop, insert

BLOCK = r"encoderblock_(\d+)"
"""How vit_jax, big_vision and scenic name their encoder blocks."""

# Part of the key under which JAX caches what it has traced: nothing that was traced
# with prompts is used without them, or the other way round. The value is an object of
# its own in a context within a compiled function. Around one it is the same for all, or
# every operation would compile anew; `_Run` meets the model there and refuses it.
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
) -> Iterator[None]:
    r"""Inside this context, Linen vision transformers run with prompts.

    Deep prompts are inserted before each block and removed after it; shallow ones are
    inserted before the first block, evolve, and are removed after the last. They stand
    after the first token, without position embedding. A model may be applied several
    times, each time through all its blocks. What a block returns beside its tokens
    passes as it is; where that has a row per token, rows `1 : 1 + n` are the prompts'.

    Under `jax.jit`, write the context inside the compiled function, with the prompts
    among its arguments. What was compiled around the model would keep these prompts for
    ever, so calling it inside the context is an error. (Not seen: other threads, and
    programs without Python left to run, `lower().compile()` or `export`.)

    Masks and gates need blocks whose attention is a
    `flax.linen.MultiHeadDotProductAttention` (or a subclass) with an `attention_fn`
    that takes `bias` and `mask`. With `mutable=["prompt_attention"]`, `apply` also
    returns the attention weights `[b, h, t, n_i]` that the model's own tokens give to
    the prompts (softmax attention, no dropout).

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
        `r"img/Transformer/encoderblock_(\d+)"`.

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
    check_layers("prompts", prompts, 2, 3, shape="[n_i, d]")
    given = prepare(
        prompts,
        prompt_mask,
        prompt_gate,
        widths=tuple(p.shape[-1] for p in prompts),
        deep=deep,
        formulation="tokens",
        dtype=jnp.result_type(float),
    )
    run = _Run(given, _compiled(block), _under_jit())
    key = object() if run.traced else _EAGER
    with _traced_with(key), nn.intercept_methods(run.intercept):
        yield
    run.finish()


def first(result: Any) -> Any:
    """The result itself, or the first entry of a tuple such as big_vision's."""
    return result[0] if isinstance(result, tuple) else result


@dataclasses.dataclass(frozen=True, eq=False)
class PromptedModel:
    """A Linen vision transformer with the calls of `vpt_jax.ViT`.

    Hashed by identity (static under jit, whatever the model's attributes): make it
    once, or everything compiles again.

    Attributes:
      model: The module; its read-out must be features, not logits (in vit_jax and
        big_vision: `num_classes=None`).
      depth: Number of its encoder blocks.
      width: Token width `d`.
      patch: Side of a patch in pixels; `init_prompts` reads it.
      call: Further arguments of the module's `__call__`.
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
    """

    model: nn.Module
    depth: int
    width: int
    patch: int = 16
    call: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"train": False}
    )
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
          variables: Of the module: `{"params": backbone}`.
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
        run = functools.partial(self.model.apply, variables, images, **self.call)
        if prompts is None:
            if prompt_mask is not None or prompt_gate is not None:
                raise ValueError("prompt_mask and prompt_gate need prompts; got None.")
            result, blocks = run(), []
        else:
            with prompted(prompts, prompt_mask, prompt_gate, deep, block=self.block):
                result, state = run(mutable=[ATTENTION])
            blocks = [
                {"prompt_attention": weights}
                for weights in _received(state, len(prompts))
            ]
        features = self.read(result)
        expected = (images.shape[0], self.width)
        if jnp.shape(features) != expected:
            raise ValueError(
                f"read= returned shape {jnp.shape(features)}; expected features"
                f" {expected}. Build the model without its head (num_classes=None), or"
                " pass read= that finds the features in what the model returns."
            )
        return features, {"blocks": blocks, "result": result}


def _received(state: Any, depth: int) -> list[jax.Array]:
    """Sown attention weights per layer; heads of several attentions side by side."""
    found: list[list[jax.Array]] = [[] for _ in range(depth)]
    for path, weights in jax.tree_util.tree_leaves_with_path(state):
        found[int(path[-2].key)].append(weights)  # path: ..., layer, position in tuple
    for i, layer in enumerate(found):
        if not layer:
            raise ValueError(_no_attention(i))
    return [jnp.concatenate(layer, axis=1) for layer in found]


def _no_attention(layer: int) -> str:
    return (
        f"block {layer} called no flax.linen.MultiHeadDotProductAttention; expected one"
        " for masks, gates and attention weights. With another attention, use `with"
        " prompted(prompts)` and condensed prompts."
    )


def _compiled(block: str) -> re.Pattern[str]:
    pattern = re.compile(rf"(?:^|/)(?:{block})$")
    if pattern.groups != 1:
        raise ValueError(
            f"block={block!r} has {pattern.groups} groups; expected one, around the"
            f" layer's number, as in {BLOCK!r}."
        )
    return pattern


def _under_jit() -> bool:
    """Whether new arrays are tracers: in jit, scan or remat, not in grad or vmap."""
    return isinstance(jnp.zeros(()), Tracer)


def _lifted(module: nn.Module) -> str:
    """`"Scan"` for a module of a class made by `nn.scan`, `"Jit"` by `nn.jit`, ..."""
    kind = type(module)
    return kind.__name__.rpartition(kind.__bases__[0].__name__)[0]


@dataclasses.dataclass(eq=False)
class _Run:
    """What one `with prompted(...)` knows while the model runs."""

    given: Inputs
    pattern: re.Pattern[str]
    traced: bool  # the context stands inside a compiled function
    running: bool = False  # inside `apply`
    done: int = 0  # blocks of this pass that have run
    complete: bool = False  # some pass has run all of them
    reached: bool = False  # this pass has reached a block
    attended: bool = False  # ... or an attention outside of one
    layer: int | None = None  # the block that is running
    num_tokens: int = 0  # ... and its tokens, prompts included
    weighted: bool = False  # ... and whether its attention was reached
    in_attention: bool = False
    encoder: str | None = None  # path of the blocks' parent
    scanned: set[str | None] = dataclasses.field(default_factory=set)
    others: dict[str, None] = dataclasses.field(default_factory=dict)

    def intercept(self, call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        """The interceptor: `call` is the rest of the way to the module's method."""
        if self.running:
            return self._dispatch(call, args, kwargs, context)
        if not self.traced and _under_jit():
            raise ValueError(_around_compiled("The model"))
        self.running, self.done, self.reached, self.attended = True, 0, False, False
        try:
            result = self._dispatch(call, args, kwargs, context)
        finally:
            self.running = False
        # A head may run beside the model, another transformer may not: is it the one?
        if self.done or (self.attended and not self.reached):
            raise ValueError(self._missed())
        return result

    def _dispatch(self, call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        lifted = _lifted(module)
        if lifted in ("Scan", "Remat_scan"):
            self.scanned.add(module.name)
        if lifted == "Jit" and not self.traced:
            raise ValueError(_around_compiled(f"{module.name!r}, made by nn.jit,"))
        if context.method_name != "__call__" or module.scope is None:
            return call(*args, **kwargs)
        if self.layer is None:
            layer = self._layer_of(module)
            if layer is not None:
                self.reached = True
                return self._block(layer, module, call, args, kwargs)
            self.attended |= isinstance(module, nn.MultiHeadDotProductAttention)
        elif isinstance(module, nn.MultiHeadDotProductAttention):
            return self._attention(module, call, args, kwargs)
        return call(*args, **kwargs)

    def _layer_of(self, module: nn.Module) -> int | None:
        path = "/".join(module.path)
        match = self.pattern.search(path)
        if match:
            scanned = bool(self.scanned.intersection((None, *module.path)))
        else:  # a block's name without its number
            scanned = any(self.pattern.search(path + n) for n in ("_0", "0") if path)
        if scanned:
            raise ValueError(
                f"the encoder is scanned: one module, {path!r}, runs for many layers."
                " Build the model with scan=False and unstack its parameters into one"
                " tree per layer (big_vision: models.vit.scan_to_pyloop)."
            )
        if match is None:
            self.others[path] = None
            return None
        parent = path[: match.start()]
        if self.encoder not in (None, parent):
            raise ValueError(
                f"there are blocks below {self.encoder!r} and below {parent!r}; pass"
                " block= with the path of the encoder that is meant, as in"
                r' block=r"img/Transformer/encoderblock_(\d+)".'
            )
        self.encoder = parent
        return int(match[1])

    def _block(
        self, layer: int, module: nn.Module, call: Callable, args: tuple, kwargs: dict
    ) -> Any:
        """Runs a block with its prompts among the tokens."""
        prompts, weights, deep, _ = self.given
        depth = len(prompts)
        if layer >= depth:
            raise ValueError(
                f"the model has a block {layer} but the prompts have {depth} layers;"
                " pass one array per layer (an empty [0, d] array for none)."
            )
        if layer != self.done:
            raise ValueError(
                f"block {layer} was called where block {self.done} was due; each apply"
                f" must run blocks 0 ... {depth - 1} once, in order."
            )
        if not args:  # by the name of the first parameter after self
            name = list(inspect.signature(type(module).__call__).parameters)[1]
            args, kwargs = (kwargs[name],), {k: kwargs[k] for k in kwargs if k != name}
        x, args = args[0], args[1:]
        if jnp.ndim(x) != 3:
            raise ValueError(
                f"block {layer} was given shape {jnp.shape(x)}; expected tokens"
                " [b, t, d]. Give the model a batch."
            )
        check_prompts(prompts, (x.shape[-1],) * depth, x.shape[0])
        if deep or layer == 0:
            x = insert(x, prompts[layer], FIRST)
        self.layer, self.num_tokens, self.weighted = layer, x.shape[1], False
        try:
            result = call(x, *args, **kwargs)
        finally:
            self.layer = None
        if weights[layer] is not None and not self.weighted:
            raise ValueError(_no_attention(layer))
        tokens = first(result)
        got = getattr(tokens, "shape", type(tokens).__name__)
        if got != x.shape:
            raise ValueError(
                f"block {layer} was given tokens {x.shape} and returned {got}; expected"
                " an array of the same shape, alone or as the first entry of a tuple."
            )
        self.done = (layer + 1) % depth
        self.complete |= self.done == 0
        if deep or self.done == 0:
            tokens = drop(tokens, self._num_prompts(layer), FIRST)
        return (tokens, *result[1:]) if isinstance(result, tuple) else tokens

    def _num_prompts(self, layer: int) -> int:
        return self.given.prompts[layer if self.given.deep else 0].shape[-2]

    def _attention(
        self, module: nn.Module, call: Callable, args: tuple, kwargs: dict
    ) -> Any:
        """Runs a block's attention with the weights of its prompts' keys."""
        assert self.layer is not None
        weight = self.given.weights[self.layer]
        sow = module.is_mutable_collection(ATTENTION) and not module.is_initializing()
        # A subclass that calls super().__call__ comes by twice.
        if self.in_attention or (weight is None and not sow):
            return call(*args, **kwargs)
        attend: Callable = module.attention_fn  # pyright: ignore[reportAttributeAccessIssue]
        weigh = weighted_attention(
            attend,
            weight,
            module if sow else None,
            self.layer,
            self._num_prompts(self.layer),
            self.num_tokens,
        )

        @functools.wraps(attend)
        def weighted(*args: Any, **kwargs: Any) -> Any:
            self.weighted = True
            return weigh(*args, **kwargs)

        # Modules are frozen; this one lives for a single apply and is put back.
        object.__setattr__(module, "attention_fn", weighted)
        self.in_attention = True
        try:
            return call(*args, **kwargs)
        finally:
            self.in_attention = False
            object.__setattr__(module, "attention_fn", attend)

    def finish(self) -> None:
        """Raises ValueError if the model has not run."""
        if not self.complete:
            raise ValueError(self._missed())

    def _missed(self) -> str:
        got = f"only blocks 0 ... {self.done - 1} were" if self.done else "no block was"
        others = ", ".join(path or "(the model)" for path in list(self.others)[:8])
        return (
            f"the prompts have {len(self.given.prompts)} layers but {got} reached, by"
            f" paths that end in {self.pattern.pattern!r}; other modules that ran:"
            f" {others or 'none'}. Of blocks with other names pass block=; run another"
            " transformer outside of the context. Blocks made by nn.jit are traced"
            " once for all layers: build the model without."
        )


def _around_compiled(what: str) -> str:
    return (
        f"{what} is called by a compiled function inside `with prompted`, which would"
        " keep these prompts, or has none. Write `with prompted` inside the function"
        " that jax.jit compiles (jax.lax.map, scan and eval_shape likewise)."
    )
