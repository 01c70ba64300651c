# SPDX-License-Identifier: Apache-2.0
"""The leaderboard of a benchmark run: its files, and its table on the terminal.

All is computed from the content of leaderboard.json: equal dicts make equal files.
"""

import json
from html import escape
from pathlib import Path
from typing import Any

from vpt_jax.report import board_figures, board_tables, page, tables
from vpt_jax.report.board_notes import notes
from vpt_jax.report.standings import (
    Board,
    Line,
    canonical,
    diverged,
    leaderboard,
    main_lines,
    task_names,
)

TITLES = {"vtab": "VTAB-1k", "fgvc": "FGVC"}
LOOKS = ("report.css", "leaderboard.css")
WIDE = 120  # characters; a narrower terminal gets averages only


def title(board: Board) -> str:
    """What the leaderboard is of."""
    name = TITLES.get(board["benchmark"], board["benchmark"])
    backbone = board["backbone"]
    if not backbone:  # no run is finished
        return f"{name} leaderboard"
    return f"{name} leaderboard: {backbone['name']} ({backbone['variant']})"


def render(board: Board) -> dict[str, str]:
    """Texts of a leaderboard's files by suffix: md, csv, tex, html.

    Raises:
      KeyError, TypeError, ValueError: If the board lacks something.
    """
    board = canonical(board)
    named, said = title(board), notes(board, leaderboard(board))
    return {
        "md": board_tables.markdown(board, named, said),
        "csv": board_tables.csv_text(board),
        "tex": board_tables.latex(board, named, said),
        "html": html(board, named, said),
    }


def write(board: Board, workdir: str | Path) -> list[Path]:
    """Paths of leaderboard.json, .md, .csv, .tex and .html, each written atomically."""
    from vpt_jax.files import workdirs  # imports Orbax, which takes seconds

    content = json.dumps(canonical(board), indent=2, allow_nan=False) + "\n"
    texts = {"json": content} | render(board)  # fails before anything is written
    paths = []
    for suffix, text in texts.items():
        paths.append(Path(workdir) / f"leaderboard.{suffix}")
        workdirs.write_text(paths[-1], text)
    return paths


def print_table(board: Board, file: Any = None) -> None:
    """Prints averages, accuracies of the main methods by task, and notes."""
    board = canonical(board)
    lines, console = leaderboard(board), tables.console(file)
    few = board_tables.per_task(board, _few(board, lines, console.width))
    by_task = tables.transposed(few)
    header = ["Task", *map(tables.folded, by_task.header[1:])]
    averages = _narrow(board_tables.summary(board, lines), console.width)
    for table in (averages, by_task._replace(header=header)):
        tables.show(console, table)
        console.print()
    for note in notes(board, lines) + board_tables.sources(lines):
        console.print(note)


