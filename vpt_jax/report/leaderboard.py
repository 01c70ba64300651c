# SPDX-License-Identifier: Apache-2.0
"""The leaderboard of a benchmark run: its files, and its table on the terminal.

All is computed from the content of leaderboard.json: equal dicts make equal files.
"""

import json
from pathlib import Path
from typing import Any

from vpt_jax.report import board_page, board_tables, tables
from vpt_jax.report.board_notes import notes
from vpt_jax.report.standings import Board, Line, canonical, leaderboard, main_lines

__all__ = ["leaderboard", "print_table", "render", "write"]

TITLES = {"vtab": "VTAB-1k", "fgvc": "FGVC"}
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
        "html": board_page.html(board, named, said),
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
