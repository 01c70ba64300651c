# SPDX-License-Identifier: Apache-2.0
"""Report of a run: table on the terminal, report.json and a self-contained report.html.

All is computed from the dict that report.json holds, so that
`python -m vpt_jax.report WORKDIR` can render the page again. Names and means are those
of `vpt_jax.rows`, figures those of `vpt_jax.figures`.
"""

import argparse
import dataclasses
import importlib.resources
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from vpt_jax import figures
from vpt_jax.rows import Row, default_score, kind, label, per_picture, summarise

LIMIT = 1.5  # points of test accuracy that condensed prompts may lose
HEADER = (
    "Model",
    "Prompts",
    "Test\n%",
    "Val\n%",
    "MACs",
    "MACs\nref.",
    "Time\nms",
    "Tuned\nparams",
    "Seeds",
)
# What prompt condensation is compared with at the same ratio, by the kind of the rows.
CONTROLS = {"scratch": "from scratch", "random": "random", "layer": "PC layer"}


def _cells(group: Row, default: str) -> list[str]:
    """The texts of a group's line in the table, in the order of `HEADER`."""
    low, high = group["prompts_min"], group["prompts_max"]
    latency = group["latency_ms"]
    return [
        label(group, default),
        f"{low:,}" if low == high else f"{low:,} to {high:,}",
        _percent(group["test_accuracy"], group["test_sd"]),
        _percent(group["val_accuracy"], group["val_sd"]),
        _with_prefix(group["macs"]),
        _with_prefix(group["macs_reference"]),
        "" if latency is None else _three_digits(latency),
        f"{group['tuned_params']:,}",
        str(group["n"]),
    ]


def _percent(mean: float, deviation: float | None) -> str:
    text = f"{100 * mean:.1f}"
    return text if deviation is None else f"{text} ± {100 * deviation:.1f}"


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def _with_prefix(value: float) -> str:
    """Three digits and an SI prefix: 81240000 is "81.2 M"."""
    power = int(math.log10(max(value, 1)) // 3)
    prefix = ("", "k", "M", "G", "T", "P")[power]
    return f"{_three_digits(value / 1000**power)} {prefix}"


def print_table(report: Row, file: Any = None) -> None:
    """Prints the results as a table.

    Args:
      report: The content of report.json.
      file: Where to print, by default standard output. The table is plain text where
        this is not a terminal.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=file, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:  # no window to fit into
        console.width = max(100, console.width)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column(HEADER[0], justify="left")
    for name in HEADER[1:]:
        table.add_column(name, justify="right", no_wrap=True)

    default = default_score(report)
    previous_ratio = 1.0
    for group in summarise(report["rows"], default):
        ratio = group["keep_ratio"]
        # An empty line before every ratio but those of the references.
        if ratio not in (previous_ratio, 0.0, 1.0):
            table.add_section()
        previous_ratio = ratio
        table.add_row(*_cells(group, default))
    console.print(table)
    time = per_picture(report)
    console.print(f"± standard deviation over seeds. MACs: per picture. Time: {time}.")


@dataclasses.dataclass(frozen=True)
class _Difference:
    """Points of test accuracy of one model minus another, the mean over seeds."""

    points: float
    error: float | None  # standard error of the mean, None with one seed
    seeds: int

    @property
    def unit(self) -> str:
        seeds = "one seed" if self.seeds == 1 else f"{self.seeds} paired seeds"
        return f" points ({seeds})"

    def text(self, number_format: str) -> str:
        """The number and its error, such as "+1.20 ± 0.30", without the unit."""
        number = format(self.points, number_format).replace("-", "\N{MINUS SIGN}")
        return number if self.error is None else f"{number} ± {self.error:.2f}"


def _difference(rows: list[Row], others: list[Row]) -> _Difference | None:
    """`rows` minus `others`, paired by seed; None without a common seed."""
    ours = {row["seed"]: 100 * row["test_accuracy"] for row in rows}
    theirs = {row["seed"]: 100 * row["test_accuracy"] for row in others}
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return None
    deltas = np.array([ours[seed] - theirs[seed] for seed in common])
    error = None
    if len(common) > 1:
        error = float(deltas.std(ddof=1) / math.sqrt(len(common)))
    return _Difference(float(deltas.mean()), error, len(common))


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
    """What the numbers say.

    Args:
      report: The content of report.json.

    Returns:
      Sentences; their differences are paired by seed.
    """
    sentences = []
    tuned = _find(report, "tune", 1.0)
    difference = _difference(tuned, _find(report, "linear", 0.0))
    if difference is not None:
        minus = _list_differences({"the linear probe": difference})
        sentences.append(f"All prompts (100 %) {minus}.")
    for ratio in sorted({row["keep_ratio"] for row in report["rows"]}, reverse=True):
        sentences += _verdict_at(report, ratio, tuned)

    if any("±" in sentence for sentence in sentences):
        sentences.append(
            "± is the standard error of the mean difference over paired seeds."
        )
    if any("(one seed)" in sentence for sentence in sentences):
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
    against_tuned = _difference(condensed, tuned)
    if against_tuned is not None:
        sentences.append(f"{name} {_gap(against_tuned)}")
    differences = {}
    for control, control_name in CONTROLS.items():
        difference = _difference(condensed, _find(report, control, ratio))
        if control != scope and difference is not None:
            differences[control_name] = difference
    if differences:
        sentences.append(f"{name} {_list_differences(differences)}.")
    return sentences


def _gap(difference: _Difference) -> str:
    """Whether the loss against all prompts is within the limit."""
    verb = "loses" if difference.points < 0 else "gains"
    size = dataclasses.replace(difference, points=abs(difference.points))
    # Rounded, as 83.5 - 85.0 may be a hair below -1.5.
    within = round(difference.points, 9) >= -LIMIT
    return (
        f"{verb} {size.text('.2f')}{size.unit} against all prompts:"
        f" it is {'' if within else 'NOT '}within {LIMIT} points."
    )


def _list_differences(differences: dict[str, _Difference]) -> str:
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
    """Renders the report as one HTML file that loads nothing.

    Args:
      report: The content of report.json.

    Returns:
      The text of the file.
    """
    backbone = report["backbone"]
    title = f"Prompts for {report['task']}: {backbone['name']} ({backbone['variant']})"
    assets = importlib.resources.files("vpt_jax") / "assets"
    css = (assets / "report.css").read_text(encoding="utf-8")
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in verdict(report))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width,initial-scale=1">
<style>
{css}</style></head><body>
<h1>{escape(title)}</h1>
<ul>{sentences}</ul>
<h2>Results</h2>{_html_table(report)}
<p class="soft">Accuracies are means over seeds, ± one sample standard deviation. PC is
prompt condensation. MACs (multiply-accumulates) are per picture; ref. counts prompts as
tokens of every layer, as papers do. Time is {per_picture(report)}.</p>
{_html_figures(report)}
{_html_details(report)}</body></html>
"""


def _html_table(report: Row) -> str:
    default = default_score(report)
    header = "".join(f"<th>{escape(name)}</th>" for name in HEADER)
    lines = []
    for group in summarise(report["rows"], default):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in _cells(group, default))
        lines.append(f"<tr>{cells}</tr>")
    return f"""<div class="wide"><table><thead><tr>{header}</tr></thead>
<tbody>{"".join(lines)}</tbody></table></div>"""


