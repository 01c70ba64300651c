# SPDX-License-Identifier: Apache-2.0
"""Do more prompts help, and how many can go? Accuracy against their number.

The paper's first claim (Kim et al., arXiv 2305.17223): accuracy does not grow linearly
with prompts, and about 70 % can go. Here every number of prompts is trained from
scratch, and the config's number is condensed to every ratio, with several seeds.
All comparisons are paired by seed.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from studies import study
from studies.growth import held_out
from studies.study import (
    Lab,
    Result,
    Section,
    Table,
    clear,
    deviation,
    spread,
    with_margin,
)
from vpt_jax.report.rows import KINDS
from vpt_jax.run import stages
from vpt_jax.run.stages import Unit

COUNTS = (1, 2, 6, 10, 20, 40)  # per layer
RATIOS = (0.5, 0.3, 0.1)
TOLERANCE = 1.5  # points of test accuracy that may be lost: the project's own goal
CLAIM_SUBLINEAR = "More prompts do not help linearly."
CLAIM_70 = "About 70 % of the prompts can go without losing accuracy."
MODES = {
    "finetune": "PC, fine-tuned",
    "condense": "PC, not fine-tuned",
}


def run(
    lab: Lab, *, counts: Sequence[int] = COUNTS, ratios: Sequence[float] = RATIOS
) -> Result:
    """Trains and evaluates; percent of the test set by count or ratio, then by seed."""
    seeds = lab.config.seeds
    by_count: dict[str, list[float]] = {}
    for count in counts:
        with study.running(lab, prompts={"num_prompts": count}) as shared:
            by_count[str(count)] = [_accuracy(shared, Unit("tune", s)) for s in seeds]
    by_ratio: dict[str, dict[str, list[float]]] = {mode: {} for mode in MODES}
    with study.running(lab) as shared:
        none = [_accuracy(shared, Unit("linear", s, keep_ratio=0.0)) for s in seeds]
        full = [_accuracy(shared, Unit("tune", s)) for s in seeds]
        for ratio in ratios:
            for mode in MODES:
                score = lab.config.score.score
                units = [Unit(mode, s, score, "global", ratio) for s in seeds]
                found = [_accuracy(shared, unit) for unit in units]
                by_ratio[mode][str(ratio)] = found
    return {
        "seeds": list(seeds),
        "num_prompts": lab.config.prompts.num_prompts,
        "none": none,
        "by_count": by_count,
        "full": full,
        "by_ratio": by_ratio,
    }


def _accuracy(shared: stages.Run, unit: Unit) -> float:
    row = stages.run_unit(shared, unit, "prompts")["row"]
    return 100 * row["test_accuracy"]


def held_out_errors(counts: Sequence[int], values: np.ndarray) -> dict[str, float]:
    """Root mean square error of two laws, each count predicted from the others.

    Args:
      counts: Prompts per layer, three or more.
      values: Accuracies `[counts]`.

    Returns:
      Of `linear` (a + b m) and `log` (a + b log m), in the unit of `values`.
    """
    m = np.asarray(counts, float)
    laws = {"linear": m, "log": np.log(m)}
    return {n: float(held_out(x, values, "linear")) for n, x in laws.items()}


def knee(counts: Sequence[int], values: np.ndarray) -> int:
    """The fewest prompts that are not clearly worse than the best number.

    Clearly: as `study.clear` says of the paired differences.

    Args:
      counts: Rising.
      values: Accuracies `[counts, seeds]`, two or more seeds.
    """
    best = values[values.mean(axis=1).argmax()]
    for count, own in zip(counts, values, strict=True):
        if not clear(best - own):
            return count
    raise AssertionError("the best number is not worse than itself")


def show(result: Result) -> Section:
    """The study's section."""
    drawings = {
        "prompts_count": ("Accuracy against prompts trained", _BARS, _draw_counts),
        "prompts_ratio": ("Accuracy against prompts kept", _BARS, _draw_ratios),
    }
    (counts, values), full = _by_count(result), np.asarray(result["full"])
    return Section(
        "Accuracy against the number of prompts",
        [
            f"Every number of prompts per layer is trained from scratch with the same"
            f" recipe, {len(result['seeds'])} seeds; then the"
            f" {result['num_prompts']} prompts per layer of the config are scored and"
            " condensed over all layers."
        ],
        [_counts_table(result, counts, values), _ratios_table(result, full)],
        study.drawn(drawings, result),
        [_sublinear(counts, values), _seventy(result, full)],
    )


