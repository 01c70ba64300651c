# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of the project: prompts, counts, head.

`Prompts` is a plain tuple with one `[n_i, d]` array per layer; `n_i` may differ
from layer to layer and may be 0. No module owns prompts: they are an argument of
the model, so `jax.grad` with respect to `{'prompts', 'head'}` never sees the frozen
backbone. Visual Prompt Tuning: Jia et al., ECCV 2022, arXiv 2203.12119.
"""

import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from vpt_jax.files.checks import (
    BATCH,
    check_head,
    check_integer,
    check_key,
    check_keys,
    check_labels,
    check_layers,
    check_model,
    check_shallow,
    expect,
    is_array,
    said,
)
from vpt_jax.files.messages import did_you_mean, shown

Prompts = PyTree[Float[Array, "_ _"]]
"""One `[n_i, d]` array per layer (a tuple), `n_i >= 0`; in Swin `d` grows."""

Importance = PyTree[Float[Array, "_"]]
"""One `[n_i]` array per layer (a tuple); larger means more important."""

Mask = PyTree[Bool[Array, "_"]]
"""One boolean `[n_i]` array per layer (a tuple); True means keep / attend."""

INITS = ("reference", "normal", "tokens", "kmeans")
"""How `init_prompts` draws prompts."""

Head = dict[str, jax.Array]
"""The linear classifier: `kernel` `[d, k]` and `bias` `[k]`."""


def counts(prompts: Sequence[Any]) -> tuple[int, ...]:
    """How many prompts each layer has: static, hashable, printable.

    Args:
      prompts: One array per layer whose last axis but one is the prompt axis
        (`[n_i, d]` or `[b, n_i, d]`).

    Example:
      >>> counts((jnp.zeros((3, 8)), jnp.zeros((0, 8))))
      (3, 0)
    """
    check_layers("prompts", prompts, 2, 3, shape="[n_i, d]")
    return tuple(int(p.shape[-2]) for p in prompts)


def init_prompts(
    key: jax.Array,
    model: Any,
    num_prompts: int | Sequence[int] = 50,
    *,
    deep: bool = True,
    init: str = "reference",
    tokens: Sequence[Any] | None = None,
    dtype: Any = jnp.float32,
) -> Prompts:
    """Draws prompts.

    `init="reference"`: uniform in `(-v, v)`, `v = sqrt(6 / (3 * patch**2 + d))`, the
    Xavier bound of the patch embedding (VPT's released code; 0.0625 for ViT-B/16). `d`
    is the width of the first layer for all layers, wider Swin stages included (0.18464
    for Swin-B). `"normal"`: deviation 0.02. `"tokens"`: tokens that enter the layer's
    block on training pictures, drawn at random; `"kmeans"`: their k-means centres (SPT,
    Wang et al., ICML 2024, section 3).

    Args:
      key: A JAX random key.
      model: The model that will take the prompts; `widths` (one per layer) and
        `patch` are read from it.
      num_prompts: Prompts per layer: one number for all layers, or one per layer.
        With `deep=False` a single number is the count of the first layer.
      deep: True gives every layer its own prompts (VPT-Deep), False only the first
        (VPT-Shallow: the other layers get empty `[0, d]` arrays).
      init: One of `INITS`.
      tokens: For "tokens" and "kmeans": one `[m_i, d]` array per layer, `m_i >= n_i`,
        as `block_tokens` returns.
      dtype: Of the prompts. Keep the master copy in float32.

    Returns:
      A tuple with one `[n_i, d]` array per layer.

    Raises:
      ValueError: If a count is negative or no integer, their number is not the model's
        depth, a shallow model is given prompts in a later layer, `init` is unknown, or
        tokens are missing, too few or of another width.

    Example:
      >>> from vpt_jax import ViT
      >>> model = ViT("demo/4")
      >>> counts(init_prompts(jax.random.key(0), model, 2, init="normal"))
      (2, 2, 2, 2, 2, 2)
    """
    check_choice("init", init, INITS)
    check_key(key)
    check_model(model, "widths", "patch")
    given: Any = num_prompts
    depth = len(model.widths)
    if np.ndim(given) == 0:
        n = check_integer("num_prompts", given, 0)
        given = (n,) * depth if deep else (n,) + (0,) * (depth - 1)
    num = check_counts("num_prompts", given, depth, deep)
    shapes = list(zip(num, model.widths, strict=True))
    keys = jax.random.split(key, depth)
    if init == "reference":
        bound = math.sqrt(6 / (3 * model.patch**2 + model.widths[0]))
        draw = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
        return tuple(draw(*of, dtype=dtype) for of in zip(keys, shapes, strict=True))
    if init == "normal":
        pairs = zip(keys, shapes, strict=True)
        return tuple(0.02 * jax.random.normal(*of, dtype) for of in pairs)
    found = tuple(map(np.asarray, tokens or ()))
    got = [t.shape for t in found]
    if [s[1:] for s in got] != [(d,) for _, d in shapes] or any(
        len(t) < n for t, (n, _) in zip(found, shapes, strict=True)
    ):
        raise ValueError(
            f"init {init!r} got tokens of shapes {got}; expected at least {shapes}."
            " Pass tokens=block_tokens(model, backbone, images)."
        )
    choose = _centres if init == "kmeans" else _some
    seeds = np.asarray(jax.random.key_data(keys))
    return tuple(
        jnp.asarray(choose(np.random.default_rng(seed), t, n), dtype)
        for seed, t, n in zip(seeds, found, num, strict=True)
    )


def _some(rng: np.random.Generator, tokens: np.ndarray, num: int) -> np.ndarray:
    """`num` different rows of `tokens [m, d]`."""
    return tokens[rng.permutation(len(tokens))[:num]]


def _centres(rng: np.random.Generator, tokens: np.ndarray, num: int) -> np.ndarray:
    """`num` k-means centres of `tokens [m, d]`."""
    from scipy.cluster.vq import kmeans2  # takes a third of a second

    if not num:
        return tokens[:0]
    start = _some(rng, tokens, num)
    with warnings.catch_warnings():  # a centre that lost all its tokens stays
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        return kmeans2(tokens, start, iter=20, minit="matrix", missing="warn")[0]


def per_example(x: jax.Array, like: jax.Array) -> jax.Array:
    """What all examples of a batch share, `x [...]` or `[1, ...]`, as `[b, ...]`.

    A product with ones, whose derivative, the sum over the batch, is a product too:
    XLA's CPU code takes 0.5 ms for that where a sum of `[8, 12, 100, 64]` over its
    first axis takes 7. Ones like `like [b, ...]` keep its sharding over a mesh. If `x`
    has the rank of `like` and `b` entries, those are returned.
    """
    own = x.ndim == like.ndim and x.shape[0] == like.shape[0]
    if x.ndim == like.ndim and not own:
        x = x[0]
    if not x.size:
        return x if own else jnp.zeros((like.shape[0], *x.shape), x.dtype)
    ones = jnp.ones_like(like[(slice(None), *(0,) * (like.ndim - 1))], x.dtype)
    if own:  # plus zeros that are split over the mesh as `like` is
        return x + jnp.expand_dims(jnp.zeros_like(ones), range(1, x.ndim))
    return jnp.einsum("b,...->b...", ones, x, precision=jax.lax.Precision.HIGHEST)


def prompt_dropout(
    key: jax.Array, prompts: Prompts, rate: float, batch_size: int | None
) -> PyTree[Float[Array, "*b _ _"]]:
    """Drops prompt elements independently, for every example of a batch or for all.

    The reference drops after expanding the prompts to the batch, so each example
    has its own mask; kept elements are scaled by `1 / (1 - rate)`. With one mask for
    the whole batch the expectation is the same, and keys and values of the prompts are
    computed once per step instead of once per example: 6.8 % less work in a training
    step of ViT-B/16 with 100 prompts (`benchmarks/shared_dropout.py`).

    Args:
      key: A JAX random key; prompt `j` of layer `i` uses
        `fold_in(fold_in(key, i), j)`, so that what it drops does not depend on how many
        others there are.
      prompts: One `[n_i, d]` array per layer.
      rate: Probability of dropping an element, in `[0, 1)`. The reference uses 0.1
        for deep prompts and 0 for shallow ones.
      batch_size: Number of examples `b`; None draws one mask for all of them.

    Returns:
      One `[b, n_i, d]` array per layer (`[n_i, d]` without a batch size), which the
      model takes in place of prompts.

    Raises:
      ValueError: If the rate is not in `[0, 1)`, or the prompts are not `[n_i, d]`.

    Example:
      >>> dropped = prompt_dropout(jax.random.key(0), prompts, 0.1, 4)
      >>> dropped[0].shape
      (4, 2, 128)
    """
    check_layers("prompts", prompts, 2, shape="[n_i, d]")
    if not 0 <= rate < 1:
        raise ValueError(f"dropout rate is {rate}; it must be in [0, 1).")
    batch = () if batch_size is None else (batch_size,)
    keep = _draw(key, prompts, 1 - rate, batch)

    def drop(p: jax.Array, keep: jax.Array) -> jax.Array:
        p = p / (1 - rate)
        p = per_example(p, keep) if batch else p
        return jnp.where(keep, p, jnp.zeros((), p.dtype))

    return tuple(map(drop, prompts, keep))


def _draw(
    key: jax.Array, prompts: Prompts, rate: float, batch: tuple[int, ...]
) -> list[jax.Array]:
    """Which elements are kept, with probability `rate`: bool `[*batch, n_i, d]`.

    All layers of one width are drawn by one piece of code, whatever their counts. Layer
    by layer, a training step of ViT-B/16 with twelve different counts took 5.9 s to
    compile instead of 3.4, where equal ones take 2.5.
    """
    num, widths = counts(prompts), [p.shape[1] for p in prompts]
    keep = [jnp.zeros((*batch, *p.shape), bool) for p in prompts]
    for width in sorted({w for n, w in zip(num, widths, strict=True) if n}):
        layers = [i for i, w in enumerate(widths) if w == width]
        places = [(i, j) for i in layers for j in range(num[i])]
        keys = jax.vmap(
            lambda at: jax.random.fold_in(jax.random.fold_in(key, at[0]), at[1])
        )(np.array(places, np.uint32))
        draw = functools.partial(jax.random.bernoulli, p=rate, shape=(*batch, width))
        # On a CPU so many prompts at a time that its caches hold the random numbers.
        on_cpu = functools.partial(jax.lax.map, draw, batch_size=64)
        rows = jax.lax.platform_dependent(keys, cpu=on_cpu, default=jax.vmap(draw))
        ends = np.cumsum([num[i] for i in layers])
        for i, own in zip(layers, jnp.split(rows, ends[:-1]), strict=True):
            keep[i] = jnp.moveaxis(own, 0, -2)
    return keep


def init_head(
    key: jax.Array,
    width: int,
    num_classes: int,
    dtype: Any = jnp.float32,
    *,
    init: str = "reference",
) -> Head:
    """Makes the linear head.

    `init="reference"`: kernel Kaiming normal with fan_out, i.e. `std = sqrt(2 /
    num_classes)`; bias `-log(99)`, a prior probability of 0.01 (VPT's released code,
    `models/mlp.py`). Features of norm 40 then start at a loss far above `log
    num_classes`. `"zeros"` starts at `log num_classes` whatever the features' scale.

    Returns:
      `{'kernel': [width, num_classes], 'bias': [num_classes]}`.

    Raises:
      ValueError: If `num_classes` is below 2 or the width below 1, or no integer, or
        `init` unknown.

    Example:
      >>> head = init_head(jax.random.key(0), 128, 10, init="zeros")
      >>> head["kernel"].shape, head["bias"].shape
      ((128, 10), (10,))
    """
    check_choice("init", init, ("reference", "zeros"))
    check_key(key)
    width = check_integer("width", width, 1)
    num_classes = check_integer("num_classes", num_classes, 2)
    if init == "zeros":
        kernel = jnp.zeros((width, num_classes), dtype)
        return {"kernel": kernel, "bias": jnp.zeros(num_classes, dtype)}
    kernel = jax.random.normal(key, (width, num_classes), dtype)
    bias = jnp.full((num_classes,), -math.log(99), dtype)
    return {"kernel": math.sqrt(2 / num_classes) * kernel, "bias": bias}


def apply_head(head: Head, features: Float[Array, "b d"]) -> Float[Array, "b k"]:
    """Logits `features @ kernel + bias`, `[b, k]`, in the head's dtype (float32).

    Raises:
      ValueError: If the head is none, or of another width than the features.

    Example:
      >>> features, _ = model.apply({"params": backbone}, images, prompts=prompts)
      >>> apply_head(head, features).shape
      (4, 10)
    """
    check_head(head)
    kernel, bias = head["kernel"], head["bias"]
    if not is_array(features) or features.shape[-1:] != kernel.shape[:1]:
        raise ValueError(
            f"features are {said(features)}; expected [b, {kernel.shape[0]}], the first"
            " result of model.apply, for a head of that width."
        )
    return features.astype(kernel.dtype) @ kernel + bias[None]


def check_counts(name: str, given: Any, depth: int, deep: bool) -> tuple[int, ...]:
    """Prompts per layer; raises ValueError unless they fit a model of this depth."""
    several = isinstance(given, Iterable) and not isinstance(given, str)
    expect(several, name, given, "one number per layer, as vpt_jax.counts gives")
    num = tuple(check_integer("a count", n, 0) for n in given)
    if len(num) != depth:
        raise ValueError(
            f"{name} has {len(num)} entries but the model has depth {depth}; pass one"
            " number per layer (0 for none)."
        )
    if not deep:
        check_shallow(num)
    return num


def check_choice(name: str, value: Any, known: Sequence[Any]) -> None:
    """Raises ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(
            f"unknown {name} {shown(value)}; {did_you_mean(value, known)}choose one of"
            f" {', '.join(map(repr, known))}."
        )


def cross_entropy(logits: jax.Array, batch: dict[str, Any]) -> jax.Array:
    """Softmax cross entropy `[b]` of `logits [b, k]` against `batch["label"] [b]`.

    A label that is no class is an error; under jit, where its value is not known, its
    loss and gradient are NaN. Of examples whose `batch["mask"]` is False, if there is
    one, labels are not looked at: the loss is some finite number.

    Raises:
      ValueError: If a label is outside `[0, k)`, or they are not `[b]` integers.

    Example:
      >>> logits = jnp.log(jnp.array([[0.25, 0.75]]))
      >>> round(float(cross_entropy(logits, {"label": jnp.array([0])})[0]), 4)
      1.3863
    """
    if not is_array(logits) or logits.ndim != 2:
        raise ValueError(f"logits are {said(logits)}; expected an array [b, k].")
    check_keys("batch", batch, {"label": BATCH["label"]})
    (b, k), label, mask = logits.shape, batch["label"], batch.get("mask")
    check_labels(label, k, b, mask)
    label = jnp.asarray(label).astype(jnp.int32)
    if mask is not None:
        label = jnp.where(mask, label, 0)
    known = (label >= 0) & (label < k)
    log_p = jax.nn.log_softmax(logits)
    index = jnp.where(known, label, 0)[:, None]
    # A product: through `where` alone the gradient would be a silent 0.
    sign = jnp.where(known, -1.0, jnp.nan).astype(log_p.dtype)
    return sign * jnp.take_along_axis(log_p, index, axis=1)[:, 0]
