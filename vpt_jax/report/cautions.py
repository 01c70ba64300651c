# SPDX-License-Identifier: Apache-2.0
"""What a person should know before he believes a report: a sentence each, or none."""

import math
from typing import Any

import numpy as np

from vpt_jax.report.rows import Row, default_score, label

WIDE = 10.0  # points that an interval of a test accuracy may span without a word


def interval(share: float, num: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of right answers among `num` pictures.

    Example:
      >>> [round(x, 3) for x in interval(0.9, 100)]
      [0.826, 0.945]
    """
    z = 1.959964
    middle = (share + z**2 / (2 * num)) / (1 + z**2 / num)
    half = z / (1 + z**2 / num)
    half *= math.sqrt(share * (1 - share) / num + z**2 / (4 * num**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def of(report: Row) -> list[str]:
    """Sentences about the rows and data of report.json, with what to do next."""
    rows, num, default = report["rows"], report["data"]["test"], default_score(report)
    found = [f"{text[:1].upper()}{text[1:]}." for text in report.get("doubts", ())]
    found += _below_probe(rows)
    for row in rows:
        if text := _not_learnt(row, report["data"]["classes"]):
            found.append(f"{label(row, default)}, seed {row['seed']}: {text}")
    tuned = [r["test_accuracy"] for r in rows if r["stage"] == "tune"]
    tuned = [share for share in tuned if share is not None]
    if tuned and num:
        low, high = interval(tuned[0], num)
        if 100 * (high - low) >= WIDE:
            three = (f"{100 * x:.0f}" for x in (tuned[0], low, high))
            found.append(
                "The test set has {} pictures: an accuracy of {} % may as well be {} or"
                " {} % (95 % interval). Compare models with more test pictures.".format(
                    num, *three
                )
            )
    return found


def _below_probe(rows: list[Row]) -> list[str]:
    """Where tuned prompts are not better than the linear probe on val."""

    def mean(stage: str) -> float:
        found: list[Any] = [r["val_accuracy"] for r in rows if r["stage"] == stage]
        return math.nan if None in found or not found else 100 * float(np.mean(found))

    tuned, probe = mean("tune"), mean("linear")
    if not tuned <= probe:  # also where one is not known
        return []
    return [
        f"Prompts did not help: on val {tuned:.1f} % with all of them, {probe:.1f} %"
        " with the linear probe. Use the probe, or try more epochs"
        " (--config.tune.epochs), other rates (--config.search.rates), a larger"
        " backbone or picture size."
    ]


def _not_learnt(row: Row, classes: int) -> str:
    """Why a training that ended cannot have learnt, or nothing."""
    losses = row.get("losses") or ()
    if not losses:
        return ""
    first, last, chance = losses[0], losses[-1], math.log(classes)
    if last >= chance:
        what = f"ended at a loss of {last:.2f}, no better than guessing ({chance:.2f})"
    elif len(losses) > 1 and last > first:
        what = f"its loss ended at {last:.2f}, above the first epoch's {first:.2f}"
    else:
        return ""
    return f"{what}. Lower its rate (base_lr), or leave it out so that it is searched."
