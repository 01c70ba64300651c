# SPDX-License-Identifier: Apache-2.0
"""Executes the notebooks of `colabs/` and writes readable copies with their pictures.

    pip install '.[test]' && python docs/render_notebooks.py [NAME ...]

For every notebook `docs/notebooks/NAME.md` and its figures `NAME_1.png`, ..., which
GitHub shows. In git the notebooks themselves have no outputs; change those and run this
again (minutes, on the CPU, no network).
"""

import base64
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbclient
import nbformat

ROOT = Path(__file__).parent.parent
FIGURE = "# Figure: "
"""A cell that draws says what in a comment of one line, which becomes the alt text."""


def names() -> list[str]:
    """Names of the notebooks, without suffix."""
    return sorted(path.stem for path in (ROOT / "colabs").glob("*.ipynb"))


def read(name: str) -> Any:
    """The notebook as it is in git."""
    return nbformat.read(ROOT / "colabs" / f"{name}.ipynb", as_version=4)


def execute(notebook: Any, directory: str | os.PathLike, timeout: int) -> Any:
    """Runs all cells in a process of its own and puts their outputs into the notebook.

    Args:
      notebook: As `read` gives it; changed in place.
      directory: Where it runs.
      timeout: Seconds that a cell may take.

    Raises:
      nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    # As a reader's machine: the CPU, and not the many devices that tests may ask for.
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    env.pop("JAX_NUM_CPU_DEVICES", None)
    client = nbclient.NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",  # the interpreter that runs this
        resources={"metadata": {"path": str(directory)}},
        coalesce_streams=True,
    )
    return client.execute(env=env)


def figures(notebook: Any) -> list[tuple[Any, bytes]]:
    """Every figure as its cell and its PNG file."""
    return [
        (cell, base64.b64decode(output["data"]["image/png"]))
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]


def to_markdown(name: str, notebook: Any) -> tuple[str, dict[str, bytes]]:
    """The page of an executed notebook, and its figures by file name."""
    source = f"[`colabs/{name}.ipynb`](../../colabs/{name}.ipynb)"
    parts = [f"*{source}, executed by `python docs/render_notebooks.py`.*"]
    files: dict[str, bytes] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                file = f"{name}_{len(files) + 1}.png"
                files[file] = base64.b64decode(data["image/png"])
                parts.append(f"![{alt_text(cell.source)}]({file})")
            elif output.get("name") == "stdout" or "text/plain" in data:
                text = output.get("text") or data["text/plain"]
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", files


def alt_text(source: str) -> str:
    """What a cell says that it draws.

    Raises:
      ValueError: If it does not say so.
    """
    for line in source.splitlines():
        if line.startswith(FIGURE):
            return line.removeprefix(FIGURE)
    raise ValueError(
        f"a cell draws without a line {FIGURE!r}; expected one, for those who cannot"
        f" see the figure; add it to:\n{source}"
    )


def main(wanted: list[str]) -> None:
    """Renders the notebooks that are named, or all."""
    folder = ROOT / "docs" / "notebooks"
    folder.mkdir(exist_ok=True)
    for name in wanted or names():
        notebook, start = read(name), time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            execute(notebook, directory, timeout=1800)
        seconds = time.perf_counter() - start
        text, files = to_markdown(name, notebook)
        for old in folder.glob(f"{name}_*.png"):
            old.unlink()
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
        for file, data in files.items():
            (folder / file).write_bytes(data)
        print(f"{name}: {len(files)} figures, {seconds:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
