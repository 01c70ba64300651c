# SPDX-License-Identifier: Apache-2.0
"""A leaderboard as tables: their cells, and Markdown, CSV and LaTeX made of them.

By hand: no small library marks the best of ours and rules off ratios in all three.
"""

import csv
import io
import re
from collections.abc import Set
from typing import Any, NamedTuple

from vpt_jax.report.formats import percent, three_digits, with_prefix
from vpt_jax.report.standings import (
    Board,
    Line,
    averages,
    best,
    leaderboard,
    task_names,
)

DASH = "\N{EM DASH}"


class Table(NamedTuple):
    """Texts; cells of `bold` (row, column) are the best of ours in their column."""

    header: list[str]
    rows: list[list[str]]
    bold: Set[tuple[int, int]] = frozenset()
    sections: Set[int] = frozenset()  # numbers of the rows that begin another ratio
    published: int | None = None  # the number of the first row that is not ours


def summary(board: Board, lines: list[Line]) -> Table:
    """Averages and costs, a row per method; columns without any content are left out.

    Args:
      board: The content of leaderboard.json.
      lines: Those to show.
    """
    columns = averages(board)
    header = ["Method", *(column.title for column in columns), "As published"]
    header += ["Prompts", "Tuned", "MACs", "MACs ref.", "Tasks", "Seeds"]
    size = len(board["tasks"])
    rows = []
    for line in lines:
        published = line["as_published"]
        rows.append(
            [
                marked(line),
                *(_average(line, column.key) for column in columns),
                "" if published is None else f"{published:.2f}",
                "" if line["prompts"] is None else f"{line['prompts']:,.0f}",
                tuned(line),
                *(_macs(line[name]) for name in ("macs", "macs_reference")),
                "" if line["tasks_in"] is None else f"{line['tasks_in']}/{size}",
                seeds(line),
            ]
        )
    bold = set()
    for j, column in enumerate(columns, start=1):
        winners = best(lines, lambda line, k=column.key: line["averages"][k], 2)
        bold |= {(i, j) for i, line in enumerate(lines) if _wins(line, winners)}
    return _without_empty(Table(header, rows, bold, *_divided(lines)))


def per_task(board: Board, lines: list[Line]) -> Table:
    """Accuracies, a row per method and a column per task."""
    names = task_names(board)
    lines = [line for line in lines if line["tasks"]]
    rows = [[marked(line), *(task_cell(line, n) for n in names)] for line in lines]
    bold = set()
    for j, name in enumerate(names, start=1):
        winners = best(lines, lambda line, n=name: line["tasks"].get(n), 1)
        bold |= {(i, j) for i, line in enumerate(lines) if _wins(line, winners)}
    return Table(["Method", *names], rows, bold, *_divided(lines))


def transposed(table: Table) -> Table:
    """The same cells, with a row per column, undivided."""
    cells = [list(column) for column in zip(table.header, *table.rows, strict=True)]
    header, *rows = cells
    return Table(header, rows, {(j - 1, i + 1) for i, j in table.bold})


def choices(board: Board) -> Table:
    """What every task was trained with, and how far it is."""
    header = ["Task", "Group", "Classes", "Base lr", "Weight decay", "Prompts"]
    header += ["Batch", "Val %", "How", "Linear: lr", "Linear: decay", "Missing"]
    rows = []
    for name in task_names(board):
        task = board["tasks"][name]
        chosen = task["chosen"]
        classes = task["classes"]
        cells = [name, task["group"], "" if classes is None else str(classes)]
        if chosen is None:
            cells += [DASH] * 6
        else:
            accuracy = chosen["val_accuracy"]
            cells += [
                f"{chosen['base_lr']:g}",
                f"{chosen['weight_decay']:g}",
                prompts(chosen["num_prompts"]),
                str(chosen["batch_size"]),
                "" if accuracy is None else f"{100 * accuracy:.1f}",
                str(chosen["how"]),
            ]
        linear = task.get("chosen_linear") or {}
        cells += [
            f"{linear[key]:g}" if key in linear else ""
            for key in ("base_lr", "weight_decay")
        ]
        rows.append([*cells, f"{task['missing'] or ''}"])
    return _without_empty(Table(header, rows))


def prompts(number: int | list[int]) -> str:
    """Prompts per layer: one number, or one of each layer."""
    return str(number) if isinstance(number, int) else " ".join(map(str, number))


def marked(line: Line) -> str:
    """The name of a line, with the mark of those that diverged."""
    return line["method"] + (" †" if line["diverged"] else "")


def task_cell(line: Line, name: str) -> str:
    """A line's accuracy on a task; a dash where it has none yet."""
    value = line["tasks"].get(name)
    if value is None:
        return DASH if line["ours"] else ""
    mark = any(run["task"] == name for run in line["diverged"])
    return percent(value["mean"], value["sd"]) + ("†" if mark else "")


def tuned(line: Line) -> str:
    """Tuned parameters, and their share of the backbone, as far as known."""
    parts = []
    if line["tuned_params"] is not None:
        parts.append(with_prefix(line["tuned_params"]))
    if line["tuned_percent"] is not None:
        share = three_digits(line["tuned_percent"])
        parts.append(f"({share} %)" if parts else f"{share} %")
    return " ".join(parts)


def seeds(line: Line) -> str:
    """How many seeds the tasks of a line have."""
    if line["seeds"] is None:
        return ""
    low, high = line["seeds"]
    return str(low) if low == high else f"{low} to {high}"


def sources(lines: list[Line]) -> list[str]:
    """Where published lines are from, and what they average; one text per source."""
    names: dict[str, list[str]] = {}
    for line in lines:
        if not line["ours"]:
            text = f"{line['source']} ({line['convention']})"
            names.setdefault(text, []).append(line["method"])
    return [f"{', '.join(methods)}: {text}." for text, methods in names.items()]


