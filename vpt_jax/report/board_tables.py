# SPDX-License-Identifier: Apache-2.0
"""A leaderboard as tables, and as whole files of Markdown, CSV and LaTeX."""

import csv
import io
from collections.abc import Callable
from typing import Any

from vpt_jax.report import tables
from vpt_jax.report.standings import Board, Line, averages, leaderboard, task_names
from vpt_jax.report.tables import (
    DASH,
    Table,
    md,
    percent,
    tex,
    three_digits,
    with_prefix,
)


def summary(board: Board, lines: list[Line]) -> Table:
    """Averages and costs, a row per method; columns without content are left out."""
    columns, size = averages(board), len(board["tasks"])
    header = ["Method", *(column.title for column in columns), "As published"]
    header += ["Prompts", "Tuned", "MACs", "MACs ref.", "Tasks", "Seeds"]
    rows = [
        [
            _name(line),
            *(_cell(line, line["averages"].get(column.key), 2) for column in columns),
            _text(line["as_published"], "{:.2f}".format),
            _text(line["prompts"], "{:,.0f}".format),
            _tuned(line),
            _text(line["macs"], with_prefix),
            _text(line["macs_reference"], with_prefix),
            _text(line["tasks_in"], f"{{}}/{size}".format),
            _text(line["seeds"], _range),
        ]
        for line in lines
    ]
    values = [[line["averages"][column.key] for line in lines] for column in columns]
    bold = _bold(lines, values, 2)
    return tables.without_empty(Table(header, rows, bold, *_divided(lines)))


def per_task(board: Board, lines: list[Line]) -> Table:
    """Accuracies, a row per method and a column per task."""
    names = task_names(board)
    lines = [line for line in lines if line["tasks"]]
    rows = []
    for line in lines:
        marked = {run["task"] for run in line["diverged"]}
        cells = [
            _cell(line, line["tasks"].get(name), 1) + ("†" if name in marked else "")
            for name in names
        ]
        rows.append([_name(line), *cells])
    values = [[line["tasks"].get(name) for line in lines] for name in names]
    return Table(["Method", *names], rows, _bold(lines, values, 1), *_divided(lines))


def choices(board: Board) -> Table:
    """What every task was trained with, and how far it is."""
    header = ["Task", "Group", "Classes", "Base lr", "Weight decay", "Prompts"]
    header += ["Batch", "Val %", "How", "Linear: lr", "Linear: decay", "Missing"]
    rows = []
    for name in task_names(board):
        task = board["tasks"][name]
        cells, chosen = [DASH] * 6, task["chosen"]
        if chosen is not None:
            accuracy = chosen["val_accuracy"]
            cells = [
                f"{chosen['base_lr']:g}",
                f"{chosen['weight_decay']:g}",
                prompts(chosen["num_prompts"]),
                str(chosen["batch_size"]),
                _text(accuracy, lambda value: f"{100 * value:.1f}"),
                str(chosen["how"]),
            ]
        linear = task.get("chosen_linear") or {}
        rates = [linear.get(key) for key in ("base_lr", "weight_decay")]
        cells += [_text(rate, "{:g}".format) for rate in rates]
        classes = _text(task["classes"], str)
        rows.append([name, task["group"], classes, *cells, f"{task['missing'] or ''}"])
    return tables.without_empty(Table(header, rows))


def prompts(number: int | list[int]) -> str:
    """Prompts per layer: one number, or one of each layer."""
    return str(number) if isinstance(number, int) else " ".join(map(str, number))


def sources(lines: list[Line]) -> list[str]:
    """Where published lines are from, and what they average; one text per source."""
    names: dict[str, list[str]] = {}
    for line in lines:
        if not line["ours"]:
            text = f"{line['source']} ({line['convention']})"
            names.setdefault(text, []).append(line["method"])
    return [f"{', '.join(methods)}: {text}." for text, methods in names.items()]


def _text(value: Any, written: Callable[[Any], str]) -> str:
    return "" if value is None else written(value)


