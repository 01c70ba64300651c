# SPDX-License-Identifier: Apache-2.0
"""The leaderboard of a benchmark run: its files, and its table on the terminal.

All is computed from the dict that leaderboard.json holds, and nothing else: equal dicts
make equal files. What it holds is described at `board.standings.leaderboard`.
"""

import json
from pathlib import Path
from typing import Any

from vpt_jax.report import board_page, board_tables
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
    """Makes the files of a leaderboard.

    Args:
      board: The content of leaderboard.json.

    Returns:
      Texts by suffix: md, csv, tex, html.

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
    """Writes leaderboard.json, .md, .csv, .tex and .html, each atomically.

    Returns:
      Their paths.
    """
    from vpt_jax.files import workdirs  # imports Orbax, which takes seconds

    content = json.dumps(canonical(board), indent=2, allow_nan=False) + "\n"
    texts = {"json": content} | render(board)  # fails before anything is written
    paths = []
    for suffix, text in texts.items():
        paths.append(Path(workdir) / f"leaderboard.{suffix}")
        workdirs.write_text(paths[-1], text)
    return paths


def print_table(board: Board, file: Any = None) -> None:
    """Prints averages, accuracies of the main methods by task, and notes.

    Args:
      board: The content of leaderboard.json.
      file: Where to print, by default standard output. The tables are plain text where
        this is not a terminal.
    """
    from rich.console import Console

    board = canonical(board)
    lines = leaderboard(board)
    console = Console(file=file, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:  # no window to fit into
        console.width = max(100, console.width)
    print_rows(console, _narrow(board_tables.summary(board, lines), console.width))
    by_task = board_tables.transposed(
        board_tables.per_task(board, _few(board, lines, console.width))
    )
    header = ["Task", *map(board_tables.folded, by_task.header[1:])]
    print_rows(console, by_task._replace(header=header))
    for note in notes(board, lines) + board_tables.sources(lines):
        console.print(note)


def _few(board: Board, lines: list[Line], width: int) -> list[Line]:
    """As many of the main methods as have room; VPT-Deep, the last, is always there."""
    shown = main_lines(board, lines)
    room = max((width - 21) // 12, 3)
    return shown if len(shown) <= room else shown[: room - 1] + shown[-1:]


def _narrow(table: board_tables.Table, width: int) -> board_tables.Table:
    """The columns that a terminal has room for, with headers on two lines."""
    groups = ("Natural", "Specialized", "Structured")
    dropped = (*groups, "Tuned", "MACs") if width < WIDE else ()
    names = [name.split(" (")[0] for name in table.header]
    kept = [j for j, name in enumerate(names) if name not in dropped]
    table = board_tables.kept_columns(table, kept)
    return table._replace(header=list(map(board_tables.folded, table.header)))


def print_rows(console: Any, table: board_tables.Table) -> None:
    """Prints a table; on a terminal the best of ours are bold."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    shown.add_column(table.header[0], justify="left")
    for name in table.header[1:]:
        shown.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(table.rows):
        if i and (i == table.published or i in table.sections):
            shown.add_section()
        shown.add_row(
            *(
                Text(text, style="bold" if (i, j) in table.bold else "")
                for j, text in enumerate(row)
            )
        )
    console.print(shown)
    console.print()