def _few(board: Board, lines: list[Line], width: int) -> list[Line]:
    """As many of the main methods as have room; VPT-Deep, the last, is always there."""
    shown = main_lines(board, lines)
    room = max((width - 21) // 12, 3)
    return shown if len(shown) <= room else shown[: room - 1] + shown[-1:]


def _narrow(table: tables.Table, width: int) -> tables.Table:
    """The columns that a terminal has room for, with headers on two lines."""
    groups = ("Natural", "Specialized", "Structured")
    dropped = (*groups, "Tuned", "MACs") if width < WIDE else ()
    names = [name.split(" (")[0] for name in table.header]
    kept = [j for j, name in enumerate(names) if name not in dropped]
    table = tables.columns(table, kept)
    return table._replace(header=list(map(tables.folded, table.header)))


def html(board: Board, named: str, said: list[str]) -> str:
    """A board as one page that loads nothing; `said` are sentences for its top."""
    lines = leaderboard(board)
    captions = board_figures.captions(board)
    hidden = ("tasks", "benchmark")
    details = {name: value for name, value in board.items() if name not in hidden}
    sources = board_tables.sources(lines)
    published = f"<h3>Published rows</h3>{page.bullets(sources)}" if sources else ""
    body = f"""{page.bullets(said)}
<h2>Averages</h2>{_table(board_tables.summary(board, lines))}
<p class="soft">Test accuracies in %; the best of ours in bold. PC is prompt
condensation. Prompts are those of all layers; tuned parameters are those of prompts and
head, and their share of the backbone; MACs (multiply-accumulates) are per picture, ref.
counts prompts as tokens of every layer, as papers do. All are means over tasks.</p>
{published}
<h2>Accuracy of every task</h2>{_table(board_tables.per_task(board, lines))}
{page.figures(board_figures.draw(board, lines), captions=captions)}
<h2>What was chosen</h2>{_table(board_tables.choices(board))}
{_grids(board)}
{page.details(details, {})}"""
    return page.page(named, body, LOOKS)


def _cell_text(text: str) -> str:
    """Spreads are set smaller than what they belong to."""
    text = escape(text).replace(" %", "\N{NO-BREAK SPACE}%")
    value, sign, deviation = text.partition(" ± ")
    return f"{value}<small> ± {deviation}</small>" if sign else value


def _table(table: tables.Table) -> str:
    """A table whose first column stays where it is when the others are scrolled."""
    header = [tables.folded(tables.folded(name, "_")) for name in table.header]
    return tables.html(table._replace(header=header), "wide board", _cell_text)


def _grids(board: Board) -> str:
    """A heat table per task of the accuracies among which its rates were chosen."""
    cards = [
        _grid(name, board["tasks"][name])
        for name in task_names(board)
        if board["tasks"][name]["grid"]
    ]
    if not cards:
        return ""
    return f"""<h2>Sweeps</h2>
<p class="soft">Validation accuracies in %, a column per learning rate and a row per
weight decay (and number of prompts per layer, where several were tried). Bluer is
better; what was chosen has a frame. A cross marks what became infinite or NaN, with the
last epoch before.</p>
<div class="grids">{"".join(cards)}</div>"""


def _grid(name: str, task: dict[str, Any]) -> str:
    entries = {_place(entry): entry for entry in sorted(task["grid"], key=repr)}
    rates = sorted({rate for *_, rate in entries})
    rows = sorted({(prompts, decay) for prompts, decay, _ in entries})
    several = len({prompts for prompts, _ in rows}) > 1
    values = [entry["val_accuracy"] for entry in entries.values()]
    values = [value for value in values if value is not None] or [0.0]
    chosen = task["chosen"]
    winner = chosen and _place(chosen)
    header = "".join(f"<th>{rate:g}</th>" for rate in rates)
    body = []
    for row in rows:
        prompts, decay = row
        label = f"{' '.join(map(str, prompts))} · " * several + f"{decay:g}"
        cells = "".join(
            _heat(entries.get(key), min(values), max(values), key == winner)
            for key in ((*row, rate) for rate in rates)
        )
        body.append(f"<tr><td>{label}</td>{cells}</tr>")
    corner = "prompts · wd \\ lr" if several else "wd \\ lr"
    return f"""<section class="grid"><h3>{escape(name)}</h3>
<div class="wide"><table><thead><tr><th>{corner}</th>{header}</tr></thead>
<tbody>{"".join(body)}</tbody></table></div></section>"""


def _place(entry: dict[str, Any]) -> tuple[tuple[int, ...], float, float]:
    """Prompts, decay and rate: where an entry lies in a grid."""
    number = entry["num_prompts"]
    prompts = (number,) if isinstance(number, int) else tuple(number)
    return prompts, entry["weight_decay"], entry["base_lr"]


def _heat(entry: dict[str, Any] | None, low: float, high: float, chosen: bool) -> str:
    """A cell of a heat table: from pale for the lowest accuracy to dark."""
    if entry is None:
        return "<td></td>"
    accuracy, text, style = entry["val_accuracy"], "", ""
    if accuracy is not None:
        text = f"{100 * accuracy:.1f}"
        heat = (accuracy - low) / (high - low) if high > low else 1.0
        style = f' style="--heat: {100 * heat:.0f}%"'
    if accuracy is None or diverged(entry):
        text = f"{text} <small>✕ {entry['epochs']}</small>".strip()
    kind = ' class="chosen"' if chosen else ""
    return f"<td{kind}{style}>{text}</td>"
