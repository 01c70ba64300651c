# SPDX-License-Identifier: Apache-2.0
"""A table of texts, and what it is on a terminal, in HTML, Markdown and LaTeX.

By hand: no small library marks the best of ours and rules off ratios in all of them.
"""

import math
import re
from collections.abc import Callable, Sequence, Set
from html import escape
from typing import Any, NamedTuple

DASH = "\N{EM DASH}"
_TEX = str.maketrans(
    {
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
    }
    | {character: f"\\{character}" for character in "&%$#_{}"}
)


class Table(NamedTuple):
    """Texts; cells of `bold` (row, column) are the best of ours in their column."""

    header: Sequence[str]
    rows: list[list[str]]
    bold: Set[tuple[int, int]] = frozenset()
    sections: Set[int] = frozenset()  # numbers of the rows that begin another ratio
    published: int | None = None  # the number of the first row that is not ours

    def written(
        self, cell: Callable[[str], Any], bold: Callable[[Any], Any]
    ) -> list[list[Any]]:
        """All cells, each as `cell` writes it, those of `bold` as that does."""
        return [
            [
                bold(cell(text)) if (i, j) in self.bold else cell(text)
                for j, text in enumerate(row)
            ]
            for i, row in enumerate(self.rows)
        ]


def columns(table: Table, kept: list[int]) -> Table:
    """The table with these columns only."""
    return table._replace(
        header=[table.header[j] for j in kept],
        rows=[[row[j] for j in kept] for row in table.rows],
        bold={(i, kept.index(j)) for i, j in table.bold if j in kept},
    )


def without_empty(table: Table) -> Table:
    """Without the columns, but for the first, that have no text in any row."""
    kept = [
        j
        for j in range(len(table.header))
        if not j or not table.rows or any(row[j] for row in table.rows)
    ]
    return columns(table, kept)


def transposed(table: Table) -> Table:
    """The same cells, with a row per column, undivided."""
    cells = [list(column) for column in zip(table.header, *table.rows, strict=True)]
    return Table(cells[0], cells[1:], {(j - 1, i + 1) for i, j in table.bold})


def folded(name: str, separator: str = " ") -> str:
    """A header on two lines, if it is long; broken near its middle."""
    breaks = [match.start() for match in re.finditer(separator, name)]
    if len(name) < 9 or not breaks:
        return name
    middle = min(breaks, key=lambda i: abs(i - len(name) / 2))
    return f"{name[:middle]}\n{name[middle + 1 :]}"


def console(file: Any = None) -> Any:
    """Rich's console on a file; plain text where that is not a terminal."""
    from rich.console import Console

    found = Console(file=file, markup=False, highlight=False, emoji=False)
    if not found.is_terminal:  # no window to fit into
        found.width = max(100, found.width)
    return found


def show(console: Any, table: Table) -> None:
    """Prints a table; on a terminal the best of ours are bold."""
    from rich import box
    from rich.table import Table as Shown
    from rich.text import Text

    shown = Shown(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    shown.add_column(table.header[0], justify="left")
    for name in table.header[1:]:
        shown.add_column(name, justify="right", no_wrap=True)
    cells = table.written(Text, lambda text: Text(text.plain, "bold"))
    for i, row in enumerate(cells):
        if i and (i == table.published or i in table.sections):
            shown.add_section()
        shown.add_row(*row)
    console.print(shown)


def html(table: Table, look: str = "wide", cell: Callable[[str], str] = escape) -> str:
    """The table in HTML, in a box of the classes `look`."""
    header = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    body = []
    for i, row in enumerate(table.written(cell, "<b>{}</b>".format)):
        kind = ' class="section"' if i in table.sections else ""
        kind = ' class="published"' if i and i == table.published else kind
        body.append(f"<tr{kind}>{''.join(f'<td>{text}</td>' for text in row)}</tr>")
    return f"""<div class="{look}"><table><thead><tr>{header}</tr></thead>
<tbody>{"".join(body)}</tbody></table></div>"""


def md(text: str) -> str:
    """A text as Markdown."""
    return re.sub(r"([\\`*_|<>\[\]#&])", r"\\\1", text).replace("\n", " ")


def markdown(table: Table) -> str:
    """The table as Markdown of GitHub."""
    rows = [[md(name) for name in table.header]]
    rows.append(["---"] + ["---:"] * (len(table.header) - 1))
    rows += table.written(md, "**{}**".format)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def tex(text: str) -> str:
    """A text as LaTeX."""
    return text.translate(_TEX)


def latex(table: Table, caption: str, *, upright: bool = False) -> str:
    """The table as LaTeX; `upright` turns all headers but the first."""
    header = [tex(name) for name in table.header]
    if upright:
        header[1:] = [rf"\rotatebox{{90}}{{{name}}}" for name in header[1:]]
    body = []
    for i, row in enumerate(table.written(tex, r"\textbf{{{}}}".format)):
        if i and i == table.published:
            body.append(r"\midrule")
        elif i in table.sections:
            body.append(r"\addlinespace")
        body.append(rf"{' & '.join(row)} \\")
    lines = [
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{caption}}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        r"\toprule",
        rf"{' & '.join(header)} \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table*}",
    ]
    return "\n".join(lines)


def percent(mean: float, deviation: float | None, digits: int = 1) -> str:
    """A mean in per cent, with its deviation where there is one: "85.0 ± 0.3"."""
    text = f"{mean:.{digits}f}"
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def three_digits(value: float) -> str:
    """Three significant digits: 0.4216 is "0.422"."""
    return f"{value:#.3g}".rstrip(".")


def with_prefix(value: float) -> str:
    """Three digits and an SI prefix: 81240000 is "81.2 M"."""
    power = int(math.log10(max(value, 1)) // 3)
    prefix = ("", "k", "M", "G", "T", "P")[power]
    return f"{three_digits(value / 1000**power)} {prefix}"
