# SPDX-License-Identifier: Apache-2.0
"""What happens to the blocks of a foreign model while it runs with prompts.

`Run` is told of every call of a module (Linen, by an interceptor) or of every call of a
block (NNX, by the class that the block has for so long), puts the block's prompts among
its tokens, takes them out after it, and knows whether all blocks were reached.
"""

import contextlib
import dataclasses
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer

from vpt_jax.models.encoder import drop, insert
from vpt_jax.models.foreign import (
    ATTENTION,
    FIRST,
    Among,
    attentions,
    hooked,
    numbered,
    replaced,
    weighted_attention,
    weighted_softmax,
)
from vpt_jax.models.inputs import Inputs, check_prompts

BLOCK = r"encoderblock_(\d+)"
"""How vit_jax, big_vision and scenic name their encoder blocks."""


def first(result: Any) -> Any:
    """The result itself, or the first entry of a tuple such as big_vision's."""
    return result[0] if isinstance(result, tuple) else result


def no_attention(layer: int) -> str:
    """What to say of a block whose attention is not Flax's."""
    return (
        f"block {layer} called no flax.linen.MultiHeadDotProductAttention; expected one"
        " (in NNX a flax.nnx.MultiHeadAttention or a softmax over [b, h, t, t]) for"
        " masks, gates and attention weights. With another attention, use `with"
        " prompted(prompts)` and condensed prompts."
    )


def compiled(block: str) -> re.Pattern[str]:
    """The pattern of a block's path; ValueError unless it has one group."""
    pattern = re.compile(rf"(?:^|/)(?:{block})$")
    if pattern.groups != 1:
        raise ValueError(
            f"block={block!r} has {pattern.groups} groups; expected one, around the"
            f" layer's number, as in {BLOCK!r}."
        )
    return pattern


def under_jit() -> bool:
    """Whether new arrays are tracers: in jit, scan or remat, not in grad or vmap."""
    return isinstance(jnp.zeros(()), Tracer)


def _lifted(module: nn.Module) -> str:
    """`"Scan"` for a module of a class made by `nn.scan`, `"Jit"` by `nn.jit`, ..."""
    kind = type(module)
    return kind.__name__.rpartition(kind.__bases__[0].__name__)[0]


@dataclasses.dataclass(eq=False)
class Run:
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
    # Attention weights by layer, of an NNX model that is asked for them.
    received: dict[int, list[jax.Array]] | None = None

    def intercept(self, call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        """The interceptor: `call` is the rest of the way to the module's method."""
        if self.running:
            return self._dispatch(call, args, kwargs, context)
        if not self.traced and under_jit():
            raise ValueError(around_compiled("The model"))
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
            raise ValueError(around_compiled(f"{module.name!r}, made by nn.jit,"))
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
        self.encoder = one_encoder(self.encoder, path[: match.start()])
        return int(match[1])

    @contextlib.contextmanager
    def within(self, model: Any) -> Iterator[None]:
        """Inside, the blocks of an NNX module run with prompts."""
        blocks = numbered(model, self.pattern)
        for parent, _ in blocks:
            self.encoder = one_encoder(self.encoder, parent)
        hooks = [
            (module, functools.partial(self._nnx_block, layer))
            for (_, layer), module in blocks.items()
        ]
        with hooked(hooks):
            yield

    def _nnx_block(
        self, layer: int, module: Any, call: Callable, args: tuple, kwargs: dict
    ) -> Any:
        if not self.traced and under_jit():
            raise ValueError(around_compiled("The model"))
        found = self.received
        sow = None
        if found is not None:
            sow = types.SimpleNamespace(
                sow=lambda _, i, weights: found.setdefault(int(i), []).append(weights)
            )
        weights = self.given.weights
        with contextlib.ExitStack() as stack:
            if sow or (layer < len(weights) and weights[layer] is not None):
                own = attentions(module)
                for attention in own:
                    weigh = self._weighing(attention.attention_fn, layer, sow)
                    stack.enter_context(replaced(attention, "attention_fn", weigh))
                if not own:
                    call = functools.partial(self._by_softmax, layer, sow, call)
            return self._block(layer, module, call, args, kwargs)

    def _by_softmax(
        self, layer: int, sow: Any, call: Callable, x: jax.Array, *args: Any, **kw: Any
    ) -> Any:
        """Runs a block, whose attention is its own, with the weights of its prompts."""
        block = weighted_softmax(
            lambda x: call(x, *args, **kw), self._prompts(layer, sow)
        )
        result, self.weighted = block(x)
        return result

    def _block(
        self, layer: int, module: Any, call: Callable, args: tuple, kwargs: dict
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
            raise ValueError(no_attention(layer))
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

    def _prompts(self, layer: int, sow_in: Any) -> Among:
        num, weight = self._num_prompts(layer), self.given.weights[layer]
        return Among(layer, num, self.num_tokens, weight, sow_in)

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
        weigh = self._weighing(attend, self.layer, module if sow else None)
        self.in_attention = True
        try:
            # Modules are frozen; this one lives for a single apply and is put back.
            with replaced(module, "attention_fn", weigh):
                return call(*args, **kwargs)
        finally:
            self.in_attention = False

    def _weighing(self, attend: Callable, layer: int, sow: Any) -> Callable:
        """`attend` with the weights of the layer's prompts: `weighted_attention`."""

        @functools.wraps(attend)
        def weighted(*args: Any, **kwargs: Any) -> Any:
            self.weighted = True
            weigh = weighted_attention(attend, self._prompts(layer, sow))
            return weigh(*args, **kwargs)

        return weighted

    def finish(self) -> None:
        """Raises ValueError if the model has not run."""
        if self.done or not self.complete:
            raise ValueError(self._missed())

    def _missed(self) -> str:
        got = f"only blocks 0 ... {self.done - 1} were" if self.done else "no block was"
        others = ", ".join(path or "(the model)" for path in list(self.others)[:8])
        return (
            f"the prompts have {len(self.given.prompts)} layers but {got} reached, by"
            f" paths that end in {self.pattern.pattern!r}; other modules that ran:"
            f" {others or 'none'}. Of blocks with other names pass block=; run another"
            " transformer outside of the context; pass an NNX module as model=. Blocks"
            " made by nn.jit are traced once for all layers: build the model without."
        )


def one_encoder(known: str | None, parent: str) -> str:
    """The path of the blocks' parent, of which there must be one."""
    if known not in (None, parent):
        raise ValueError(
            f"there are blocks below {known!r} and below {parent!r}; pass block= with"
            " the path of the encoder that is meant, as in"
            r' block=r"img/Transformer/encoderblock_(\d+)".'
        )
    return parent


def around_compiled(what: str) -> str:
    """What to say of a context that stands around a compiled function."""
    return (
        f"{what} is called by a compiled function inside `with prompted`, which would"
        " keep these prompts, or has none. Write `with prompted` inside the function"
        " that jax.jit compiles (jax.lax.map, scan and eval_shape likewise)."
    )
