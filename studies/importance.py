# SPDX-License-Identifier: Apache-2.0
"""Does a score find the prompts that matter? Every score against exact removal.

Two oracles, both from the loss of every training example with and without a prompt:
`mean`, the mean change, is what `leave_one_out` gives; `size`, the mean of the change's
absolute value, is what `mean_abs` estimates. They are different questions: a prompt
that helps half of the pictures and harms the others has a size and no mean. Which
question is the right one is seen when many prompts go at once: the study cuts by both.
"""

import functools
import sys
import time
from typing import Any

import jax.numpy as jnp
import numpy as np

import vpt_jax
from studies import importance_page, planted, removal, study
from studies.ranks import kendall, pearson, percentile, precision, spearman
from vpt_jax.models.scores import REDUCTIONS
from vpt_jax.prompts import counts
from vpt_jax.run.stages import Run

# name: (what is computed of every example, reduction over examples)
SCORES = {
    "removal": ("removal", "mean_abs"),
    "removal, second_order": ("removal", "second_order"),
    "removal, mean": ("removal", "mean"),
    "key_gate": ("key_gate", "mean_abs"),
    "key_gate, abs_mean": ("key_gate", "abs_mean"),
    "key_gate, mean_square": ("key_gate", "mean_square"),
    "key_gate, second_order": ("key_gate", "second_order"),
    "signed": ("key_gate", "mean"),
    "taylor": ("taylor", "mean_abs"),
    "grad_norm": ("grad_norm", "mean"),
    "attention": ("attention", "mean"),
    "l2_norm": ("l2_norm", ""),
    "random": ("random", ""),
}
ORACLES = ("size", "mean")
DTYPES = ("float32", "bfloat16")
SHARE = 0.3  # of the prompts: what "the best" are
CUTS = importance_page.CUTS  # of the prompts kept, before any fine-tuning
GROUPS, GROUP_SHARE = 20, 0.1
PLANTED_EXAMPLES = 128
ADDED = ("signed", "removal, mean", "removal, second_order", "leave_one_out")


def run(lab: study.Lab) -> study.Result:
    """Measures scores, oracles, groups and planted cases for every seed."""
    data = removal.examples(lab)
    seeds, trainable = [], {}
    with study.running(lab) as shared:
        for seed in lab.config.seeds:
            trainable = study.tuned(shared, seed)
            seeds.append(_seed(lab, shared, seed, trainable, data))
        cost = _cost(lab, trainable, data)
    return {"examples": len(data[1]), "seeds": seeds, "cost": cost}


def _seed(
    lab: study.Lab, shared: Run, seed: int, trainable: dict[str, Any], data: Any
) -> dict[str, Any]:
    values = functools.partial(removal.kept, lab, shared, seed)
    exact = values("exact")
    oracles = {"size": np.abs(exact).mean(0), "mean": exact.mean(0)}
    num = counts(trainable["prompts"])
    layer = np.repeat(np.arange(len(num)), num)
    found = {
        dtype: {what: values(what, dtype) for what in removal.ESTIMATES}
        for dtype in DTYPES
    }
    scores = {dtype: all_scores(found[dtype], trainable, seed) for dtype in DTYPES}
    rows = [
        {"score": name, "dtype": dtype, "oracle": oracle}
        | agreement(scores[dtype][name], oracles[oracle], layer)
        for name in SCORES
        for dtype in DTYPES
        for oracle in ORACLES
    ]
    float32 = functools.partial(
        removal.values,
        model=lab.model.model,
        backbone=lab.model.backbone,
        trainable=trainable,
        data=data,
        batch_size=lab.config.score.batch_size,
    )
    return {
        "seed": seed,
        "layers": layer.tolist(),
        "loss": float(float32("loss").mean()),
        "oracles": {name: x.tolist() for name, x in oracles.items()},
        "oracles_agree": spearman(oracles["size"], oracles["mean"]),
        "oracle_halves": {
            "size": _halves(exact, "mean_abs"),
            "mean": _halves(exact, "mean"),
        },
        "scores": {
            dtype: {name: x.tolist() for name, x in by_name.items()}
            for dtype, by_name in scores.items()
        },
        "rows": rows,
        "stability": [_stability(name, found, scores) for name in SCORES],
        "taylor_size": _taylor_size(found, trainable),
        "cuts": _cuts(float32, scores["float32"], oracles, num),
        "groups": _groups(float32, found["float32"], exact, num, seed),
        "planted": _planted(lab, trainable, data, oracles["size"], seed),
    }


def all_scores(
    found: dict[str, np.ndarray], trainable: dict[str, Any], seed: int
) -> dict[str, np.ndarray]:
    """Every score of every prompt, `[prompts]`, from every example's values."""
    scores = {}
    for name, (what, reduction) in SCORES.items():
        if what in found:
            scores[name] = reduce(found[what], reduction)
        else:
            scores[name] = _without_data(what, trainable, seed)
    return scores


def reduce(values: np.ndarray, reduction: str) -> np.ndarray:
    """Scores `[prompts]` of `values [examples, prompts]`, as `importance` has them."""
    before, after = REDUCTIONS[reduction]
    return np.asarray(after(before(values).mean(axis=0)))


def _without_data(what: str, trainable: dict[str, Any], seed: int) -> np.ndarray:
    if what == "random":
        return np.random.default_rng(seed).random(sum(counts(trainable["prompts"])))
    norms = vpt_jax.importance(None, None, trainable, [], score=what)
    return np.concatenate([np.asarray(x, np.float64) for x in norms])


