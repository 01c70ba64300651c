# SPDX-License-Identifier: Apache-2.0
"""The table of all tasks: how large they are, and which are prepared.

Looks at files only; imports neither tfds nor TensorFlow.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from vpt_jax.data.public import vtab


class Prepared(NamedTuple):
    """A prepared copy of a data set."""

    version: str
    file_format: str
    size: int  # bytes


def download_size(source: vtab.Source) -> int | None:
    """Bytes that tfds downloads; None where it is done by hand."""
    number, _, unit = source.download.partition(" ")
    scale = {"MB": 10**6, "GB": 10**9}.get(unit)
    return round(float(number) * scale) if scale and not source.manual else None


def total_download(sources: Iterable[vtab.Source]) -> str:
    """What tfds downloads for several data sets together, in words."""
    size = sum(download_size(source) or 0 for source in sources)
    return decimal(size) if size else "nothing"


def find(row: vtab.Benchmark, data_dir: str = "") -> Prepared | None:
    """The copy that `vtab.find` finds, if there is one."""
    try:
        directory = vtab.find(row, data_dir)
    except ValueError:
        return None
    try:
        info = json.loads((directory / "dataset_info.json").read_text())
        file_format = str(info.get("fileFormat", "tfrecord"))  # tfds' default
    except (OSError, ValueError, AttributeError):
        file_format = "damaged"
    size = sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
    return Prepared(directory.name, file_format, size)


def _state(source: vtab.Source, copy: Prepared | None, data_dir: str) -> str:
    if copy:
        return f"{copy.version} {copy.file_format} {decimal(copy.size)}"
    homes = [root / source.name for root in vtab.data_dirs(data_dir)]
    others = [version for home in homes for version in vtab.versions(home)]
    wanted = " or ".join(source.versions)
    return f"{', '.join(others)}, not {wanted}" if others else "missing"


def show(data_dir: str = "", width: int | None = None) -> None:
    """Prints the table and a summary, in `width` columns or the terminal's."""
    console = Console(width=width, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    table.add_column("Task", no_wrap=True)
    for name in ("Classes", "Train", "Val", "Test", "Download"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("Prepared")
    rows = vtab.BENCHMARKS.values()
    sources = {row.source.name: row for row in rows}
    copies = {name: find(row, data_dir) for name, row in sources.items()}
    for group in vtab.GROUPS:
        table.add_section()
        table.add_row(f"[bold]{group}[/bold]")
        for row in (row for row in rows if row.group == group):
            source, parts = row.source, vtab.part_runs(row)
            copy = copies[source.name]
            runs = [parts[part] for part in ("train", "val", "test")]
            table.add_row(
                row.name,
                str(row.classes),
                *(f"{run.stop - run.start:,}" for run in runs),
                "by hand" if source.manual else source.download,
                _state(source, copy, data_dir),
                style="" if copy else "dim",
            )
    console.print(table)
    console.print()
    there = [copy for copy in copies.values() if copy]
    missing = [row.source for name, row in sources.items() if not copies[name]]
    size = decimal(sum(copy.size for copy in there))
    state = [f"{len(there)} prepared ({size} on disk)"] if there else []
    if missing:
        by_hand = sum(bool(source.manual) for source in missing)
        more = f", and {by_hand} by hand" if by_hand else ""
        more = f"to download {total_download(missing)}{more}"
        state.append(f"{len(missing)} missing ({more})")
    home = f"^{re.escape(str(Path.home()))}(?=/)"
    roots = [re.sub(home, "~", str(root)) for root in vtab.data_dirs(data_dir)]
    lines = [
        f"{len(rows)} tasks on {len(sources)} data sets, in {' or '.join(roots)}",
        ", ".join(state),
        f"VTAB-1k trains on {vtab.NUM_TRAIN} of train and {vtab.NUM_VAL} of val.",
    ]
    if missing:
        lines.append("To prepare one: python -m vpt_jax.data prepare TASK")
    console.print("\n".join(lines), soft_wrap=True)
