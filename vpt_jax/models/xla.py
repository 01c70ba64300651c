# SPDX-License-Identifier: Apache-2.0
"""What makes compiled programs smaller or faster, and changes no number.

Nobody who reads the model has to read this: each function here says which formula it
is. What each is worth is measured in docs/performance.md.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

# What the backward pass finds in memory; the rest it computes once more.
REMATS: dict[str, Any] = {
    "none": None,
    # Outputs of projections and MLP; attention weights are the largest of the rest.
    "attention": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,  # only the inputs of blocks
}


def remat(call: Any, name: str) -> Any:
    """`call(block, ...)`, of which the backward pass keeps what `name` says."""
    return call if name == "none" else nn.remat(call, policy=REMATS[name])


@jax.checkpoint
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, of which a backward pass keeps `x` alone."""
    return 0.5 * x * (1 + lax.erf(x * 0.5**0.5))


@jax.checkpoint
def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU's approximation by tanh: `flax.linen.gelu`'s default, PyTorch's `"tanh"`."""
    return jax.nn.gelu(x, approximate=True)


@jax.checkpoint
def quick_gelu(x: jax.Array) -> jax.Array:
    """`x * sigmoid(1.702 x)`, as in OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu}


@jax.checkpoint
def swiglu(x: jax.Array) -> jax.Array:
    """`silu(gate) * up` of the halves of `x [..., 2 f]`, gate first, as `[..., f]`."""
    gate, up = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gate) * up


@jax.custom_jvp
def weighted_exp(weight: jax.Array, x: jax.Array) -> jax.Array:
    """`weight * exp(x)` with `weight >= 0`, and `x <= 0` where it is positive.

    Where the weight is 0, `x` may be large: no `inf * 0`. The derivative by `x` is the
    result itself, so that a mask, by which nothing is differentiated, costs a backward
    pass no more memory than no mask (of ViT-B/16, batch 8, 0.9 GB).
    """
    return weight * jnp.exp(jnp.minimum(x, 80.0))


@functools.partial(weighted_exp.defjvp, symbolic_zeros=True)
def _weighted_exp_jvp(primals: Any, tangents: Any) -> Any:
    (weight, x), (dweight, dx) = primals, tangents
    y = weighted_exp(weight, x)
    dy = jnp.zeros_like(y)
    if not isinstance(dx, SymbolicZero):
        dy = dy + y * dx
    if not isinstance(dweight, SymbolicZero):
        dy = dy + dweight * jnp.exp(jnp.minimum(x, 80.0))
    return y, dy


def blocks(q: jax.Array, k: jax.Array) -> int:
    """Into how many blocks a CPU splits the queries `[b, h, q, c]`.

    XLA's CPU code (jaxlib 0.10) multiplies, normalises and multiplies again head by
    head without writing the weights to memory, as long as those of one head are at most
    256 KB and all results at least 1 MB.
    """
    b, h, queries, c = q.shape
    num = -(-queries * k.shape[2] // 2**16)
    b = b if isinstance(b, int) else 1  # of jax.export: not known yet
    return num if b * h * (queries // num) * c >= 2**18 else 1


def in_blocks(attend: Callable[..., Any]) -> Callable[..., Any]:
    """`attend(q, k, v, key_weight)` where a CPU may take its queries in `blocks`.

    It does where nothing is differentiated: a backward pass needs all weights in
    memory, so that blocks would only copy them.
    """

    def by_block(q: jax.Array, k: jax.Array, v: jax.Array, w: jax.Array | None) -> Any:
        num = blocks(q, k)
        own = [w] * num
        if w is not None and w.ndim == 4:
            own = jnp.array_split(w, num, axis=2)
        queries = jnp.array_split(q, num, axis=2)
        parts = [attend(q, k, v, w) for q, w in zip(queries, own, strict=True)]
        return tuple(jnp.concatenate(part, axis=2) for part in zip(*parts, strict=True))

    @jax.custom_jvp
    def forward(*given: Any) -> Any:
        return lax.platform_dependent(*given, cpu=by_block, default=attend)

    @functools.partial(forward.defjvp, symbolic_zeros=True)
    def _jvp(primals: Any, tangents: Any) -> Any:
        values, tree = jax.tree.flatten(primals)
        moves = jax.tree.leaves(tangents)
        moved = [i for i, t in enumerate(moves) if not isinstance(t, SymbolicZero)]

        def at_once(*some: jax.Array) -> Any:
            given = dict(enumerate(values)) | dict(zip(moved, some, strict=True))
            return attend(*jax.tree.unflatten(tree, given.values()))

        return jax.jvp(at_once, [values[i] for i in moved], [moves[i] for i in moved])

    @functools.wraps(attend)
    def either(
        q: jax.Array, k: jax.Array, v: jax.Array, key_weight: jax.Array | None
    ) -> Any:
        run = attend if blocks(q, k) == 1 else forward
        return run(q, k, v, key_weight)

    return either