def _by_count(result: Result) -> tuple[list[int], np.ndarray]:
    """Numbers of prompts per layer, and accuracies `[counts, seeds]`."""
    by_count = result["by_count"]
    return [int(count) for count in by_count], np.asarray(list(by_count.values()))


def _sublinear(counts: Sequence[int], values: np.ndarray) -> study.Verdict:
    """Supported if the logarithm predicts better than the line, for all seeds alike."""
    errors = [held_out_errors(counts, own) for own in values.T]
    gain = [e["linear"] - e["log"] for e in errors]
    text = (
        "held-out error of a + b m minus that of a + b log m:"
        f" {with_margin(gain)} points (95 % interval over seeds)"
    )
    if values.shape[1] > 1:
        text += f"; {knee(counts, values)} prompts per layer are not clearly worse"
        text += f" than the best of {list(counts)}"
    return study.verdict(CLAIM_SUBLINEAR, clear(gain), text)


def _seventy(result: Result, full: np.ndarray) -> study.Verdict:
    """Supported if the loss at 30 % is clearly within the tolerance."""
    own = np.asarray(result["by_ratio"]["finetune"]["0.3"])
    text = (
        f"at 30 % the fine-tuned prompts lose {with_margin(full - own)} points (paired,"
        f" 95 % interval over seeds); {TOLERANCE} are allowed"
    )
    return study.verdict(CLAIM_70, clear(TOLERANCE - (full - own)), text)


def _counts_table(result: Result, counts: Sequence[int], values: np.ndarray) -> Table:
    rows = [["0 (linear probe)", *_mean_and_spread(np.asarray(result["none"]))]]
    for count, own in zip(counts, values, strict=True):
        rows.append([str(count), *_mean_and_spread(own)])
    header = ["Prompts per layer, from scratch", "Test %", "Seeds %"]
    return Table(header, rows, "± one sample standard deviation over seeds.")


def _ratios_table(result: Result, full: np.ndarray) -> Table:
    rows = [["100 %", "all", *_mean_and_spread(full), ""]]
    for mode, name in MODES.items():
        for ratio, found in result["by_ratio"][mode].items():
            own = np.asarray(found)
            kept = study.percent(float(ratio))
            rows.append([kept, name, *_mean_and_spread(own), with_margin(full - own)])
    header = ["Kept", "How", "Test %", "Seeds %", "Lost, paired"]
    return Table(header, rows, "Lost: points against all prompts, 95 % interval.")


def _mean_and_spread(values: np.ndarray) -> list[str]:
    return [spread(values), ", ".join(f"{value:.1f}" for value in values)]


_BARS = "Means over seeds; bars are one sample standard deviation."


def _draw_counts(figure: Any, result: Result) -> None:
    axes, (counts, values) = figure.subplots(), _by_count(result)
    y, bars = values.mean(axis=1), deviation(values)
    axes.errorbar(counts, y, bars, marker="o", label="from scratch")
    axes.axhline(np.mean(result["none"]), color="black", ls="--", label="none")
    axes.set(xlabel="Prompts per layer", ylabel="Test accuracy (%)")
    axes.set_xlim(left=0)


def _draw_ratios(figure: Any, result: Result) -> None:
    axes = figure.subplots()

    def line(percent: Any, values: np.ndarray, style: str, label: str) -> None:
        look = dict(zip(("color", "marker"), KINDS[style], strict=True))
        y, bars = values.mean(axis=1), deviation(values)
        axes.errorbar(percent, y, bars, label=label, **look)

    for mode, style in (("finetune", "global"), ("condense", "condense")):
        own = result["by_ratio"][mode]
        kept = [100 * float(ratio) for ratio in own]
        line(kept, np.asarray(list(own.values())), style, MODES[mode])
    (counts, values), num = _by_count(result), result["num_prompts"]
    few = [i for i, c in enumerate(counts) if c <= num]
    kept = [100 * counts[i] / num for i in few]
    line(kept, values[few], "scratch", "as many, trained from scratch")
    axes.axhline(np.mean(result["full"]), color="black", label="all prompts")
    axes.set(xlabel="Prompts kept (% of all)", ylabel="Test accuracy (%)")
    axes.set_xlim(0, 100)


if __name__ == "__main__":
    study.start("prompts", sys.modules[__name__])