def _name(line: Line) -> str:
    """The name of a line, with the mark of those that diverged."""
    return line["method"] + (" †" if line["diverged"] else "")


def _cell(line: Line, value: dict[str, Any] | None, digits: int) -> str:
    """An accuracy; a dash where ours has none yet."""
    if value is None:
        return DASH if line["ours"] else ""
    return percent(value["mean"], value["sd"], digits)


def _tuned(line: Line) -> str:
    """Tuned parameters, and their share of the backbone, as far as known."""
    number = _text(line["tuned_params"], with_prefix)
    share = _text(line["tuned_percent"], lambda value: f"{three_digits(value)} %")
    return f"{number} ({share})" if number and share else number or share


def _range(ends: list[int]) -> str:
    low, high = ends
    return str(low) if low == high else f"{low} to {high}"


def _bold(lines: list[Line], values: list[list[Any]], digits: int) -> set:
    """Places (row, column) of the best of ours, of `values[column][row]`."""
    found = set()
    for j, column in enumerate(values, start=1):
        means = {
            i: round(value["mean"], digits)
            for i, value in enumerate(column)
            if value and lines[i]["ours"]
        }
        found |= {(i, j) for i, mean in means.items() if mean == max(means.values())}
    return found


def _divided(lines: list[Line]) -> tuple[set[int], int]:
    """Where other ratios begin, and where published lines do."""
    ratios = [line["keep_ratio"] for line in lines if line["ours"]]
    # The references before the first ratio are one section.
    ratios = [None if ratio in (0.0, 1.0) else ratio for ratio in ratios]
    new = {i for i in range(1, len(ratios)) if ratios[i] != ratios[i - 1]}
    return new, len(ratios)


def markdown(board: Board, title: str, notes: list[str]) -> str:
    """The tables and notes as Markdown."""

    def bullets(texts: list[str]) -> str:
        return "\n".join(f"- {md(text)}" for text in texts)

    lines = leaderboard(board)
    parts = [f"# {md(title)}", bullets(notes)]
    parts += ["## Averages", tables.markdown(summary(board, lines))]
    if published := sources(lines):
        parts += ["Published rows:", bullets(published)]
    parts += ["## Every task", tables.markdown(per_task(board, lines))]
    parts += ["## What was chosen", tables.markdown(choices(board))]
    return "\n\n".join(parts) + "\n"


def csv_text(board: Board) -> str:
    """All numbers of all lines, unrounded, as CSV; what is not known is empty.

    Of every average and every task there are a mean, the sample deviation over seeds
    and the number of seeds.
    """
    columns, names = averages(board), task_names(board)
    plain = ["method", "source", "convention", "stage", "score", "scope", "keep_ratio"]
    plain += ["as_published", "prompts", "tuned_params", "tuned_percent", "macs"]
    plain += ["macs_reference", "tasks_in"]
    keys = [column.key for column in columns] + [f"task_{name}" for name in names]
    parts = ("mean", "sd", "n")
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    triples = [f"{key}_{part}" for key in keys for part in parts]
    writer.writerow([*plain, "diverged", *triples])
    for line in leaderboard(board):
        cells = [line.get(name) for name in plain]
        cells.append(len(line["diverged"]) if line["ours"] else None)
        values = [line["averages"].get(column.key) for column in columns]
        values += [line["tasks"].get(name) for name in names]
        cells += [value and value[part] for value in values for part in parts]
        writer.writerow(cells)  # None is written as nothing
    return file.getvalue()


def latex(board: Board, title: str, notes: list[str]) -> str:
    """The tables as LaTeX; they need the packages booktabs and graphicx."""
    lines = leaderboard(board)
    said = " ".join(map(tex, [*notes, *sources(lines)]))
    every = f"{tex(title)}: every task."
    parts = [
        "% \\usepackage{booktabs,graphicx}",
        tables.latex(summary(board, lines), f"{tex(title)}. {said}"),
        tables.latex(per_task(board, lines), every, upright=True),
    ]
    return "\n".join(parts) + "\n"
