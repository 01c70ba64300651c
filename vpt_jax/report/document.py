# SPDX-License-Identifier: Apache-2.0
"""Report of a run: table on the terminal, report.json and a self-contained report.html.

All is computed from the content of report.json, so that
`python -m vpt_jax.report WORKDIR` can render the page again.
"""

import math
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vpt_jax.report import cautions, figures, looks, page, tables
from vpt_jax.report.rows import Row, default_score, kind, label, summarise
from vpt_jax.report.tables import percent, three_digits, with_prefix

LIMIT = 1.5  # points of test accuracy that condensed prompts may lose
HEADER = ("Model", "Prompts", "Test\n%", "Val\n%", "MACs", "MACs\nref.", "Time\nms")
HEADER += ("Tuned\nparams", "Seeds")
# What prompt condensation is compared with at the same ratio, by the kind of the rows.
CONTROLS = {"scratch": "from scratch", "random": "random", "layer": "PC layer"}


def _table(report: Row) -> tables.Table:
    """A line per group; a section per ratio but those of the references."""
    default, num_test = default_score(report), report["data"]["test"]
    rows, sections, before = [], set(), 1.0
    for group in summarise(report["rows"], default):
        ratio = group["keep_ratio"]
        if ratio not in (before, 0.0, 1.0):
            sections.add(len(rows))
        before = ratio
        rows.append(_cells(group, default, num_test))
    return tables.Table(HEADER, rows, sections=sections)


def _cells(group: Row, default: str, num_test: int) -> list[str]:
    """The texts of a group's line in the table, in the order of `HEADER`."""
    test = percents(group, "test")
    if test and group["n"] == 1 and num_test:
        ends = cautions.interval(group["test_accuracy"], num_test)
        test += " [{:.1f}, {:.1f}]".format(*(100 * end for end in ends))
    low, high = group["prompts_min"], group["prompts_max"]
    latency, spread = group["latency_ms"], group.get("latency_spread")
    time = "" if latency is None else three_digits(latency)
    return [
        label(group, default),
        f"{low:,}" if low == high else f"{low:,} to {high:,}",
        test,
        percents(group, "val"),
        with_prefix(group["macs"]),
        with_prefix(group["macs_reference"]),
        time + (f" ± {spread:.1g}" if spread and time else ""),
        f"{group['tuned_params']:,}",
        str(group["n"]),
    ]


def percents(group: Row, split: str) -> str:
    """Mean accuracy and deviation of a group on a split, or nothing."""
    mean, deviation = group[f"{split}_accuracy"], group[f"{split}_sd"]
    if mean is None:  # not measured: those pictures were trained on
        return ""
    return percent(100 * mean, None if deviation is None else 100 * deviation)


def print_table(report: Row, file: Any = None) -> None:
    """Prints the results as a table; plain text where `file` is no terminal."""
    console = tables.console(file)
    tables.show(console, _table(report))
    console.print(
        "± standard deviation over seeds. MACs: per picture. Time: per picture, in"
        f" batches of {report['latency_batch']}, ± half an interquartile range."
    )


class Difference(NamedTuple):
    """Points of test accuracy of one model minus another, the mean over seeds."""

    points: float
    error: float | None  # standard error of the mean, None with one seed
    unit: str

    def text(self, number_format: str) -> str:
        """The number and its error, such as "+1.20 ± 0.30", without the unit."""
        number = format(self.points, number_format).replace("-", "\N{MINUS SIGN}")
        return number if self.error is None else f"{number} ± {self.error:.2f}"