def _html_figures(report: Row) -> str:
    captions = figures.captions(report)
    sections = []
    for name, svg in figures.draw(report).items():
        heading, caption = captions[name]
        sections.append(
            f"<section><h2>{escape(heading)}</h2>"
            f'<figure><div class="card wide">{svg}</div>'
            f'<figcaption class="soft"><p>{escape(caption)}</p></figcaption></figure>'
            "</section>"
        )
    return "".join(sections)


def _html_details(report: Row) -> str:
    """How the run was made: whatever else the report holds."""
    shown_above = ("task", "importance", "rows", "latency_batch")
    headings = {"seconds": "Seconds per stage, all seeds together"}
    parts = []
    for name, value in report.items():
        if name in shown_above or not value:
            continue
        heading = headings.get(name, name.capitalize())
        text = value if isinstance(value, str) else json.dumps(value, indent=2)
        parts.append(f"<h2>{escape(heading)}</h2><pre>{escape(text)}</pre>")
    return "".join(parts)


def write(report: Row, workdir: str | Path) -> None:
    """Writes `report.json` and `report.html` into `workdir`."""
    from vpt_jax import workdir as files  # imports Orbax, which takes seconds

    page = html(report)  # fails before anything is written
    files.write_json(Path(workdir) / "report.json", report)
    files.write_text(Path(workdir) / "report.html", page)


def main(argv: Sequence[str] | None = None) -> None:
    """Renders `report.html` again from `report.json` and prints the table."""
    from vpt_jax import workdir as files  # imports Orbax, which takes seconds

    parser = argparse.ArgumentParser(prog="python -m vpt_jax.report")
    parser.add_argument("workdir", type=Path, help="folder with report.json")
    workdir = parser.parse_args(argv).workdir
    source, target = workdir / "report.json", workdir / "report.html"
    try:
        report = json.loads(source.read_text(encoding="utf-8"))
        page = html(report)
    except FileNotFoundError:
        run = f"python -m vpt_jax.main --config=CONFIG --workdir={workdir}"
        parser.error(f"{workdir} has no report.json; a finished run writes it: {run}")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        parser.error(f"{source} is not a report ({e!r}).")
    files.write_text(target, page)
    print_table(report)
    print(f"Wrote {target}")


if __name__ == "__main__":
    main()
