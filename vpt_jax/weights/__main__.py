# SPDX-License-Identifier: Apache-2.0
"""Published backbones that load by name, from the command line.

  python -m vpt_jax.weights list            # or: list dinov2

A name stands for the file, wherever weights are asked for:
`--config.backbone.checkpoint=NAME`, `vpt_jax.load_backbone("NAME")`.
"""

import argparse
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from vpt_jax.weights.published import PUBLISHED, Published


def show(rows: Sequence[Published]) -> None:
    """Prints the table, in the terminal's columns, or in 110 where it is piped."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 110
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for name in ("Name", "Variant", "MB", "Normalisation", "Read-out", "Licence"):
        table.add_column(name, justify="right" if name == "MB" else "left")
    for row in rows:
        known = row.family
        licence = known.licence
        if "gated" in licence:  # Meta's own
            meta = row.name.startswith("facebook/")
            licence = licence.split()[0] + " (gated)" * meta
        facts = known.normalisation, known.readout, licence
        table.add_row(row.name, row.variant, str(row.megabytes), *facts)
    console.print(table)
    console.print(
        "\nMB are the network's in float32, to 1 %; a file may hold a head or a model"
        " of texts besides."
        "\nOthers of these families on the hub load by ORG/NAME, timm's by their name"
        " alone.",
        soft_wrap=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0, or 2 for a word in no name."""
    parser = argparse.ArgumentParser("python -m vpt_jax.weights", description=__doc__)
    parser.add_argument("command", choices=["list"], help="show the names")
    parser.add_argument("word", nargs="?", default="", help="only names with it")
    word = parser.parse_args(argv).word
    rows = [row for row in PUBLISHED.values() if word.lower() in row.name.lower()]
    if not rows:
        parser.error(f"got {word!r}, expected a part of a name; `list` shows all.")
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
