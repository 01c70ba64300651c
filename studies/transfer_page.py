# SPDX-License-Identifier: Apache-2.0
"""What the study `transfer` shows: its tables, figures and verdicts."""

from typing import Any

import numpy as np

from studies.scenes import CLASSES
from studies.study import (
    Result,
    Section,
    Table,
    Verdict,
    clear,
    deviation,
    drawn,
    percent,
    spread,
    verdict,
    with_margin,
)
from vpt_jax.report.rows import KINDS

MODES = {
    "global": "global, fine-tuned",
    "layer": "layer-wise, fine-tuned",
    "random": "random, fine-tuned",
    "condense": "global, not fine-tuned",
    "scratch": "from scratch",
}
REFERENCES = {"none": "none (linear probe)", "full": "all"}
SEVENTY = 0.3  # is kept where 70 % go
TOLERANCE = 1.5  # points of test mIoU that may be lost, as in the study `prompts`
CLASS_COLOURS = ("#dfe2e6", "#0072B2", "#E69F00", "#009E73", "#D55E00")
CLAIM_GLOBAL = "Global selection beats layer-wise selection on a dense task."
CLAIM_70 = "About 70 % of the prompts can go on a dense task."
CLAIM_SCORE = "The gradient score beats random selection on a dense task."


def show(result: Result) -> Section:
    """The study's section."""
    sizes, num = result["sizes"], result["num_prompts"]
    text = [
        "Scenes of one to three shapes in front of a texture, drawn at"
        f" {result['side']} px ({sizes['train']} to train, {sizes['val']} to validate,"
        f" {sizes['test']} to test); the classes are {', '.join(CLASSES)}. A linear"
        " head reads every patch, its logits are resized to pixels. mIoU is the mean"
        " over classes of intersection over union, of all test pixels together.",
        f"All {num} prompts and the head are tuned with the config's recipe from the"
        f" linear probe's head, scored by the loss over pixels ({result['score']}),"
        " selected and fine-tuned as the config says. From scratch, the same number is"
        f" spread evenly over the layers and tuned alike. {len(result['seeds'])} seeds,"
        " the same scenes; not everything is tried at every ratio.",
    ]
    drawings = {
        "transfer_ratio": (
            "Segmentation against prompts kept",
            "Means over seeds; bars are one sample standard deviation. Markers of a"
            " ratio are set apart to be seen.",
            _draw_ratios,
        ),
        "transfer_scenes": (
            "Scenes, truth and answers",
            f"The first test scenes, not chosen. Answers of seed {result['seeds'][0]}:"
            f" with all prompts, and with the {percent(SEVENTY)} that global selection"
            " keeps, fine-tuned.",
            _draw_scenes,
        ),
    }
    return Section(
        "Condensation on a dense task",
        text,
        [_table(result), _layers(result)],
        drawn(drawings, result),
        [
            _beats(CLAIM_GLOBAL, result, "global", "layer"),
            _seventy(result),
            _beats(CLAIM_SCORE, result, "global", "random"),
        ],
    )


def of(
    result: Result, mode: str, ratio: float, what: str = "iou", split: str = "test"
) -> np.ndarray:
    """A number of every seed, in per cent, `[seeds]`."""
    wanted = (mode, ratio)
    rows = [row for row in result["rows"] if (row["mode"], row["ratio"]) == wanted]
    return np.asarray([row[split][what] for row in rows])


def _text(differences: np.ndarray) -> str:
    return f"{with_margin(differences)} points (paired by seed, 95 % interval)"


def _ratios(result: Result) -> list[float]:
    """Falling, of what is selected."""
    found = {row["ratio"] for row in result["rows"] if row["mode"] in MODES}
    return sorted(found, reverse=True)


def _beats(claim: str, result: Result, better: str, worse: str) -> Verdict:
    """Decided by the mean over ratios of the paired difference."""
    modes = {(row["mode"], row["ratio"]) for row in result["rows"]}
    ratios = [r for r in _ratios(result) if {(better, r), (worse, r)} <= modes]
    each = [of(result, better, ratio) - of(result, worse, ratio) for ratio in ratios]
    mean = np.mean(each, axis=0)
    by_ratio = ", ".join(
        f"{own.mean():+.2f} at {percent(ratio)}"
        for own, ratio in zip(each, ratios, strict=True)
    )
    because = (
        f"test mIoU, {MODES[better]} minus {MODES[worse]}, mean over ratios:"
        f" {_text(mean)}; {by_ratio}."
    )
    return verdict(claim, clear(mean), because)


def _seventy(result: Result) -> Verdict:
    """Supported if the loss at 30 % is clearly within the tolerance."""
    full, kept = of(result, "full", 1.0), of(result, "global", SEVENTY)
    gained = np.mean(full - of(result, "none", 0.0))
    because = (
        f"test mIoU with {percent(SEVENTY)} of the prompts minus that with all:"
        f" {_text(kept - full)}; a loss of {TOLERANCE} is allowed. All prompts gain"
        f" {gained:.2f} points over none."
    )
    return verdict(CLAIM_70, clear(TOLERANCE - (full - kept)), because)