def paired(rows: list[Row], others: list[Row]) -> Difference | None:
    """`rows` minus `others`, paired by seed; None without a common seed."""
    ours = {row["seed"]: 100 * row["test_accuracy"] for row in rows}
    theirs = {row["seed"]: 100 * row["test_accuracy"] for row in others}
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return None
    deltas, n = np.array([ours[seed] - theirs[seed] for seed in common]), len(common)
    error = float(deltas.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    seeds = f"{n} paired seeds" if n > 1 else "one seed"
    return Difference(float(deltas.mean()), error, f" points ({seeds})")


def _find(report: Row, wanted: str, ratio: float) -> list[Row]:
    """The rows of one kind and ratio, one per seed; other scores are left out."""
    scores = (None, default_score(report), "random")
    found = [
        row
        for row in report["rows"]
        if kind(row) == wanted and row["keep_ratio"] == ratio and row["score"] in scores
    ]
    # Of two controls, that of the global cut.
    return [row for row in found if row["scope"] != "layer"] or found


def verdict(report: Row) -> list[str]:
    """Sentences about what the numbers say; differences are paired by seed."""
    sentences = []
    tuned = _find(report, "tune", 1.0)
    if difference := paired(tuned, _find(report, "linear", 0.0)):
        minus = _list_differences({"the linear probe": difference})
        sentences.append(f"All prompts (100 %) {minus}.")
    for ratio in sorted({row["keep_ratio"] for row in report["rows"]}, reverse=True):
        sentences += _verdict_at(report, ratio, tuned)
    text = " ".join(sentences)
    if "±" in text:
        sentences.append(
            "± is the standard error of the mean difference over paired seeds."
        )
    if "(one seed)" in text:
        sentences.append(
            "One seed is no evidence of a difference: another may move every number."
            " Run five with --config.seeds='(0, 1, 2, 3, 4)' and another --workdir."
        )
    return sentences


def _verdict_at(report: Row, ratio: float, tuned: list[Row]) -> list[str]:
    """What the numbers say about prompt condensation at one ratio."""
    scope = "global" if _find(report, "global", ratio) else "layer"
    condensed = _find(report, scope, ratio)
    name = f"PC at {100 * ratio:.4g} % ({scope})"
    sentences = []
    if against_tuned := paired(condensed, tuned):
        sentences.append(f"{name} {_gap(against_tuned)}")
    differences = {
        control_name: difference
        for control, control_name in CONTROLS.items()
        if control != scope
        and (difference := paired(condensed, _find(report, control, ratio)))
    }
    if differences:
        sentences.append(f"{name} {_list_differences(differences)}.")
    return sentences


def _gap(difference: Difference) -> str:
    """Whether the loss against all prompts is within the limit."""
    verb = "loses" if difference.points < 0 else "gains"
    size = difference._replace(points=abs(difference.points))
    # Rounded, as 83.5 - 85.0 may be a hair below -1.5.
    within = round(difference.points, 9) >= -LIMIT
    return (
        f"{verb} {size.text('.2f')}{size.unit} against all prompts:"
        f" it is {'' if within else 'NOT '}within {LIMIT} points."
    )


def _list_differences(differences: dict[str, Difference]) -> str:
    """The differences by what is subtracted: "minus random +1.20 ± 0.30 points"."""
    last = list(differences)[-1]
    parts = []
    for name, difference in differences.items():
        part = f"minus {name} {difference.text('+.2f')}"
        # Where the unit is that of the last difference, it is said once, at the end.
        if name == last or difference.unit != differences[last].unit:
            part += difference.unit
        parts.append(part)
    return ", ".join(parts)


def html(report: Row) -> str:
    """Renders the report as one HTML file that loads nothing."""
    backbone, data = report["backbone"], report["data"]
    title = f"{report['task']}: prompts for a frozen {backbone['variant']}"
    shown_above = ("task", "importance", "rows", "latency_batch", "search", "doubts")
    shown_above += ("looks", "classes")
    details = {k: v for k, v in report.items() if k not in shown_above}
    headings = {"seconds": "Seconds per stage, all seeds together"}
    notes = cautions.of(report)
    warned = f"<h2>Before you believe it</h2>{page.bullets(notes)}" if notes else ""
    svgs = [figures.draw(report, width) for width in figures.WIDTHS]
    about = (
        f"{data['train']:,} training, {data['val']:,} validation and {data['test']:,}"
        f" test pictures of {data['classes']:,} classes, {data['image_size']} px;"
        f" backbone {backbone['name']}."
    )
    body = f"""<p class="soft">{escape(about)}</p>
{page.bullets(verdict(report))}
{warned}
<h2>Results</h2>{tables.html(_table(report))}
<p class="soft">Accuracies are means over seeds, ± one sample standard deviation, or of
one seed with the 95 % interval that so many test pictures leave. PC is
prompt condensation. MACs (multiply-accumulates) are per picture; ref. counts prompts as
tokens of every layer, as papers do. Time is per picture, in batches of
{report["latency_batch"]}: the median of nine, ± half of their interquartile range.</p>
{looks.html(report.get("looks", {}), report.get("classes", ()))}
{_search(report)}
{page.figures(*svgs, captions=figures.CAPTIONS)}
{page.details(details, headings)}"""
    return page.page(title, body)


def render(report: Row) -> dict[str, str]:
    """What is written beside report.json, by suffix."""
    return {"html": html(report)}


def _search(report: Row) -> str:
    """The trials of the rate's search, if there was one."""
    search, rows = report.get("search"), []
    if not search:
        return ""
    for row in search["trials"]:
        cells = f"{row['base_lr']:g}", row["head_init"], str(row["planned_epochs"])
        rows.append([*cells, f"{100 * row['val_accuracy']:.1f}"])
    table = tables.Table(("Rate", "Head from", "Epochs", "Val %"), rows)
    return f"""<h2>How the rate was found</h2><p>{escape(search["sentence"])}</p>
{tables.html(table)}"""


def write(report: Row, workdir: str | Path) -> None:
    """Writes `report.json` and `report.html` into `workdir`."""
    from vpt_jax.files import workdirs  # imports Orbax, which takes seconds

    page = html(report)  # fails before anything is written
    workdirs.write_json(Path(workdir) / "report.json", report)
    workdirs.write_text(Path(workdir) / "report.html", page)
