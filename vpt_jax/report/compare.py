# SPDX-License-Identifier: Apache-2.0
"""Runs side by side: what differs in their configs, and their models paired by seed."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vpt_jax.report import figures, page, tables
from vpt_jax.report.document import paired, percents
from vpt_jax.report.rows import Row, default_score, kind, label, place, summarise

NONE = "\N{EN DASH}"
# Okabe and Ito's colours, as in `figures`.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def read(folders: Sequence[Path]) -> dict[str, Row]:
    """The reports of some runs, under the shortest names that tell them apart.

    Raises:
      ValueError: If one is twice, or has no report; or if they are of several tasks or
        test sets, whose accuracies say nothing about each other.
    """
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    if len(set(paths)) < max(2, len(paths)):
        raise ValueError("a comparison needs two or more folders, each once.")
    reports = {}
    for path, name in zip(paths, _short(paths), strict=True):
        try:
            reports[name] = json.loads((path / "report.json").read_bytes())
            rows = summarise(reports[name]["rows"], default_score(reports[name]))
        except FileNotFoundError:
            raise ValueError(
                f"{path} has no report.json; a finished run writes it: python -m"
                f" vpt_jax.main --config=CONFIG --workdir={path}"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{path / 'report.json'} is not a report ({e!r}).") from e
        if not any(row["test_accuracy"] is not None for row in rows):
            raise ValueError(f"{path} has no test accuracy to compare.")
    same = {
        name: f"{report['task']}, {report['data']['test']} test pictures,"
        f" {report['data']['classes']} classes"
        for name, report in reports.items()
    }
    if len(set(same.values())) > 1:
        listed = "; ".join(f"{name}: {what}" for name, what in same.items())
        raise ValueError(
            f"the runs were tested on different things ({listed}); compare runs of one"
            " task and one test set."
        )
    return reports


def _short(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path that tell all of them apart.

    Without what all of them end with: `a/pets` and `b/pets` are `a` and `b`.
    """
    parts = [path.parts for path in paths]
    while len({own[-1] for own in parts}) == 1:
        parts = [own[:-1] for own in parts]
    names, size = [""] * len(paths), 0
    while len(set(names)) < len(names):
        size += 1
        names = [os.path.join(*own[-size:]) for own in parts]
    return names


def differing(reports: Mapping[str, Row]) -> tables.Table:
    """A line per key of the configs, the backbone or the versions that is not equal."""
    flat = {name: _flatten(report) for name, report in reports.items()}
    rows = []
    for key in dict.fromkeys(key for values in flat.values() for key in values):
        texts = [values.get(key, NONE) for values in flat.values()]
        if len(set(texts)) > 1:
            rows.append([key, *texts])
    return tables.Table(("Key", *reports), rows)


def _flatten(report: Row) -> dict[str, str]:
    found = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, part in value.items():
                visit(f"{name}.{key}".removeprefix("."), part)
        else:
            several = isinstance(value, list)
            found[name] = ", ".join(map(str, value)) if several else str(value)

    visit("", report["config"])
    visit("backbone", {k: report["backbone"].get(k) for k in ("hash", "load")})
    visit("versions", report["versions"])
    return found


def accuracies(reports: Mapping[str, Row]) -> tables.Table:
    """A line per model: test accuracy in each run, and minus the first run's.

    Differences are means over the seeds that both have, ± their standard error.
    """
    own = {name: _models(report) for name, report in reports.items()}
    first, *others = own
    header = ["Model", *(f"{name}\ntest %" for name in own)]
    header += [f"{name}\nminus {first}" for name in others]
    rows = []
    for key, name in _labels(reports).items():
        cells = [percents(models[key][0], "test") if key in models else NONE
                 for models in own.values()]  # fmt: skip
        for other in others:
            both = key in own[first] and key in own[other]
            gap = both and paired(own[other][key][1], own[first][key][1])
            cells.append(gap.text("+.2f") if gap else NONE)
        rows.append([name, *cells])
    return tables.Table(header, rows)


def _models(report: Row) -> dict[tuple, tuple[Row, list[Row]]]:
    """Groups of a report that were tested, and their rows, by what they are."""
    default, rows_of = default_score(report), {}
    for row in report["rows"]:
        rows_of.setdefault(place(row, default), []).append(row)
    groups = {place(x, default): x for x in summarise(report["rows"], default)}
    tested = (key for key, x in groups.items() if x["test_accuracy"] is not None)
    return {key: (groups[key], rows_of[key]) for key in tested}


def _labels(reports: Mapping[str, Row]) -> dict[tuple, str]:
    """The names of all models, in the order of the tables."""
    found = {
        key: label(group, default_score(report))
        for report in reports.values()
        for key, (group, _) in _models(report).items()
    }
    return {key: found[key] for key in sorted(found)}


def draw(figure: Any, reports: Mapping[str, Row]) -> bool:
    """Test accuracy of every model, one colour a run, bars of a sample deviation."""
    names = _labels(reports)
    lines = {key: number for number, key in enumerate(names)}
    axes = figure.subplots()
    figure.set_figheight(1.4 + 0.34 * len(names))
    for number, (run, report) in enumerate(reports.items()):
        shift = 0.5 * ((number + 0.5) / len(reports) - 0.5)
        colour, shown = COLOURS[number % len(COLOURS)], run
        for key, (group, _) in _models(report).items():
            hollow = {"markerfacecolor": "white"} if kind(group) == "condense" else {}
            axes.errorbar(
                100 * group["test_accuracy"],
                lines[key] + shift,
                xerr=100 * (group["test_sd"] or 0) or None,
                fmt="o",
                color=colour,
                capsize=3,
                label=shown,
                **hollow,
            )
            shown = None
    axes.set_yticks(list(lines.values()), list(names.values()))
    axes.set(xlabel="Test accuracy (%)", ylim=(len(names) - 0.4, -0.6))
    return True


def html(reports: Mapping[str, Row]) -> str:
    """The comparison as one HTML file that loads nothing."""
    task = next(iter(reports.values()))["task"]
    functions = {"accuracy": lambda figure: draw(figure, reports)}
    captions = {
        "accuracy": (
            "Accuracy of every model",
            "A marker is a mean over seeds, its bar one sample standard deviation;"
            " hollow: not fine-tuned.",
        )
    }
    found = differing(reports)
    what = tables.html(found) if found.rows else "<p>Their configs are equal.</p>"
    body = f"""<h2>What differs</h2>{what}
<h2>Results</h2>{tables.html(accuracies(reports))}
<p class="soft">Test accuracies are means over seeds ± one sample standard deviation.
Differences are means over the seeds that both runs have, ± their standard error; of one
seed they have none, and are no evidence.</p>
{figures.html(functions, captions)}"""
    return page.page(f"{task}: {len(reports)} runs", body)


def main(folders: Sequence[Path], out: Path, parser: argparse.ArgumentParser) -> None:
    """Prints the comparison and writes it to `out`."""
    from vpt_jax.files import workdirs  # imports Orbax, which takes seconds

    try:
        reports = read(folders)
    except ValueError as error:
        parser.error(str(error))
    console = tables.console()
    for table in (differing(reports), accuracies(reports)):
        tables.show(console, table)
        console.print("")
    workdirs.write_text(out, html(reports))
    print(f"Wrote {out}")
