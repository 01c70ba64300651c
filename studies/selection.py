# SPDX-License-Identifier: Apache-2.0
r"""How should prompts be selected? Over all layers or in each, at once or step by step.

python -m studies.selection --config=configs/demo.py:shapes_location,seeds=3

- Global against layer-wise selection, by every score and ratio (the paper: global).
- Iterative: score, drop a little, tune a little, with as many epochs as one shot.
- Automatic: the fewest prompts of which the validation pictures show, with a stated
  confidence, that no more than a tolerance is lost.
- Merged: dropped prompts are averaged into the nearest kept one of their layer.

Everything is chosen on val, reported on test and paired by seed; masks stand for
removal (`masked.py`), so one program trains every selection.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import jax.numpy as jnp
import numpy as np

import vpt_jax
from studies import removal, selection_page, study
from studies.masked import MaskOf, outcome
from studies.selection_page import CONFIDENCE, TOLERANCE
from vpt_jax.condense import REDUCTIONS, SCOPES
from vpt_jax.prompts import Importance, Mask, Prompts
from vpt_jax.run import stages
from vpt_jax.run.stages import Run

# Without fine-tuning all are tried, fine-tuned those of `TUNED`. `exact` is the mean
# absolute change of the loss when a prompt is removed, `leave_one_out` the mean change.
EXACT = {"exact": "mean_abs", "leave_one_out": "mean"}
SCORES = (
    "removal",
    "key_gate",
    "taylor",
    "grad_norm",
    "signed",
    "exact",
    "leave_one_out",
    "attention",
    "l2_norm",
    "random",
)
TUNED = ("removal", "key_gate", "leave_one_out", "random")
RATIOS = (0.5, 0.3, 0.1)
TUNED_RATIOS = (0.3, 0.1)
AUTOMATIC = (0.7, 0.5, 0.3, 0.2, 0.1)  # among which the automatic ratio is chosen


def run(
    lab: study.Lab,
    *,
    scores: Sequence[str] = SCORES,
    tuned: Sequence[str] = TUNED,
    ratios: Sequence[float] = RATIOS,
    tuned_ratios: Sequence[float] = TUNED_RATIOS,
    automatic_ratios: Sequence[float] = AUTOMATIC,
) -> study.Result:
    """Selects, fine-tunes and evaluates for every seed.

    The config's score is the default: always among both lists of scores, and
    fine-tuned over all layers at every automatic ratio too.
    """
    default = lab.config.score.score
    scores = tuple(dict.fromkeys((default, *scores)))
    tuned = tuple(dict.fromkeys((default, *tuned)))
    plan = [(s, c, r, False) for s in scores for c in SCOPES for r in ratios]
    plan += [(s, c, r, True) for s in tuned for c in SCOPES for r in tuned_ratios]
    more = [r for r in automatic_ratios if r not in tuned_ratios]
    plan += [(default, "global", r, True) for r in more]
    rows: list[dict[str, Any]] = []
    with study.running(lab) as shared:
        for seed in lab.config.seeds:
            importance = {s: scores_of(lab, shared, seed, s) for s in scores}
            found = [
                *_cuts(shared, seed, importance, plan),
                *_ways(shared, seed, importance[default], default, tuned_ratios),
            ]
            rows += [{"seed": seed, **row} for row in found]
    layers = len(rows[0]["counts"])
    return {
        "seeds": list(lab.config.seeds),
        "default": default,
        "prompts": sum(rows[0]["counts"]),
        "layers": layers,
        "epochs": lab.config.finetune.epochs,
        "val": len(rows[0]["right"]),
        "rows": rows,
        "automatic": [automatic(rows, seed, default) for seed in lab.config.seeds],
    }


Rows = Iterator[dict[str, Any]]


def _cuts(
    run: Run,
    seed: int,
    importance: dict[str, Importance],
    plan: Sequence[tuple[str, str, float, bool]],
) -> Rows:
    """All prompts, and every cut of the plan."""
    start = study.tuned(run, seed)
    everything = tuple(jnp.ones(n, bool) for n in vpt_jax.counts(start["prompts"]))
    found = outcome(run, seed, "all", start, fixed(everything), tune=False)
    about = {"how": "all", "ratio": 1.0, "score": "", "scope": "", "tuned": False}
    yield {**about, **found._asdict()}
    for score, scope, ratio, tune in plan:
        mask = vpt_jax.keep_mask(importance[score], keep_ratio=ratio, scope=scope)
        name = f"{score}-{scope}-{ratio:g}"
        found = outcome(run, seed, name, start, fixed(mask), tune=tune)
        about = {"how": "cut", "ratio": ratio, "score": score, "scope": scope}
        yield {**about, "tuned": tune, **found._asdict()}


def _ways(
    run: Run,
    seed: int,
    scores: Importance,
    score: str,
    ratios: Sequence[float],
) -> Rows:
    """Iterative and merged, over all layers by the default score."""
    start = study.tuned(run, seed)
    for ratio in ratios:
        about = {"ratio": ratio, "score": score, "scope": "global"}
        name, steps = f"iterative-{ratio:g}", falling(run, score, ratio)
        found = outcome(run, seed, name, start, steps, tune=True)
        yield {"how": "iterative", "tuned": True, **about, **found._asdict()}
        mask = vpt_jax.keep_mask(scores, keep_ratio=ratio)
        both = {**start, "prompts": merged(start["prompts"], scores, mask)}
        for tune in (False, True):
            name = f"merged-{ratio:g}"
            found = outcome(run, seed, name, both, fixed(mask), tune=tune)
            yield {"how": "merged", "tuned": tune, **about, **found._asdict()}


def scores_of(lab: study.Lab, run: Run, seed: int, score: str) -> Importance:
    """Importance of the tuned prompts by a score of the library, or one of `EXACT`."""
    if score not in EXACT:
        return stages.scores_of(run, seed, score)
    change = removal.kept(lab, run, seed, "exact")
    before, after = REDUCTIONS[EXACT[score]]
    flat = np.asarray(after(before(change).mean(axis=0)), np.float32)
    num = vpt_jax.counts(study.tuned(run, seed)["prompts"])
    return tuple(map(jnp.asarray, np.split(flat, np.cumsum(num)[:-1])))


def fixed(mask: Mask) -> MaskOf:
    """The same mask in every epoch."""
    return lambda epoch, trainable: mask


def falling(run: Run, score: str, ratio: float) -> MaskOf:
    """Before every epoch score what is left and drop some, to `ratio` in the last.

    The number kept falls geometrically, so that every step drops the same share.
    """
    epochs = run.config.finetune.epochs
    previous: list[Mask] = []

    def mask_of(epoch: int, trainable: dict[str, Any]) -> Mask:
        before = previous[-1] if previous else None
        scores = stages.score_over(run, trainable, score, prompt_mask=before)
        step = max(ratio, ratio ** ((epoch + 1) / epochs))
        previous.append(vpt_jax.keep_mask(scores, keep_ratio=step))
        return previous[-1]

    return mask_of


def merged(prompts: Prompts, scores: Importance, mask: Mask) -> Prompts:
    """Averages every dropped prompt into the most similar kept one of its layer.

    Similarity is the cosine of what the layer's LayerNorm sees (a prompt minus its
    mean); prompts count by their scores, which must not be negative. Layers that keep
    none lose theirs.
    """
    result = []
    for p, s, m in zip(prompts, scores, mask, strict=True):
        kept, dropped = (
            np.flatnonzero(np.asarray(m) == keep) for keep in (True, False)
        )
        if not len(kept) or not len(dropped):
            result.append(p)
            continue
        x = np.asarray(p, np.float64)
        weight = np.maximum(np.asarray(s, np.float64), 1e-12)
        unit = x - x.mean(axis=1, keepdims=True)
        unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
        nearest = kept[np.argmax(unit[dropped] @ unit[kept].T, axis=1)]
        total, mass = x * weight[:, None], weight.copy()
        np.add.at(total, nearest, total[dropped])
        np.add.at(mass, nearest, weight[dropped])
        x[kept] = total[kept] / mass[kept, None]
        result.append(jnp.asarray(x, p.dtype))
    return tuple(result)


def lost_at_most(before: str, after: str, confidence: float) -> float:
    """An upper bound of the accuracy lost, in points, from paired answers.

    The adjusted Wald bound for a difference of paired proportions (Bonett and Price,
    J. Educ. Behav. Stat. 37, 2012), one-sided.

    Args:
      before: A `0` or `1` for each picture: right with all prompts?
      after: The same pictures with fewer prompts.
      confidence: Of the bound, in (0, 1).

    Raises:
      ValueError: If the two are not of the same pictures.
    """
    if len(before) != len(after) or not before:
        raise ValueError(
            f"got {len(before)} and {len(after)} answers; expected those of the same"
            " pictures, at least one."
        )
    pairs = list(zip(before, after, strict=True))
    n = len(pairs) + 2
    worse = (pairs.count(("1", "0")) + 1) / n
    better = (pairs.count(("0", "1")) + 1) / n
    lost = worse - better
    error = ((worse + better - lost**2) / n) ** 0.5
    return 100 * (lost + NormalDist().inv_cdf(confidence) * error)


def fewest(
    before: str,
    after: Mapping[float, str],
    tolerance: float = TOLERANCE,
    confidence: float = CONFIDENCE,
) -> float:
    """The smallest ratio kept that certainly loses no more than a tolerance.

    Ratios are tested in falling order and the first that fails ends it: then the
    confidence holds for the result as for one test (a fixed sequence of hypotheses).

    Args:
      before: Answers with all prompts, see `lost_at_most`.
      after: Answers by ratio kept.
      tolerance: Points of accuracy.
      confidence: Of each test, and so of the result.

    Returns:
      A ratio of `after`, or 1.0.
    """
    found = 1.0
    for ratio in sorted(after, reverse=True):
        if lost_at_most(before, after[ratio], confidence) > tolerance:
            break
        found = ratio
    return found


def automatic(
    rows: Sequence[Mapping[str, Any]], seed: int, score: str
) -> dict[str, Any]:
    """The automatic ratio of a seed, from val, and what it loses on test."""
    own = [r for r in rows if r["seed"] == seed]
    (every,) = (r for r in own if r["how"] == "all")
    cut = {
        r["ratio"]: r
        for r in own
        if (r["how"], r["score"], r["scope"], r["tuned"])
        == ("cut", score, "global", True)
    }
    answers = {ratio: r["right"] for ratio, r in cut.items()}
    ratio = fewest(every["right"], answers)
    return {
        "seed": seed,
        "ratio": ratio,
        "bounds": {
            str(r): lost_at_most(every["right"], a, CONFIDENCE)
            for r, a in sorted(answers.items(), reverse=True)
        },
        "test_lost": every["test"] - cut[ratio]["test"] if ratio < 1 else 0.0,
    }


show = selection_page.show


if __name__ == "__main__":
    study.start("selection", sys.modules[__name__])
