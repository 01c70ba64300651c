# SPDX-License-Identifier: Apache-2.0
"""What the study `selection` shows: its tables, figures and verdicts."""

from typing import Any

import numpy as np

from studies.study import (
    Result,
    Section,
    Table,
    Verdict,
    clear,
    drawn,
    percent,
    spread,
    verdict,
    with_margin,
)
from vpt_jax.report.figures import LAYER_AXIS

# The rules of the automatic ratio: points of val accuracy, and the bound's confidence.
TOLERANCE, CONFIDENCE = 5.0, 0.9
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"),
    *("#000000", "#56B4E9", "#8C564B", "#9467BD", "#777777"),
)


def show(result: Result) -> Section:
    """Tables, figures and verdicts."""
    default = result["default"]
    text = [
        f"{result['prompts']} prompts are scored after tuning and cut over all layers"
        f" (global) or to the same share of each (layer), {len(result['seeds'])} seeds;"
        " test accuracies, before and after fine-tuning. Masks stand for removal. exact"
        " keeps the prompts whose removal changes the loss of pictures most,"
        " leave_one_out those whose removal raises the training loss most.",
    ]
    drawings = {
        "selection-ratio": (
            "Accuracy against prompts kept, by score and scope",
            "Means over seeds; the tables have the deviations. Solid: over all layers;"
            " dashed: layer by layer, of the same colour (fine-tuned only).",
            _draw_ratios,
        ),
        "selection-layers": (
            "Which layers keep their prompts",
            f"Selection over all layers by {default}; means over seeds.",
            _draw_layers,
        ),
    }
    return Section(
        "How prompts are selected",
        text,
        [
            _scopes(result, tuned=True),
            _scopes(result, tuned=False),
            _layers(result),
            _ways(result),
            _automatic(result),
        ],
        drawn(drawings, result),
        _verdicts(result),
    )


OTHERS = {
    "random": "The default score selects better prompts than chance.",
    "key_gate": "The default score selects better prompts than key_gate.",
    "leave_one_out": "Prompts are better kept by the size of the loss change on removal"
    " than by its mean (leave_one_out).",
}
WAYS = {
    "iterative": "Condensing step by step is better than in one shot, with as many"
    " epochs.",
    "merged": "Merging dropped prompts into kept ones is better than dropping them.",
}


def of(result: Result, what: str = "test", **about: Any) -> np.ndarray:
    """A number of the rows of which all of `about` is true, by seed; empty if none."""
    rows = [r for r in result["rows"] if all(r[k] == v for k, v in about.items())]
    by_seed = {row["seed"]: row[what] for row in rows}
    assert len(by_seed) == len(rows), f"several rows of a seed are {about}"
    return np.asarray([by_seed[s] for s in result["seeds"] if s in by_seed])


def _ratios(result: Result, tuned: bool) -> list[float]:
    """Of the cuts by every score, layer by layer too, falling."""
    rows = (r for r in result["rows"] if r["how"] == "cut" and r["scope"] == "layer")
    return sorted({r["ratio"] for r in rows if r["tuned"] == tuned}, reverse=True)


def _scores(result: Result, tuned: bool) -> list[str]:
    rows = (r for r in result["rows"] if r["how"] == "cut" and r["tuned"] == tuned)
    return list(dict.fromkeys(r["score"] for r in rows))


def _cut(result: Result, score: str, scope: str, ratio: float, tuned: bool) -> Any:
    about = {"score": score, "scope": scope, "ratio": ratio, "tuned": tuned}
    return of(result, how="cut", **about)


def _gains(result: Result, score: str, tuned: bool) -> np.ndarray:
    """Global minus layer, `[ratios, seeds]`."""
    return np.asarray(
        [
            _cut(result, score, "global", r, tuned)
            - _cut(result, score, "layer", r, tuned)
            for r in _ratios(result, tuned)
        ]
    )


def _spread(values: Any) -> str:
    return spread(values, 1)


