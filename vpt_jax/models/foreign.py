# SPDX-License-Identifier: Apache-2.0
"""What is changed in a foreign model for as long as it runs with prompts.

Flax's attention gets weights on the prompts among its keys. In NNX, where no
interceptor is told of calls, a block gets a class of its own for that time: Python
looks a call up in the class, and no other module is touched.
"""

import contextlib
import contextvars
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from vpt_jax.models.encoder import drop, with_rows

ATTENTION = "prompt_attention"
"""The variable collection that holds attention weights, if it is mutable."""

_hooks: contextvars.ContextVar[Mapping[int, Callable]] = contextvars.ContextVar(
    "hooks", default=types.MappingProxyType({})
)
FIRST = 1  # Prompts stand after the class token; attention does not see where.


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, an attribute has another value, also that of a frozen module."""
    before = getattr(owner, name)
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        object.__setattr__(owner, name, before)


@contextlib.contextmanager
def hooked(hooks: Sequence[tuple[Any, Callable]]) -> Iterator[None]:
    """Inside, calling one of the NNX modules calls `hook(module, call, args, kwargs)`.

    `call` is what the module's own class does. Raises ValueError for one that has a
    hook already.
    """
    token = _hooks.set({**_hooks.get(), **{id(m): hook for m, hook in hooks}})
    try:
        with contextlib.ExitStack() as stack:
            for module, _ in hooks:
                kind = type(module)
                if hasattr(kind, "_prompted"):
                    raise ValueError(
                        "this model has prompts already, from a `with prompted` around"
                        " this one; expected one context for a model."
                    )
                stack.enter_context(replaced(module, "__class__", _hooked(kind)))
            yield
    finally:
        _hooks.reset(token)


@functools.cache
def _hooked(kind: type) -> type:
    """A class like `kind` whose calls go through the hook of their module."""

    @functools.wraps(kind.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        hook = _hooks.get().get(id(self))
        if hook is None:
            raise ValueError(
                f"a {kind.__name__} was copied inside `with prompted`, by nnx.jit,"
                " nnx.grad, nnx.remat, nnx.split or another thread, and lost its"
                " prompts. Write `with prompted` inside the function that is"
                " transformed, with that function's own model as model=."
            )
        return hook(self, functools.partial(kind.__call__, self), args, kwargs)

    return type(kind)(kind.__name__, (kind,), {"__call__": __call__, "_prompted": True})


def numbered(model: Any, pattern: re.Pattern[str]) -> dict[tuple[str, int], Any]:
    """The blocks of an NNX module, by their parent's path and their number.

    Raises ValueError if there are none; it names the paths that end in numbers.
    """
    from flax import nnx

    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"model is a {type(model).__name__}; expected an NNX module. A Linen module"
            " is found by itself: leave model= out."
        )
    paths = {"/".join(map(str, p)): m for p, m in nnx.iter_modules(model)}
    found: dict[tuple[str, int], Any] = {}
    for path, module in paths.items():
        if match := pattern.search(path):
            place = path[: match.start()], int(match[1])
            if place in found:
                raise ValueError(
                    f"{path!r} and another module are both block {place[1]}; pass"
                    " block= with the path of the encoder that is meant."
                )
            found[place] = module
    if not found:
        numbers = [re.sub(r"(^|[/_])\d+$", r"\1(\\d+)", p) for p in paths]
        known = {p for p in numbers if p.endswith(")")}
        raise ValueError(
            f"the model has no module whose path ends in {pattern.pattern!r}; pass"
            f" block=, one of {', '.join(sorted(known)) or 'none with a number'}."
        )
    return found


def attentions(block: Any) -> list[Any]:
    """The attentions of Flax in an NNX module."""
    from flax import nnx

    found = [module for _, module in nnx.iter_modules(block)]
    return [m for m in found if isinstance(m, nnx.MultiHeadAttention)]


class Among(NamedTuple):
    """The prompts among a block's tokens, for as long as it runs."""

    layer: int
    num: int  # prompts
    num_tokens: int  # the prompts too
    weight: jax.Array | None  # `[b or 1, n]`, or `[b, h, t, n]`; 0 removes a key
    sow_in: Any  # keeps the attention weights, if given

    def sow(self, attention: jax.Array) -> None:
        """Keeps what tokens that are no prompts give to prompts, of `[b, h, t, t]`."""
        received = drop(attention, self.num, FIRST, axis=2)
        received = received[..., FIRST : FIRST + self.num]
        self.sow_in.sow(ATTENTION, str(self.layer), received)


