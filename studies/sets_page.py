# SPDX-License-Identifier: Apache-2.0
"""What the study `sets` shows: tables; which way is better is read off differences."""

from typing import Any

import numpy as np

from studies.study import Result, Section, Table, percent, spread, with_margin

BASE = "removal"  # what every way is compared with
WAYS = ("removal", "elimination", "growth", "relocation", "random")
TEXT = (
    "A few of the tuned prompts are kept: by the default score (removal), by"
    " elimination of sets, by chance, or the default's of which, three times while they"
    " are tuned, a third is replaced (growth) or idle ones change layer (relocation),"
    " all for the same epochs. Test accuracies; differences are paired by seed, with"
    " 95 % intervals."
)


def show(result: Result) -> Section:
    """All tables; no verdicts and no figures."""
    tables = [_ways(result), _layers(result), _doubled(result), _agreement(result)]
    return Section("Selection that sees sets", [TEXT], tables, [], [])


def _of(rows: list[dict[str, Any]], key: str, **about: Any) -> list[Any]:
    """A key of the rows of which all of `about` is true, in the order of seeds."""
    return [r[key] for r in rows if all(r[k] == v for k, v in about.items())]


def _ways(result: Result) -> Table:
    rows = []
    for way in WAYS:
        row = [way]
        for tuned in (False, True):
            own = _of(result["rows"], "test", way=way, tuned=tuned)
            base = _of(result["rows"], "test", way=BASE, tuned=tuned)
            if not own or way == BASE:
                row += [spread(own, 1) if own else "-", "-"]
                continue
            row += [spread(own, 1), with_margin(np.subtract(own, base), 1)]
        seconds = _of(result["rows"], "cpu_s", way=way, tuned=False)
        row.append(spread(seconds, 0) if seconds else "-")
        rows.append(row)
    kept = percent(result["ratio"])
    header = [f"{kept} kept by", "not tuned", "minus default", "tuned", "minus default"]
    return Table([*header, "CPU s to choose"], rows, "± one sample standard deviation.")


def _layers(result: Result) -> Table:
    rows = []
    for way in WAYS:
        kept = np.array(_of(result["rows"], "counts", way=way, tuned=True))
        rows.append([way, *(f"{n:.1f}" for n in kept.mean(axis=0))])
    header = ["Prompts kept in layer", *map(str, range(len(rows[0]) - 1))]
    return Table(header, rows, "Means over seeds; growth: at the end.")


def _doubled(result: Result) -> Table:
    rows = []
    for way in WAYS[:2]:
        one = 100 * np.array(_of(result["doubled"], "one_of_each", way=way))
        test = _of(result["doubled"], "test", way=way)
        rows.append([way, spread(one, 0), spread(test, 1)])
    header = ["Every prompt twice, half kept by", "pairs with one left, %", "test"]
    return Table(header, rows, "Not tuned.")


def _agreement(result: Result) -> Table:
    found = result["agreement"]
    sizes = sorted({row["size"] for row in found})
    names = [name for name in found[0] if name not in ("seed", "size")]
    rows = [[n, *(spread(_of(found, n, size=s)) for s in sizes)] for n in names]
    header = ["Spearman with the exact cost", *(f"sets of {s}" for s in sizes)]
    return Table(header, rows, "Of random sets of prompts.")
