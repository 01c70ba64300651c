# SPDX-License-Identifier: Apache-2.0
"""Prompt Condensation: score every prompt, keep the best, remove the others.

Kim et al., "Do We Really Need a Large Number of Visual Prompts?", arXiv 2305.17223. A
mask given to the model (`prompt_mask=`) and a condensed set of prompts are the same
network. Removing a prompt is an attention weight of 0 for its key, not a product with
0: LayerNorm makes its bias of a zero prompt, and that key keeps its share of the
softmax. So prompts are scored by the gradient with respect to a gate on the key.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from vpt_jax import parallel
from vpt_jax.files import checks
from vpt_jax.models.inputs import check_normalised
from vpt_jax.models.scores import (
    DEFAULT_REDUCTION,
    DEFAULT_SCORE,
    REDUCTIONS,
    SCORES,
    Score,
    example_values,
)
from vpt_jax.prompts import (
    Importance,
    Mask,
    Prompts,
    apply_head,
    check_choice,
    counts,
    cross_entropy,
)

SCOPES = ("global", "layer")
Batch = dict[str, Any]


def importance(
    model: Any,
    backbone: Any,
    trainable: dict[str, Any],
    batches: Iterable[Batch],
    *,
    score: str | Score = DEFAULT_SCORE,
    reduction: str | None = None,
    deep: bool = True,
    prompt_mask: Mask | None = None,
    loss_fn: Callable[[jax.Array, Batch], jax.Array] = cross_entropy,
    key: jax.Array | None = None,
    progress: Callable[[int], None] | None = None,
) -> Importance:
    """Scores every prompt; larger means more important.

    One backward pass per batch gives every example's own gradient, because the gates
    (or prompts) get a batch axis and the summed loss is differentiated. With `L` an
    example's loss, the value of prompt `j` for that example is

    =============== ==================================================================
    `removal`       the loss change on removal, exact in the softmax and first order
                    behind it: `key_gate` by head and query, divided by one minus the
                    attention that the prompt has there (see `example_values`). Default.
    `key_gate`      `-dL/dg_j`, `g_j = 1` a gate on key `j`'s softmax numerator: the
                    first-order estimate of the loss change on removal.
    `signed`        `key_gate` with its sign kept (`reduction` is `"mean"`).
    `taylor`        `-<p_j, dL/dp_j>`, the literal gate on the token. For deep prompts
                    it is degenerate: LayerNorm does not change when `p` is scaled.
    `grad_norm`     `|dL/dp_j|`.
    `attention`     mean attention weight that computed tokens give to the prompt.
    `leave_one_out` exact: the loss without prompt `j` minus the loss with it. Costs a
                    forward pass per prompt and batch.
    `l2_norm`       `|p_j|` (no data).
    `random`        uniform numbers (no data), the control.
    =============== ==================================================================

    Args:
      model: A model of this package.
      backbone: Its frozen parameters.
      trainable: `{'prompts', 'head'}`.
      batches: Any iterable of dicts with `image` `[b, s, s, 3]` (normalised), `label`
        `[b]` in `[0, k)`, and optionally `mask` `[b]` (False: padding, does not count);
        read once. A smaller last batch is padded, so nothing recompiles.
      score: See above; or a function of your own, `Score`.
      reduction: Over examples: `"mean_abs"`, `"abs_mean"`, `"mean_square"`, `"mean"`,
        or `"second_order"`, the mean of `x + x**2 / 2`: with `removal` it estimates
        the mean change of the loss (`leave_one_out`), as the mean square of
        log-likelihoods' derivatives is their Fisher information. None takes the
        score's own: `mean_abs` for `removal`, `key_gate` and `taylor` (gradients
        average to about 0 after training, their sizes do not), else `mean`.
      deep: As the model is run.
      prompt_mask: Scores are taken with these prompts removed; those score `-inf`.
      loss_fn: `(logits [b, k], batch) -> [b]`, which may read other labels. The same
        object at every call (a module's function), or every call compiles again.
      key: A JAX random key, needed by `random`.
      progress: Called with the number of finished batches after each.

    Returns:
      One float32 `[n_i]` array per layer.

    Raises:
      ValueError: For an unknown score or reduction, a missing key, no batches, a label
        that is no class, a score that is not finite, or something that does not fit.

    Example:
      >>> batches = [{"image": images, "label": labels}]  # or any generator of them
      >>> scores = importance(model, backbone, trainable, batches)
      >>> len(scores), scores[0].shape
      (6, (2,))
    """
    if not callable(score):
        check_choice("score", score, SCORES)
    checks.check_keys("trainable", trainable, checks.TRAINABLE)
    checks.check_head(trainable["head"])
    prompts = trainable["prompts"]
    if prompt_mask is not None:
        checks.check_mask(prompt_mask, counts(prompts))
    if score in ("l2_norm", "random"):
        if reduction is not None:
            raise ValueError(f"score {score!r} reads no examples; drop reduction=.")
        if score == "l2_norm":
            key = None
        elif key is None:
            raise ValueError("score 'random' needs key=, a jax.random.key.")
        return _without_masked(_without_data(prompts, key), prompt_mask)
    reduction = reduction or ("mean" if callable(score) else DEFAULT_REDUCTION[score])
    check_choice("reduction", reduction, tuple(REDUCTIONS))
    if score == "signed" and reduction != "mean":
        raise ValueError(
            f"score 'signed' is key_gate with reduction 'mean'; got {reduction!r}."
        )
    checks.check_model(model, "apply")
    checks.check_backbone(backbone)
    totals = [np.zeros(n, np.float64) for n in counts(prompts)]
    examples, num_classes = 0.0, trainable["head"]["bias"].shape[0]
    values_of = functools.partial(
        _batch_values, model=model, score=score, reduction=reduction, deep=deep
    )
    for done, batch in enumerate(_padded(batches, num_classes, loss_fn), start=1):
        values = values_of(backbone, trainable, batch, prompt_mask, loss_fn=loss_fn)
        examples += float(np.sum(batch["mask"]))
        # In the examples' order and in float64: how many devices there are must not
        # decide between two prompts.
        for total, v in zip(totals, values, strict=True):
            total += np.asarray(v, np.float64).sum(axis=0)
        if progress is not None:
            progress(done)
    if not examples:
        raise ValueError("batches held no examples; pass at least one batch.")
    after = REDUCTIONS[reduction][1]
    scores = tuple(after(t / examples).astype(np.float32) for t in totals)
    if not all(np.isfinite(s).all() for s in scores):
        raise ValueError(
            f"score {score!r} is not finite: some example's loss overflows; check the"
            " prompts (diverged training?), the images' normalisation and the labels."
        )
    return _without_masked(tuple(map(jnp.asarray, scores)), prompt_mask)


def _without_data(prompts: Prompts, key: jax.Array | None) -> Importance:
    """Uniform numbers, or without a key the prompts' norms."""
    if key is None:
        return tuple(jnp.linalg.norm(p.astype(jnp.float32), axis=-1) for p in prompts)
    return tuple(
        jax.random.uniform(jax.random.fold_in(key, i), (n,))
        for i, n in enumerate(counts(prompts))
    )


def _without_masked(scores: Importance, prompt_mask: Mask | None) -> Importance:
    if prompt_mask is None:
        return scores
    pairs = zip(prompt_mask, scores, strict=True)
    return tuple(jnp.where(m, s, -jnp.inf) for m, s in pairs)


def _padded(
    batches: Iterable[Batch], num_classes: int, loss_fn: Callable
) -> Iterator[Batch]:
    """The batches, checked, all of the first one's size."""
    several = isinstance(batches, Iterable) and not isinstance(batches, Mapping)
    expected = "an iterable of batches: for one, pass [batch]"
    checks.expect(several, "batches", batches, expected)
    size = None
    for batch in batches:
        if loss_fn is cross_entropy:
            checks.check_batch(batch, num_classes)
            # What else there is, names of files perhaps, is nothing to compute with.
            batch = {k: batch[k] for k in (*checks.BATCH, "mask") if k in batch}
        else:  # labels of another kind, or none
            checks.check_batch(batch, None)
        check_normalised(batch["image"], wait=size is None)
        size = size or len(batch["image"])
        yield parallel.pad_batch(batch, size)


@functools.partial(
    jax.jit, static_argnames=("model", "score", "reduction", "deep", "loss_fn")
)
def _batch_values(
    backbone: Any,
    trainable: dict[str, Any],
    batch: Batch,
    prompt_mask: Mask | None,
    *,
    model: Any,
    score: str | Score,
    reduction: str,
    deep: bool,
    loss_fn: Callable,
) -> tuple[jax.Array, ...]:
    """One batch's per-example values, `[b, n_i]` per layer; 0 where it is padding."""
    batch = parallel.spread(batch)

    def losses(prompts: Any, **kwargs: Any) -> tuple[jax.Array, dict[str, Any]]:
        features, out = model.apply(
            {"params": backbone},
            batch["image"],
            prompts=prompts,
            deep=deep,
            **{"prompt_mask": prompt_mask, **kwargs},
        )
        logits = apply_head(trainable["head"], features)
        # where, not a product: a padded example's NaN must not spread.
        return jnp.where(batch["mask"], loss_fn(logits, batch), 0.0), out

    values = example_values(score, losses, trainable["prompts"], prompt_mask, deep)
    before = REDUCTIONS[reduction][0]
    counted = batch["mask"][:, None]
    return parallel.whole(tuple(jnp.where(counted, before(v), 0.0) for v in values))


def keep_mask(
    scores: Importance,
    *,
    keep_ratio: float | None = None,
    keep: int | None = None,
    scope: str = "global",
) -> Mask:
    """Selects the most important prompts. Pure and jittable (static ratio and scope).

    Ties are broken by position: the earlier layer, then the earlier prompt, is kept.
    NaN ranks last.

    Args:
      scores: One `[n_i]` array per layer, larger is kept first.
      keep_ratio: Share of prompts to keep, in `(0, 1]`; the number is rounded half up.
      keep: Or how many: in all (`"global"`) or in each layer (`"layer"`), at least 1
        and at most as many as there are. Exactly one of the two is given.
      scope: `"global"` ranks all layers together, so that a layer may keep none;
        `"layer"` keeps the same share of every layer, and at least one prompt of each
        layer that has any.

    Returns:
      One boolean `[n_i]` array per layer, True = keep. At least one is True.

    Raises:
      ValueError: If the ratio or number is out of range, both or neither are given, the
        scope is unknown, there are no prompts, or the scores are none.

    Example:
      >>> mask = keep_mask((jnp.array([3.0, 1.0]), jnp.array([2.0])), keep=2)
      >>> [m.tolist() for m in mask]
      [[True, False], [True]]
    """
    check_choice("scope", scope, SCOPES)
    checks.check_layers("scores", scores, 1, shape="[n_i]")
    sizes = [s.shape[0] for s in scores]
    if not sum(sizes):
        raise ValueError("there are no prompts to select from: every layer has 0.")
    if (keep_ratio is None) == (keep is None):
        raise ValueError(
            f"got keep_ratio={keep_ratio} and keep={keep}; pass exactly one of them."
        )
    if keep_ratio is not None:
        number_like = isinstance(keep_ratio, int | float | np.floating)
        wanted = "a number in (0, 1], 0.3 for 30 %, static under jit"
        right = number_like and 0 < keep_ratio <= 1
        checks.expect(right, "keep_ratio", keep_ratio, wanted)
    largest = sum(sizes) if scope == "global" else max(sizes)
    keep = keep if keep is None else checks.check_integer("keep", keep, 0)
    if keep is not None and not 1 <= keep <= largest:
        raise ValueError(f"keep is {keep}; it must be in 1..{largest} ({scope} scope).")

    def top(s: jax.Array) -> jax.Array:
        n = s.shape[0]
        number = keep if keep_ratio is None else math.floor(keep_ratio * n + 0.5)
        order = jnp.argsort(jnp.where(jnp.isnan(s), jnp.inf, -s), stable=True)
        return jnp.zeros(n, bool).at[order].set(jnp.arange(n) < (number or 1))

    if scope == "layer":
        return tuple(top(jnp.asarray(s)) for s in scores)
    flat = top(jnp.concatenate([jnp.asarray(s) for s in scores]))
    return tuple(jnp.split(flat, np.cumsum(sizes)[:-1]))


def condense(prompts: Prompts, mask: Mask) -> Prompts:
    """Removes the prompts whose mask is False; order within a layer is kept.

    Shapes depend on the mask's values, so this runs outside jit; inside, give the mask
    to the model as `prompt_mask=`, which is the same network.

    Args:
      prompts: One `[n_i, d]` array per layer.
      mask: One boolean `[n_i]` array per layer, True = keep.

    Returns:
      Prompts with the same number of layers and possibly fewer rows.

    Raises:
      ValueError: If mask and prompts differ in layers or counts, the mask is not
        boolean, or the call is traced by jit.

    Example:
      >>> p = (jnp.zeros((2, 4)), jnp.zeros((3, 4)))
      >>> m = (jnp.array([True, False]), jnp.array([False, False, False]))
      >>> counts(condense(p, m))
      (1, 0)
    """
    checks.check_layers("prompts", prompts, 2, shape="[n_i, d]")
    checks.check_mask(mask, counts(prompts))
    if any(isinstance(m, Tracer) for m in mask):
        raise ValueError(
            "condense makes shapes from the mask's values and cannot run under jit;"
            " pass prompt_mask= to the model there."
        )
    return tuple(
        p[np.flatnonzero(np.asarray(m))] for p, m in zip(prompts, mask, strict=True)
    )