def weighted_attention(attend: Callable, prompts: Among) -> Callable:
    """`attend` with `log weight` added to the prompts' logits.

    Raises ValueError if `attend` takes no bias and mask, or (when it runs) its keys are
    not the block's tokens.
    """
    layer, num, num_tokens, weight, sow_in = prompts
    accepted = inspect.signature(attend).parameters
    if weight is not None and not {"bias", "mask"} <= set(accepted):
        raise ValueError(
            f"the attention_fn of block {layer} takes {tuple(accepted)}; masks and"
            " gates need bias= and mask=, as flax.linen.dot_product_attention has."
        )

    # wraps: the module reads the signature to see what it may pass.
    @functools.wraps(attend)
    def weighted(
        query: Any, key: Any, value: Any, bias: Any = None, mask: Any = None, **rest
    ) -> Any:
        if key.shape[-3] != num_tokens:
            raise ValueError(
                f"an attention of block {layer} has {key.shape[-3]} keys where the"
                f" block has {num_tokens} tokens, so it is not known which are"
                " prompts. (With nested contexts, masks and gates go to the inner.)"
            )
        if weight is not None:
            w = _among_tokens(weight, num, query.shape[-2], num_tokens)
            # Not log 0: its gradient is not finite. Masked weights are exactly 0.
            keep = w > 0
            log = jnp.log(jnp.where(keep, w, jnp.ones((), w.dtype)))
            log = log.astype(query.dtype)
            bias = log if bias is None else bias + log
            mask = keep if mask is None else mask.astype(bool) & keep
        if sow_in is not None:
            given = query, key, bias, mask
            prompts.sow(nn.dot_product_attention_weights(*given, deterministic=True))
        extra = {"bias": bias, "mask": mask}
        extra = {name: x for name, x in extra.items() if x is not None}
        return attend(query, key, value, **extra, **rest)

    return weighted


def weighted_softmax(call: Callable, prompts: Among) -> Callable:
    """A block with the weights of its prompts, where its attention is its own.

    As `weighted_attention`, by the block's jaxpr: the weight multiplies the softmax's
    numerators, the `exp` of an array `[b, h, t, t]`. Returns a function of the tokens:
    the block's result, and whether there was such a softmax.
    """
    _, num, num_tokens, weight, sow_in = prompts

    def weigh(numerators: jax.Array) -> jax.Array:
        if weight is not None:
            w = _among_tokens(weight, num, numerators.shape[1], num_tokens)
            numerators = numerators * w.astype(numerators.dtype)
        if sow_in is not None:
            prompts.sow(numerators / numerators.sum(axis=-1, keepdims=True))
        return numerators

    def evaluate(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        values |= zip(jaxpr.invars, args, strict=True)

        def value(v: Any) -> Any:
            return v.val if isinstance(v, Literal) else values[v]

        for eqn in jaxpr.eqns:
            given, name = list(map(value, eqn.invars)), eqn.primitive.name
            if name in ("jit", "pjit"):
                inner = eqn.params["jaxpr"]
                out = evaluate(inner.jaxpr, inner.consts, given)
            else:
                bound = eqn.primitive.get_bind_params(eqn.params)
                # JAX 0.9 returns functions apart, 0.10 within.
                functions, params = bound if isinstance(bound, tuple) else ((), bound)
                out = eqn.primitive.bind(*functions, *given, **params)
                out = out if eqn.primitive.multiple_results else [out]
            shape = out[0].shape if name == "exp" else ()
            if len(shape) == 4 and shape[2:] == (num_tokens, num_tokens):
                out = [weigh(out[0])]
                found.append(eqn)
            values |= zip(eqn.outvars, out, strict=True)
        return list(map(value, jaxpr.outvars))

    found: list[Any] = []

    def run(x: jax.Array) -> tuple[Any, bool]:
        closed, shapes = jax.make_jaxpr(call, return_shape=True)(x)
        leaves = evaluate(closed.jaxpr, closed.consts, [x])
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves), bool(found)

    return run


def _among_tokens(weight: jax.Array, num: int, heads: int, tokens: int) -> jax.Array:
    """The weights `[b or 1, h or 1, t or 1, t]` of all keys: those of tokens are 1."""
    if weight.ndim == 4:
        if weight.shape[1:3] != (heads, tokens - num):
            raise ValueError(
                f"prompt_gate has shape {weight.shape}; its attention has {heads} heads"
                f" and {tokens - num} tokens besides the prompts. Pass [b, n_i]."
            )
        # What the prompts attend to ends with this block.
        w = with_rows(weight, num, FIRST)
    else:  # for all heads and queries alike
        w = weight[:, None, None, :]
    own = jnp.ones((*w.shape[:-1], tokens - num), w.dtype)
    return jnp.concatenate([own[..., :FIRST], w, own[..., FIRST:]], axis=-1)
