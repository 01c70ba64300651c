# SPDX-License-Identifier: Apache-2.0
"""Can prompts be scored without labels? Against labelled scores and exact removal.

The paper (Kim et al., arXiv 2305.17223) scores by the gradient of the labelled loss and
leaves scoring without labels open. Every score here reads the training pictures alone
(`gates.py` says what they are), and is compared with the labelled ones, with what
exact removal does to the loss and to the prediction, and by what is left after
condensing by it. Tuning and fine-tuning use labels, as always: the scores do not.
"""

import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vpt_jax
from studies import gates, masked, removal, study
from studies.importance import agreement, reduce
from studies.importance_page import (
    DEFAULT,
    ENOUGH,
    SECOND,
    draw_scores,
    enough,
    name_rows,
    of,
)
from studies.prompts import TOLERANCE
from studies.ranks import spearman
from studies.study import Lab, Result, Section, Table, Verdict, spread
from vpt_jax.models.scores import SCORES as OF_LIBRARY
from vpt_jax.prompts import Mask, counts
from vpt_jax.run import stages
from vpt_jax.run.stages import Run

# name: (what is computed of every example, reduction over examples)
LABELLED = {
    "removal": ("loss, removal", "mean_abs"),
    "removal, second_order": ("loss, removal", "second_order"),
    "key_gate": ("loss, key_gate", "mean_abs"),
    "key_gate, second_order": ("loss, key_gate", "second_order"),
}
UNLABELLED = {
    "entropy": ("entropy, removal", "mean_abs"),
    "pseudo_label": ("pseudo_label, removal", "mean_abs"),
    "distill": ("distill, removal", "mean"),
    "feature_change": ("feature_change, removal", "mean"),
    "entropy, signed": ("entropy, removal", "mean"),
    "entropy, key_gate": ("entropy, key_gate", "mean_abs"),
    "pseudo_label, key_gate": ("pseudo_label, key_gate", "mean_abs"),
    "distill, key_gate": ("distill, key_gate", "mean"),
    "feature_change, key_gate": ("feature_change, key_gate", "mean"),
    "attention": ("attention", "mean"),
    "l2_norm": ("l2_norm", ""),
}
SCORES = {**LABELLED, **UNLABELLED, "random": ("random", "")}
# Exact removal, with which scores are compared.
ORACLES = {
    "size": "size of the change",
    "mean": "mean change",
    "divergence": "divergence",
}
DTYPES = ("float32", "bfloat16")
PICTURES = 128  # from which the divergence is taken, which needs every prompt left out
FINETUNED = {
    0.3: (
        *(DEFAULT, SECOND, "entropy", "pseudo_label", "distill", "feature_change"),
        *("attention", "l2_norm", "random"),
    ),
    0.1: (DEFAULT, "entropy", "pseudo_label", "distill", "feature_change", "random"),
}
CLAIM_AS_WELL = "Prompts can be scored without labels as well as with them."
CLAIMS = {
    "distill": "Self-distillation finds the prompts whose removal changes the loss.",
    "attention": "The prompts that receive attention are those whose removal changes"
    " the loss.",
}


def run(lab: Lab) -> Result:
    """Scores, oracles, and accuracies after condensing, for every seed."""
    data = removal.examples(lab)
    seeds: list[dict[str, Any]] = []
    accuracy: dict[str, Any] = {}
    with study.running(lab) as shared:
        for seed in lab.config.seeds:
            trainable = study.tuned(shared, seed)
            found, scores = _seed(lab, shared, seed, trainable, data)
            seeds.append(found)
            for ratio, score, outcome in _condensed(shared, seed, trainable, scores):
                by_score = accuracy.setdefault(str(ratio), {})
                own = by_score.setdefault(score, {"test": [], "val": []})
                own["test"].append(outcome.test)
                own["val"].append(outcome.val)
    return {"examples": len(data[1]), "seeds": seeds, "accuracy": accuracy}