def _scopes(result: Result, tuned: bool) -> Table:
    ratios = _ratios(result, tuned)
    header = ["Fine-tuned" if tuned else "Not fine-tuned"]
    for ratio in ratios:
        header += [f"{percent(ratio)} global", "layer", "difference"]
    rows = []
    for score in _scores(result, tuned):
        row = [score]
        for ratio, gain in zip(ratios, _gains(result, score, tuned), strict=True):
            row += [
                _spread(_cut(result, score, scope, ratio, tuned))
                for scope in ("global", "layer")
            ]
            row.append(with_margin(gain, 1))
        rows.append(row)
    return Table(
        header,
        rows,
        f"Test accuracy in per cent, ± one sample standard deviation; differences"
        " paired by seed, 95 % interval. All prompts:"
        f" {_spread(of(result, how='all'))}.",
    )


def _counts(result: Result) -> dict[float, np.ndarray]:
    """Prompts kept per layer `[seeds, layers]` by ratio: default score, global."""
    about = {"how": "cut", "score": result["default"], "scope": "global"}
    ratios = _ratios(result, tuned=False)
    return {r: of(result, "counts", ratio=r, tuned=False, **about) for r in ratios}


def _layers(result: Result) -> Table:
    return Table(
        ["Kept", *(f"layer {i + 1}" for i in range(result["layers"]))],
        [
            [percent(ratio), *(_spread(layer) for layer in counts.T)]
            for ratio, counts in _counts(result).items()
        ],
        f"Prompts kept per layer, over all layers by {result['default']}.",
    )


def _way(result: Result, how: str, ratio: float, tuned: bool = True) -> np.ndarray:
    """Of one-shot cuts (`cut`), or of iterative or merged ones: default score."""
    about = {"ratio": ratio, "tuned": tuned, "score": result["default"]}
    return of(result, how=how, scope="global", **about)


def _ways(result: Result) -> Table:
    rows = []
    for ratio in _ratios(result, tuned=True):
        one = _way(result, "cut", ratio)
        rows.append([percent(ratio), "one shot", _spread(one), ""])
        ways = [(how, how, one, True) for how in WAYS]
        before = _way(result, "cut", ratio, tuned=False)
        ways.append(("merged, not fine-tuned", "merged", before, False))
        for name, how, base, tuned in ways:
            other = _way(result, how, ratio, tuned)
            against = with_margin(other - base, 1)
            rows.append([percent(ratio), name, _spread(other), against])
    return Table(
        ["Kept", "How", "Test %", "against one shot"],
        rows,
        f"Over all layers by {result['default']}; iterative: scored and cut before"
        f" each of the {result['epochs']} epochs of fine-tuning. Differences (not"
        " fine-tuned: against one shot not fine-tuned) are paired by seed, 95 %"
        " interval.",
    )


def _automatic(result: Result) -> Table:
    ratios = list(result["automatic"][0]["bounds"])
    rows = []
    for found in result["automatic"]:
        row = [str(found["seed"])]
        row += [f"{found['bounds'][ratio]:.1f}" for ratio in ratios]
        row += [percent(found["ratio"]), f"{found['test_lost']:+.1f}"]
        rows.append(row)
    header = ["Seed", *(f"{percent(float(r))}: at most" for r in ratios)]
    return Table(
        [*header, "chosen", "lost on test"],
        rows,
        f"Automatic ratio: at most so many points of val accuracy are lost, with a"
        f" confidence of {100 * CONFIDENCE:g} % ({result['val']} pictures, paired"
        " answers). From the largest ratio down, the last that stays within"
        f" {TOLERANCE:g} points is chosen; 100 % if none does.",
    )


def _paired_verdict(
    result: Result, claim: str, what: str, gains: list[np.ndarray]
) -> Verdict:
    """Supported if the mean of all ratios is clearly above 0; gains by ratio."""
    parts = ", ".join(
        f"{percent(ratio)} {with_margin(gain, 1)}"
        for ratio, gain in zip(_ratios(result, tuned=True), gains, strict=True)
    )
    mean = np.mean(gains, axis=0)
    return verdict(
        claim,
        clear(mean),
        f"{what}: {with_margin(mean, 1)} points of test accuracy on the mean of all"
        f" ratios; {parts} (paired by seed, 95 % interval).",
    )


