# SPDX-License-Identifier: Apache-2.0
"""Writes the tables under "Measured" in docs/reliability.md from what was measured.

python docs/make_reliability.py

The numbers are those of docs/reliability/: `fuzz.json` by benchmarks/fuzz.py,
`faults.json` by benchmarks/faults.py, `soak.json` by benchmarks/soak.py. What was not
run is said to be. With `--check` nothing is written, and the exit code is 1 if the page
is not what this script makes.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGE, FIGURES = DOCS / "reliability.md", DOCS / "reliability"
START, END = "<!-- made by make_reliability.py -->", "<!-- end -->"


def section(figures: Path = FIGURES) -> str:
    """The part of the page between the markers."""
    parts = [
        ("Faults", "benchmarks/faults.py", _faults, "faults.json"),
        ("Bad input", "benchmarks/fuzz.py", _fuzz, "fuzz.json"),
        ("Soak", "benchmarks/soak.py", _soak, "soak.json"),
    ]
    lines = [START]
    for title, script, show, name in parts:
        path = figures / name
        lines += ["", f"### {title}", ""]
        if not path.exists():
            lines.append(f"Not run: `python {script} --json docs/reliability/{name}`")
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        lines += [*show(found), "", f"`{found['command']}`"]
    return "\n".join([*lines, "", END])


def page(text: str, figures: Path = FIGURES) -> str:
    """The whole page, of which the rest stays as it is."""
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(
            f"got no {START!r} and {END!r} in the page; expected one each."
        )
    before, _, rest = text.partition(START)
    return before + section(figures) + rest.partition(END)[2]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _fuzz(found: dict[str, Any]) -> list[str]:
    rows = [
        [
            row["reader"],
            *(_count(row[k]) for k in ("cases", "refused", "accepted", "crashes")),
            f"{row['slowest_s']:.2f}",
            f"{row['peak_mib']:.0f}",
            row["seed"],
        ]
        for row in found["rows"]
    ]
    keys = ("cases", "refused", "accepted", "crashes")
    total = [_count(sum(row[k] for row in found["rows"])) for k in keys]
    rows.append(["all", *total, "", "", ""])
    head = ["reader", *keys, "slowest, s", "memory, MiB", "seed"]
    return _table(head, rows)


def _faults(found: dict[str, Any]) -> list[str]:
    """`kinds` is a number of faults, or a row of its own, for every kind of fault."""
    kinds, rows = found.get("kinds", {}), []
    for kind, value in kinds.items() if isinstance(kinds, dict) else ():
        if isinstance(value, dict):
            shown = [value.get(k, "") for k in ("faults", "survived", "lost")]
        else:
            shown = [value, "", ""]
        rows.append([kind, *map(_count, shown)])
    total = [_count(found[k]) for k in ("faults", "survived", "lost")]
    rows.append(["all", *total])
    return _table(["fault", "injected", "survived", "lost"], rows)


def _soak(found: dict[str, Any]) -> list[str]:
    rows = [
        ("steps", "steps", "{:,}"),
        ("seconds", "seconds", "{:.0f}"),
        ("memory, median, MB", "memory_mb", "{:.0f}"),
        (
            "its rise over the run, MB (line; falls left out)",
            "memory_rise_mb",
            "{:.1f}",
        ),
        ("which may be, MB", "memory_bound_mb", "{:.0f}"),
        ("a step at the start, ms", "step_ms_first", "{:.2f}"),
        ("a step at the end, ms", "step_ms_last", "{:.2f}"),
    ]
    return _table(
        ["", "measured"],
        [[name, form.format(found[key])] for name, key, form in rows],
    )


def main() -> None:
    """Writes the page, or checks it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    made = page(text)
    if args.check:
        sys.exit(
            0 if made == text else f"{PAGE} is old: python docs/make_reliability.py"
        )
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