def _seed(
    lab: Lab, shared: Run, seed: int, trainable: dict[str, Any], data: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A seed's part of the result, and its scores in float32."""

    def measured(function: Any, dtype: str, data: Any) -> dict[str, np.ndarray]:
        model = lab.model.model.clone(dtype=jnp.dtype(dtype))
        size = lab.config.score.batch_size
        return gates.values(function, model, lab.model.backbone, trainable, data, size)

    exact = removal.kept(lab, shared, seed, "exact")
    few = tuple(x[:PICTURES] for x in data)
    divergence = measured(gates.divergence, "float32", few)["divergence"]
    values = {dtype: measured(gates.derivatives, dtype, data) for dtype in DTYPES}
    scores = {d: all_scores(v, trainable, seed) for d, v in values.items()}
    truth = {
        "size": np.abs(exact).mean(axis=0),
        "mean": exact.mean(axis=0),
        "divergence": divergence.mean(axis=0),
        **{name: scores["float32"][name] for name in (DEFAULT, SECOND)},
    }
    num = counts(trainable["prompts"])
    layer = np.repeat(np.arange(len(num)), num)
    rows = [
        {"score": name, "dtype": dtype, "oracle": reference}
        | agreement(scores[dtype][name], truth[reference], layer)
        for name in SCORES
        for dtype in DTYPES
        for reference in truth
    ]
    # Estimated over exact, of all prompts together, on the same pictures.
    share = {
        form: values["float32"][f"distill, {form}"][:PICTURES].mean(axis=0).sum()
        / truth["divergence"].sum()
        for form in gates.FORMS
    }
    return {
        "seed": seed,
        "rows": rows,
        "divergence_halves": spearman(*(divergence[i::2].mean(axis=0) for i in (0, 1))),
        "divergence_share": {form: float(x) for form, x in share.items()},
    }, scores["float32"]


def all_scores(
    values: dict[str, np.ndarray], trainable: dict[str, Any], seed: int
) -> dict[str, np.ndarray]:
    """Every score of every prompt, `[prompts]`, from every example's values."""
    scores = {}
    for name, (what, reduction) in SCORES.items():
        if reduction:
            scores[name] = reduce(values[what], reduction)
        else:
            key = jax.random.fold_in(jax.random.key(seed), 1)  # as a run's
            layers = vpt_jax.importance(None, None, trainable, [], score=what, key=key)
            scores[name] = np.concatenate(layers).astype(np.float64)
    return scores


def _condensed(
    shared: Run, seed: int, trainable: dict[str, Any], scores: dict[str, np.ndarray]
) -> Iterator[tuple[float, str, masked.Outcome]]:
    """Ratios, scores and outcomes; named as in `selection`, which has some of them."""
    num = counts(trainable["prompts"])

    def outcome(name: str, mask: Mask, *, tune: bool) -> masked.Outcome:
        return masked.outcome(
            shared, seed, name, trainable, lambda epoch, now: mask, tune=tune
        )

    everything = tuple(jnp.ones(n, bool) for n in num)
    yield 1.0, "all", outcome("all", everything, tune=False)
    same: dict[bytes, masked.Outcome] = {}
    for ratio, names in FINETUNED.items():
        for name in names:
            if name in OF_LIBRARY:
                layers = stages.scores_of(shared, seed, name)
            else:
                own = np.split(scores[name].astype(np.float32), np.cumsum(num)[:-1])
                layers = tuple(map(jnp.asarray, own))
            mask = vpt_jax.keep_mask(layers, keep_ratio=ratio)
            # Scores often keep the same prompts: those are trained once.
            kept = np.concatenate(mask).tobytes()
            if kept not in same:
                file = f"{name.replace(', ', '_')}-global-{ratio:g}"
                same[kept] = outcome(file, mask, tune=True)
            yield ratio, name, same[kept]


def show(result: Result) -> Section:
    """Tables, figures and verdicts."""
    seeds = result["seeds"]
    share = {
        form: spread([100 * seed["divergence_share"][form] for seed in seeds], 0)
        for form in gates.FORMS
    }
    halves = spread([seed["divergence_halves"] for seed in seeds], 3)
    text = [
        f"Scores read {result['examples']} training pictures without their labels."
        " Tuning before and fine-tuning after use labels, for every score alike;"
        " scores that keep the same prompts share a training."
        " Unless a name says key_gate, derivatives are those of removal, exact in the"
        " softmax; each score costs one forward and one backward pass.",
        "entropy: the prediction's entropy (signed: the mean, not of absolutes);"
        " pseudo_label: the cross entropy with the prediction's own best class;"
        " distill: KL of the prediction without the prompt from the one with it, to"
        " second order; feature_change: the squared change of what the head reads;"
        " attention: what the prompt receives; l2_norm: its length.",
        "Exact removal: the size of the change is the mean of |loss without the prompt"
        " - loss| over pictures, the mean change is leave_one_out, the divergence is"
        f" the exact KL on {PICTURES} pictures (halves of them agree at {halves}). It"
        " is the mean change that the loss would have if labels were drawn from the"
        f" predictions. The estimates of distill add up to {share['removal']} % of it"
        f" (with key_gate: {share['key_gate']} %).",
    ]
    drawings = {
        "unlabelled_bars": (
            "How well scores order the prompts with and without labels",
            "Spearman's correlation with exact removal over all prompts in float32;"
            f" bars are means, dots are seeds, the dashed line is {ENOUGH}.",
            _draw_bars,
        ),
        "unlabelled_accuracy": (
            "What is left after condensing by each score",
            "Test accuracy after fine-tuning (with labels); markers are means, bars"
            " one sample standard deviation over seeds. Lines: all prompts, and the"
            f" labelled default ({DEFAULT}). A score without a marker was not"
            " tried at that ratio.",
            _draw_accuracy,
        ),
    }
    return Section(
        "Scores without labels",
        text,
        [_agreement_table(result), _accuracy_table(result)],
        study.drawn(drawings, result),
        [_as_well(result), *(_finds(result, name) for name in CLAIMS)],
    )


def _as_well(result: Result) -> Verdict:
    """Supported if the loss against labels at 30 % is clearly within the tolerance.

    The unlabelled score is the one with the best mean val accuracy.
    """
    found = result["accuracy"]["0.3"]
    tried = [name for name in found if name in UNLABELLED]
    best = max(tried, key=lambda name: np.mean(found[name]["val"]))
    lost = _lost(result, "0.3", best)
    return study.verdict(
        CLAIM_AS_WELL,
        study.clear(TOLERANCE - lost),
        f"at 30 % {best}, best of {len(tried)} on val, loses {study.with_margin(lost)}"
        f" points of test accuracy against {DEFAULT}, which reads labels (paired, 95 %"
        f" interval over seeds); {TOLERANCE} are allowed; random loses"
        f" {study.with_margin(_lost(result, '0.3', 'random'))}",
    )


def _lost(result: Result, ratio: str, score: str) -> np.ndarray:
    """Points of test accuracy below the labelled default, `[seeds]`."""
    found = result["accuracy"][ratio]
    return np.subtract(found[DEFAULT]["test"], found[score]["test"])


def _finds(result: Result, score: str) -> Verdict:
    found = {d: of(result, score, d, "size", "spearman") for d in DTYPES}
    decided, numbers = enough(found)
    share = of(result, score, "float32", "size", "precision")
    mean, divergence = (
        spread(of(result, score, "float32", oracle, "spearman"), 3)
        for oracle in ("mean", "divergence")
    )
    return study.verdict(
        CLAIMS[score],
        decided,
        f"Spearman of {score} with the size of the change: {numbers}. Rule: at least"
        f" {ENOUGH} in every seed and precision; not supported if a mean is below."
        f" Of the true best 30 % it finds {100 * np.mean(share):.0f} %;"
        f" with the mean change its Spearman is {mean}, with the divergence"
        f" {divergence}.",
    )


def _kind(score: str) -> str:
    for kind, names in (("with labels", LABELLED), ("without labels", UNLABELLED)):
        if score in names:
            return kind
    return "control"


def _agreement_table(result: Result) -> Table:
    first = [(o, d) for o in ORACLES for d in DTYPES]
    others = [(o, "float32") for o in (DEFAULT, SECOND)]
    rows = []
    for name in SCORES:
        spearman = (of(result, name, d, o, "spearman") for o, d in first + others)
        best = (of(result, name, "float32", o, "precision") for o in ("size", "mean"))
        numbers = [*map(spread, spearman), *(f"{np.mean(x):.2f}" for x in best)]
        rows.append([name, *numbers])
    short = {"float32": "f32", "bfloat16": "bf16"}
    header = ["Score", *(f"{o}, {short[d]}" for o, d in first)]
    header += [*(DEFAULT, SECOND), "size: top 30 %", "mean: top 30 %"]
    return Table(
        header,
        rows,
        "Spearman's correlation over all prompts with exact removal (size and mean of"
        " the loss's change, divergence of the prediction; all in float32), of scores"
        " in float32 and in bfloat16; then with the labelled scores; then the share of"
        " the true best 30 % found. The first rows read labels.",
    )


def _accuracy_table(result: Result) -> Table:
    rows = []
    for ratio, found in result["accuracy"].items():
        for score, own in found.items():
            lost = ""
            if score not in ("all", DEFAULT):
                lost = study.with_margin(_lost(result, ratio, score))
            test, val = (spread(own[part]) for part in ("test", "val"))
            rows.append([study.percent(float(ratio)), score, test, val, lost])
    return Table(
        ["Kept", "By", "Test %", "Val %", "Lost, paired"],
        rows,
        "After condensing over all layers and fine-tuning with labels; ± one sample"
        f" standard deviation over seeds. Lost: points of test accuracy against"
        f" {DEFAULT}, which reads labels, ± half the 95 % interval over seeds.",
    )


LOOKS = {
    "with labels": ("#D55E00", "s"),
    "without labels": ("#0072B2", "o"),
    "control": ("#777777", "^"),
}


def _draw_bars(figure: Any, result: Result) -> None:
    def label(name: str) -> str:
        return f"{name} ({_kind(name)})"

    draw_scores(figure, result, FINETUNED[0.3], ORACLES, label)


def _draw_accuracy(figure: Any, result: Result) -> None:
    panels = [ratio for ratio in result["accuracy"] if ratio != "1.0"]
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = list(result["accuracy"][panels[0]])
    full = np.mean(result["accuracy"]["1.0"]["all"]["test"])
    for axes, ratio in zip(all_axes, panels, strict=True):
        found = result["accuracy"][ratio]
        for score, own in found.items():
            percent = np.asarray(own["test"])
            bars = percent.std(ddof=1) if len(percent) > 1 else None
            colour, marker = LOOKS[_kind(score)]
            look = {"color": colour, "marker": marker, "label": _kind(score)}
            place = names.index(score)
            axes.errorbar(percent.mean(), place, xerr=bars, capsize=3, **look)
        default = np.mean(found[DEFAULT]["test"])
        axes.axvline(default, color="#D55E00", ls="--", lw=1, label=f"{DEFAULT} (mean)")
        axes.axvline(full, color="black", lw=1, label="all prompts")
        axes.set_title(f"{study.percent(float(ratio))} kept", fontsize=10)
        axes.set(xlabel="Test accuracy (%)")
        name_rows(axes, names)


if __name__ == "__main__":
    study.start("unlabelled", sys.modules[__name__])