def _verdicts(result: Result) -> list[Verdict]:
    default, ratios = result["default"], _ratios(result, tuned=True)
    best = [_cut(result, default, "global", r, True) for r in ratios]

    def against(other: list[np.ndarray]) -> list[np.ndarray]:
        return [x - y for x, y in zip(best, other, strict=True)]

    found = [
        _paired_verdict(
            result,
            "Selection over all layers is better than layer by layer.",
            f"{default}, global minus layer, fine-tuned",
            against([_cut(result, default, "layer", r, True) for r in ratios]),
        )
    ]
    for other, claim in OTHERS.items():
        if other in _scores(result, tuned=True) and other != default:
            cuts = [_cut(result, other, "global", r, True) for r in ratios]
            what = f"{default} minus {other}, fine-tuned"
            found.append(_paired_verdict(result, claim, what, against(cuts)))
    for how, claim in WAYS.items():
        gains = [-gain for gain in against([_way(result, how, r) for r in ratios])]
        what = f"{how} minus one shot, fine-tuned"
        found.append(_paired_verdict(result, claim, what, gains))
    return [*found, _automatic_verdict(result)]


def _automatic_verdict(result: Result) -> Verdict:
    """Supported: every seed's choice keeps its promise on test, and one drops some."""
    chosen = [found["ratio"] for found in result["automatic"]]
    lost = [found["test_lost"] for found in result["automatic"]]
    kept = max(lost) <= TOLERANCE
    decided = False if not kept else True if min(chosen) < 1 else None
    return verdict(
        f"A ratio chosen on val with {100 * CONFIDENCE:g} % confidence loses no more"
        f" than {TOLERANCE:g} points on test.",
        decided,
        f"chosen {', '.join(map(percent, chosen))}; lost on test"
        f" {', '.join(f'{x:+.1f}' for x in lost)} points. Undecided if nothing is"
        " dropped.",
    )


def _draw_ratios(figure: Any, result: Result) -> None:
    """Left before, right after fine-tuning."""
    all_axes = figure.subplots(1, 2, sharey=True)
    names = _scores(result, tuned=False)
    for axes, tuned in zip(all_axes, (False, True), strict=True):
        ratios = _ratios(result, tuned)
        for score in _scores(result, tuned):
            place = names.index(score) % 10
            look = {"color": COLOURS[place], "marker": "osD^vPX<>*"[place]}
            # Before fine-tuning ten scores twice would be too many lines.
            for scope, style in (("global", "-"), ("layer", "--"))[: 1 + tuned]:
                values = [_cut(result, score, scope, r, tuned) for r in ratios]
                x, y = [100 * r for r in ratios], np.mean(values, axis=1)
                label = score if scope == "global" else None
                axes.plot(x, y, style, markersize=5, label=label, **look)
        axes.axhline(of(result, how="all").mean(), color="black", label="all prompts")
        axes.set(xlabel="Prompts kept (% of all)", xlim=(0, None))
        axes.set_title("Fine-tuned" if tuned else "Not fine-tuned", fontsize=10)
    all_axes[0].set_ylabel("Test accuracy (%)")


def _draw_layers(figure: Any, result: Result) -> None:
    from matplotlib import colormaps

    axes = figure.subplots()
    counts = _counts(result)
    colours = colormaps["viridis"](np.linspace(0.05, 0.85, len(counts)))
    layers, width = np.arange(1, result["layers"] + 1), 0.8 / len(counts)
    for i, (ratio, kept) in enumerate(counts.items()):
        x = layers + width * (i - (len(counts) - 1) / 2)
        label = f"Kept at {percent(ratio)}"
        axes.bar(x, kept.mean(axis=0), width, color=colours[i], label=label)
    axes.set_xticks(layers)
    axes.set(xlabel=LAYER_AXIS, ylabel="Prompts of the layer")