def folded(name: str, separator: str = " ") -> str:
    """A header on two lines, if it is long; broken near its middle."""
    breaks = [i for i, character in enumerate(name) if character == separator]
    if len(name) < 9 or not breaks:
        return name
    middle = min(breaks, key=lambda i: abs(i - len(name) / 2))
    return f"{name[:middle]}\n{name[middle + 1 :]}"


def kept_columns(table: Table, kept: list[int]) -> Table:
    """The table with these columns only."""
    return table._replace(
        header=[table.header[j] for j in kept],
        rows=[[row[j] for j in kept] for row in table.rows],
        bold={(i, kept.index(j)) for i, j in table.bold if j in kept},
    )


def _average(line: Line, key: str) -> str:
    value = line["averages"].get(key)
    if value is None:
        return DASH if line["ours"] else ""
    return percent(value["mean"], value["sd"], 2)


def _macs(value: float | None) -> str:
    return "" if value is None else with_prefix(value)


def _wins(line: Line, winners: set[str]) -> bool:
    return line["ours"] and line["method"] in winners


def _divided(lines: list[Line]) -> tuple[set[int], int]:
    """Where other ratios begin, and where published lines do."""
    ratios = [line["keep_ratio"] for line in lines if line["ours"]]
    # The references before the first ratio are one section.
    ratios = [None if ratio in (0.0, 1.0) else ratio for ratio in ratios]
    new = {i for i in range(1, len(ratios)) if ratios[i] != ratios[i - 1]}
    return new, len(ratios)


def _without_empty(table: Table) -> Table:
    columns = range(len(table.header))
    return kept_columns(
        table,
        [
            j
            for j in columns
            if j == 0 or not table.rows or any(row[j] for row in table.rows)
        ],
    )


def markdown(board: Board, title: str, notes: list[str]) -> str:
    """The tables and notes as Markdown."""
    lines = leaderboard(board)
    parts = [f"# {_md(title)}", "\n".join(f"- {_md(note)}" for note in notes)]
    parts += ["## Averages", _md_table(summary(board, lines))]
    published = sources(lines)
    if published:
        parts.append("Published rows:")
        parts.append("\n".join(f"- {_md(text)}" for text in published))
    parts += ["## Every task", _md_table(per_task(board, lines))]
    parts += ["## What was chosen", _md_table(choices(board))]
    return "\n\n".join(parts) + "\n"


def _md(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]#&])", r"\\\1", text).replace("\n", " ")


def _md_table(table: Table) -> str:
    def line(cells: list[str]) -> str:
        return f"| {' | '.join(cells)} |"

    parts = [line(list(map(_md, table.header)))]
    parts.append(line(["---"] + ["---:"] * (len(table.header) - 1)))
    for i, row in enumerate(table.rows):
        cells = [
            f"**{_md(text)}**" if (i, j) in table.bold else _md(text)
            for j, text in enumerate(row)
        ]
        parts.append(line(cells))
    return "\n".join(parts)


def csv_text(board: Board) -> str:
    """All numbers of all lines, unrounded, as CSV; what is not known is empty.

    Of every average and every task there are a mean, the sample deviation over seeds
    and the number of seeds.
    """
    columns, names = averages(board), task_names(board)
    plain = ("method", "source", "convention", "stage", "score", "scope", "keep_ratio")
    numbers = ("as_published", "prompts", "tuned_params", "tuned_percent", "macs")
    numbers += ("macs_reference", "tasks_in")
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    triples = [f"{key}_{part}" for key in _keys(columns, names) for part in _PARTS]
    writer.writerow([*plain, *numbers, "diverged", *triples])
    for line in leaderboard(board):
        cells = [line.get(name) for name in plain + numbers]
        cells.append(len(line["diverged"]) if line["ours"] else None)
        values = [line["averages"].get(column.key) for column in columns]
        values += [line["tasks"].get(name) for name in names]
        cells += [value and value[part] for value in values for part in _PARTS]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return file.getvalue()


_PARTS = ("mean", "sd", "n")


def _keys(columns: list[Any], names: list[str]) -> list[str]:
    return [*(column.key for column in columns), *(f"task_{name}" for name in names)]


def latex(board: Board, title: str, notes: list[str]) -> str:
    """The tables as LaTeX; they need the packages booktabs and graphicx."""
    lines = leaderboard(board)
    notes = [*notes, *sources(lines)]
    caption = f"{_tex(title)}. {' '.join(map(_tex, notes))}"
    parts = [
        "% \\usepackage{booktabs,graphicx}",
        _tex_table(summary(board, lines), caption),
        _tex_table(per_task(board, lines), f"{_tex(title)}: every task.", upright=True),
    ]
    return "\n".join(parts) + "\n"


def _tex_table(table: Table, caption: str, *, upright: bool = False) -> str:
    header = [_tex(text) for text in table.header]
    if upright:
        header = header[:1] + [rf"\rotatebox{{90}}{{{text}}}" for text in header[1:]]
    body = []
    for i, row in enumerate(table.rows):
        if i and i == table.published:
            body.append(r"\midrule")
        elif i in table.sections:
            body.append(r"\addlinespace")
        cells = [
            rf"\textbf{{{_tex(text)}}}" if (i, j) in table.bold else _tex(text)
            for j, text in enumerate(row)
        ]
        body.append(" & ".join(cells) + r" \\")
    lines = [
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{caption}}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        r"\toprule",
        " & ".join(header) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table*}",
    ]
    return "\n".join(lines)


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "×": r"$\times$",
    "\N{MINUS SIGN}": "$-$",
    DASH: "---",
    "\n": " ",
} | {character: f"\\{character}" for character in "&%$#_{}"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)
