# SPDX-License-Identifier: Apache-2.0
"""The rows of a report: what they are called, their order, their means over seeds.

A row is one evaluated model of one seed. The rows that differ in nothing but the seed
make a group, which has the same keys and holds their means.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]

# What a row is compared as, in the order of the table: its colour (Okabe and Ito's,
# distinct to colour-blind eyes), and its marker or the style of its line.
KINDS = {
    "linear": ("black", "--"),
    "tune": ("black", "-"),
    "global": ("#0072B2", "o"),
    "layer": ("#E69F00", "s"),
    "condense": ("#D55E00", "X"),
    "random": ("#777777", "^"),
    "scratch": ("#009E73", "D"),
}
# These kinds have no ratio of kept prompts: the others are measured against them.
REFERENCE_KINDS = ("linear", "tune")


def kind(row: Row) -> str:
    """What a row or group is compared as: one of `KINDS`."""
    if row["stage"] != "finetune":
        return row["stage"]
    if row["score"] == "random":
        return "random"
    return row["scope"] or "global"


def default_score(report: Row) -> str:
    """The score that the report is about; names of rows leave it out."""
    return report["importance"]["score"]


def label(row: Row, default: str, *, ratio: bool = True) -> str:
    """The name of a row or group, such as "PC global 30 %", with or without the ratio.

    `default` is the score that goes without saying.
    """
    if row["stage"] == "linear":
        return "Linear probe"
    if row["stage"] == "tune":
        return "All prompts (100 %)"

    if row["stage"] == "scratch":
        name = "From scratch"
    elif row["score"] == "random":
        name = "Random"
    else:
        name = "PC"
    # Controls are cut globally unless they say otherwise.
    if name == "PC" or row["scope"] == "layer":
        name += f" {row['scope'] or 'global'}"
    if ratio:
        name += f" {100 * row['keep_ratio']:.4g} %"
    if row["score"] not in (None, "random", default):
        name += f" ({row['score']})"
    if row["stage"] == "condense":
        name += ", not fine-tuned"
    return name


def place(row: Row, default: str) -> tuple:
    """What rows of one group have in common; groups sort by it as in the table."""
    row_kind, score = kind(row), row["score"] or ""
    # The references come first: no ratio is above 1.
    ratio = 2.0 if row_kind in REFERENCE_KINDS else row["keep_ratio"]
    other_score = score not in ("", default)
    return -ratio, list(KINDS).index(row_kind), row["scope"] or "", other_score, score


def summarise(rows: Sequence[Row], default: str) -> list[Row]:
    """Averages the rows of a report over seeds.

    One group per (stage, score, scope, keep_ratio): linear probe, all prompts, then by
    falling ratio, the `default` score first. Like a row, with means over its `n` seeds,
    `counts` of the first seed, and sample deviations `val_sd` and `test_sd` (None with
    one seed).
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(place(row, default), []).append(row)
    return [_average(groups[key]) for key in sorted(groups)]


def _average(rows: list[Row]) -> Row:
    """One group from the rows that differ in the seed."""
    rows = sorted(rows, key=lambda row: row["seed"])
    group = {name: value for name, value in rows[0].items() if name != "seed"}
    group["n"] = len(rows)
    for name in ("macs", "macs_reference"):
        group[name] = float(np.mean([row[name] for row in rows]))
    for split in ("val", "test"):
        accuracies = [row[f"{split}_accuracy"] for row in rows]
        # None where the validation pictures were trained on too.
        known = None not in accuracies
        group[f"{split}_accuracy"] = float(np.mean(accuracies)) if known else None
        several = known and len(rows) > 1
        group[f"{split}_sd"] = float(np.std(accuracies, ddof=1)) if several else None
    for name in ("latency_ms", "latency_spread"):
        # A resumed run may lack those of some seeds.
        timed = [x for row in rows if (x := row.get(name)) is not None]
        group[name] = float(np.mean(timed)) if timed else None
    totals = [sum(row["counts"]) for row in rows]
    group["prompts_min"], group["prompts_max"] = min(totals), max(totals)
    group["mean_counts"] = np.mean([row["counts"] for row in rows], axis=0).tolist()
    return group