def _kinds(result: Result) -> list[tuple[str, float, str, str]]:
    """Mode, ratio, and how a table names them, in the order of the rows."""
    ends = (("none", 0.0), ("full", 1.0))
    kinds = [(mode, ratio, percent(ratio), REFERENCES[mode]) for mode, ratio in ends]
    there = {(row["mode"], row["ratio"]) for row in result["rows"]}
    for ratio in _ratios(result):
        modes = [mode for mode in MODES if (mode, ratio) in there]
        kinds += [(mode, ratio, percent(ratio), MODES[mode]) for mode in modes]
    return kinds


def _table(result: Result) -> Table:
    full, rows = of(result, "full", 1.0), []
    for mode, ratio, kept, name in _kinds(result):
        iou = of(result, mode, ratio)
        lost = with_margin(full - iou) if mode != "full" else ""
        others = (("accuracy", "test"), ("iou", "val"), ("accuracy", "val"))
        numbers = [spread(of(result, mode, ratio, *other)) for other in others]
        rows.append([kept, name, spread(iou), lost, *numbers])
    header = ["Kept", "How", "Test mIoU %", "Lost", "Test pixels %"]
    return Table(
        [*header, "Val mIoU %", "Val pixels %"],
        rows,
        "Means over seeds ± one sample standard deviation; lost: points of test mIoU"
        " against all prompts, paired by seed, 95 % interval. Pixels: share of"
        " pixels of the right class.",
    )


def _layers(result: Result) -> Table:
    """Prompts per layer; those not fine-tuned are the global ones."""
    rows = []
    for mode, ratio, kept, name in _kinds(result):
        if mode in ("none", "condense"):
            continue
        found = [r for r in result["rows"] if (r["mode"], r["ratio"]) == (mode, ratio)]
        counts = np.mean([row["counts"] for row in found], axis=0)
        rows.append([kept, name, *(f"{count:.1f}" for count in counts)])
    header = ["Kept", "How", *(f"Layer {i}" for i in range(1, len(rows[0]) - 1))]
    return Table(header, rows, "Prompts per layer, means over seeds.")


def _draw_ratios(figure: Any, result: Result) -> None:
    ratios = _ratios(result)[::-1]
    names = {"iou": "Test mIoU (%)", "accuracy": "Test pixels right (%)"}
    for axes, (what, name) in zip(figure.subplots(1, 2), names.items(), strict=True):
        for number, (mode, label) in enumerate(MODES.items()):
            tried = [r for r in ratios if len(of(result, mode, r))]
            values = np.asarray([of(result, mode, r, what) for r in tried])
            offset = 0.6 * ((number + 0.5) / len(MODES) - 0.5)
            axes.errorbar(
                np.array([ratios.index(r) for r in tried]) + offset,
                values.mean(axis=1),
                deviation(values),
                linestyle="",
                capsize=3,
                marker=KINDS[mode][1],
                color=KINDS[mode][0],
                label=label.capitalize(),
            )
        for mode, ratio, style in (("full", 1.0, "-"), ("none", 0.0, "--")):
            y = of(result, mode, ratio, what).mean()
            label = f"Prompts: {REFERENCES[mode]}"
            axes.axhline(y, color="black", linestyle=style, lw=1.3, label=label)
        axes.set_xticks(range(len(ratios)), [percent(ratio) for ratio in ratios])
        axes.set(xlabel="Prompts kept (% of all)", ylabel=name)
        axes.set(xlim=(-0.5, len(ratios) - 0.5))


def _draw_scenes(figure: Any, result: Result) -> None:
    from matplotlib.colors import ListedColormap

    shown = result["shown"]
    rows = {"image": "Scene", "truth": "Truth", "full": "All prompts"}
    rows["kept"] = f"{percent(SEVENTY)} of them"
    all_axes = figure.subplots(len(rows), len(shown["image"]), squeeze=False)
    colours = ListedColormap(CLASS_COLOURS)
    for own, (name, label) in zip(all_axes, rows.items(), strict=True):
        own[0].set_ylabel(label, fontsize=9)
        for axes, picture in zip(own, shown[name], strict=True):
            look = {"cmap": colours, "vmin": -0.5, "vmax": len(CLASSES) - 0.5}
            look = {} if name == "image" else look
            axes.imshow(np.asarray(picture, np.uint8), interpolation="nearest", **look)
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            axes.spines[:].set_visible(False)
    # For the legend, which lists what has a label.
    for colour, name in zip(CLASS_COLOURS, CLASSES, strict=True):
        all_axes[0, 0].plot([], [], "s", color=colour, label=name.capitalize())