def agreement(
    score: np.ndarray, oracle: np.ndarray, layer: np.ndarray
) -> dict[str, float]:
    """Correlations over all prompts and within layers, and precision of the best."""
    within = [(score[layer == i], oracle[layer == i]) for i in np.unique(layer)]
    return {
        "spearman": spearman(score, oracle),
        "kendall": kendall(score, oracle),
        "layer_spearman": float(np.mean([spearman(*pair) for pair in within])),
        "layer_kendall": float(np.mean([kendall(*pair) for pair in within])),
        "precision": precision(score, oracle, SHARE),
    }


def _halves(values: np.ndarray, reduction: str) -> float:
    """Spearman's correlation between the scores of every other example."""
    return spearman(reduce(values[::2], reduction), reduce(values[1::2], reduction))


def _stability(name: str, found: Any, scores: Any) -> dict[str, Any]:
    what, reduction = SCORES[name]
    result = {
        "score": name,
        "dtypes": spearman(*(scores[dtype][name] for dtype in DTYPES)),
        "halves": None,
        "examples": None,
    }
    if reduction:
        a, b = (found[dtype][what] for dtype in DTYPES)
        result["halves"] = _halves(a, reduction)
        # Whether the number that each example gives is the same number.
        each = [pearson(x, y) for x, y in zip(a.T, b.T, strict=True)]
        result["examples"] = float(np.median(each))
    return result


def _taylor_size(found: Any, trainable: dict[str, Any]) -> dict[str, float]:
    """Median over prompts of mean |<p, g>| / (|p| mean |g|), per precision."""
    norm = _without_data("l2_norm", trainable, 0)
    sizes = {}
    for dtype, v in found.items():
        most = np.maximum(norm * v["grad_norm"].mean(0), 1e-30)
        sizes[dtype] = float(np.median(np.abs(v["taylor"]).mean(0) / most))
    return sizes


def _masked(float32: Any, masks: np.ndarray, num: tuple[int, ...]) -> np.ndarray:
    """Mean loss under each of `masks [masks, prompts]`."""
    parts = np.split(masks, np.cumsum(num)[:-1], axis=1)
    return float32("masked", masks=tuple(map(jnp.asarray, parts))).mean(axis=0)


def _cuts(
    float32: Any, scores: Any, oracles: Any, num: tuple[int, ...]
) -> dict[str, list[float]]:
    """Mean loss with the best by each score alone, before fine-tuning, by `CUTS`."""
    named = {**scores, **{f"oracle, {name}": x for name, x in oracles.items()}}
    masks = [
        vpt_jax.keep_mask((jnp.asarray(x, jnp.float32),), keep_ratio=ratio)[0]
        for x in named.values()
        for ratio in CUTS
    ]
    losses = _masked(float32, np.stack([np.asarray(m) for m in masks]), num)
    rows = losses.reshape(len(named), len(CUTS)).tolist()
    return dict(zip(named, rows, strict=True))


def _groups(
    float32: Any, found: Any, exact: np.ndarray, num: tuple[int, ...], seed: int
) -> dict[str, list[float]]:
    """Loss change without random groups, and the sums of the prompts' scores."""
    rng, total = np.random.default_rng(seed), sum(num)
    size = max(1, int(GROUP_SHARE * total + 0.5))
    masks = np.ones((GROUPS + 1, total), bool)
    for mask in masks[1:]:
        mask[rng.choice(total, size, replace=False)] = False
    losses = _masked(float32, masks, num)
    result = {"actual": (losses[1:] - losses[0]).tolist()}
    for name in ADDED:
        if name == "leave_one_out":
            score = exact.mean(axis=0)
        else:
            what, reduction = SCORES[name]
            score = reduce(found[what], reduction)
        result[name] = (~masks[1:] @ score).tolist()
    return result


def _planted(
    lab: study.Lab, trainable: dict[str, Any], data: Any, oracle: np.ndarray, seed: int
) -> list[dict[str, Any]]:
    """Where scores and oracles rank the planted prompts, in per cent."""
    model, backbone = lab.model.model, lab.model.backbone
    data = tuple(x[:PLANTED_EXAMPLES] for x in data)
    made = planted.plant(model, backbone, trainable, data[0][:32], oracle)
    size = min(lab.config.score.batch_size, len(data[1]))
    found = {
        what: removal.values(what, model, backbone, made.trainable, data, size)
        for what in (*removal.ESTIMATES, "exact")
    }
    exact = found.pop("exact")
    named = {"oracle, size": np.abs(exact).mean(0), "oracle, mean": exact.mean(0)}
    named |= all_scores(found, made.trainable, seed)
    attention = found["attention"].mean(0)
    return [
        {
            "case": case,
            "attention": float(attention[places[0]]),
            "change": [float(named["oracle, size"][j]) for j in places],
            "percentiles": {
                name: float(np.mean([percentile(x, j) for j in places]))
                for name, x in named.items()
            },
        }
        for case, places in made.places.items()
    ]


def _cost(lab: study.Lab, trainable: dict[str, Any], data: Any) -> dict[str, float]:
    """Seconds of one batch once compiled, median of 3."""
    size = lab.config.score.batch_size
    batch = tuple(x[:size] for x in data)
    given = lab.model.model, lab.model.backbone, trainable, batch, size
    result = {}
    for what in ("loss", *removal.ESTIMATES, "exact"):
        times = []
        for _ in range(4):
            start = time.perf_counter()
            removal.values(what, *given)
            times.append(time.perf_counter() - start)
        result[what] = float(np.median(times[1:]))
    return result


show = importance_page.show


if __name__ == "__main__":
    study.start("importance", sys.modules[__name__])
