# SPDX-License-Identifier: Apache-2.0
"""Answers for pictures from the command line.

  python -m vpt_jax.predict RUN_OR_FILE PICTURES_OR_FOLDERS...
  python -m vpt_jax.predict out/folder-pets holiday/ --out=answers.csv --top=3

RUN_OR_FILE is the folder of a finished run, whose best model on its validation set
answers (`best.json` there says which, and why), or a released `.safetensors` file.
Folders are gone through with all that is below them. Pictures are read in parallel and
in bounded memory, however many there are. What cannot be read is named, and the others
go on.

Exit codes: 0, all pictures were read. 1, some were not. 2, bad usage or a file that is
missing. 130, Ctrl-C.
"""

import argparse
import csv
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

SHOWN = 10  # lines of the table, where all are written to a file
_SAY_S = 25.0  # between lines of progress where there is no terminal


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vpt_jax.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="RUN_OR_FILE")
    parser.add_argument("pictures", metavar="PICTURES_OR_FOLDERS", nargs="+")
    parser.add_argument("--out", default="", help="answers.csv, or .jsonl for JSON")
    parser.add_argument("--top", type=int, default=1, help="classes per picture")
    parser.add_argument("--batch_size", type=int, default=64, help="pictures at a time")
    parser.add_argument("--backbone", default="", help="path or address of its file")
    parser.add_argument("--resize", default="", help="for files that do not say it")
    parser.add_argument("--traceback", action="store_true", help="show where it failed")
    return parser


def pictures_in(paths: Sequence[str]) -> Iterator[str]:
    """Files as they are given, and the picture files in folders and below, in order.

    Hidden files, and folders that systems add (`__MACOSX`, `@eaDir`), are left out.
    """
    from vpt_jax.data.pictures import EXTENSIONS

    for path in paths:
        if not os.path.isdir(path):
            yield path
            continue
        found = False
        for folder, below, names in os.walk(path):
            below[:] = sorted(n for n in below if n[0] not in ".@" and n != "__MACOSX")
            for name in sorted(names):
                if name[0] != "." and Path(name).suffix.lower() in EXTENSIONS:
                    found = True
                    yield os.path.join(folder, name)
        if not found:
            yield path  # is named as what cannot be read


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    args = _parser().parse_args(argv)
    from vpt_jax.files import cli  # after the flags: --help need not wait for it

    return cli.answer(_run, args)


def _run(args: argparse.Namespace) -> int:
    if args.top < 1 or args.batch_size < 1:
        got = f"--top is {args.top} and --batch_size {args.batch_size}"
        raise ValueError(f"{got}; expected 1 or more.")
    if args.out and Path(args.out).suffix not in (".csv", ".jsonl"):
        raise ValueError(f"--out is {args.out!r}; expected a name in .csv or .jsonl.")
    from vpt_jax.files import cli, durable
    from vpt_jax.serve import classifier

    cli.keep_compiled()
    with _Progress() as progress:
        model = classifier.load_classifier(
            args.model, backbone=args.backbone, resize=args.resize
        )
        print(model, file=sys.stderr)
        if not args.out:
            return _answer(args, model, lambda *_: None, progress)
        with durable.atomic_path(args.out) as temporary:
            # Names that are not UTF-8 are written as the bytes they are.
            with open(
                temporary, "w", encoding="utf-8", errors="surrogateescape", newline=""
            ) as file:
                code = _answer(args, model, _writer(args, file), progress)
    print(f"written: {args.out}", file=sys.stderr)
    return code


def _answer(
    args: argparse.Namespace,
    model: Any,
    write: Callable[[str, list[tuple[str, float]], str], None],
    progress: "_Progress",
) -> int:
    """Goes through the pictures; the exit code."""
    from vpt_jax.files.messages import printable

    names = model.class_names
    top, width = min(args.top, len(names)), min(max(map(len, names)), 40)
    counts, broken = Counter(), 0
    progress.begin()
    stream = model.stream(pictures_in(args.pictures), batch_size=args.batch_size)
    for number, (path, found) in enumerate(stream):
        if isinstance(found, ValueError):
            broken += 1
            progress.clear()
            print(f"not read: {printable(str(found))}", file=sys.stderr)
            write(path, [], str(found))
            continue
        order = (-found).argsort(kind="stable")[:top]
        answers = [(names[k], float(found[k])) for k in order]
        counts[answers[0][0]] += 1
        write(path, answers, "")
        if not args.out or number < SHOWN:
            progress.clear()
            text = "  ".join(f"{name:{width}}  {p:7.2%}" for name, p in answers)
            print(f"{text}  {printable(path)}")
        elif number == SHOWN:
            print(f"... more in {args.out}")
        progress.show(number + 1)
    progress.clear()
    read = counts.total()
    each = ", ".join(f"{name} {n:,}" for name, n in counts.most_common(20))
    print(f"{read:,} pictures in {progress.seconds():.1f} s: {each}", file=sys.stderr)
    if broken:
        print(f"{broken:,} could not be read", file=sys.stderr)
    return 1 if broken else 0


def _writer(
    args: argparse.Namespace, file: Any
) -> Callable[[str, list[tuple[str, float]], str], None]:
    """Writes a line of JSON, or a row of CSV, per picture."""
    numbers = range(2, args.top + 1)
    more = [f"{name}_{k}" for k in numbers for name in ("label", "probability")]
    rows = csv.writer(file)

    def line(path: str, answers: list[tuple[str, float]], error: str) -> None:
        row: dict[str, Any] = {"path": path, "error": error}
        if answers:
            label, probability = answers[0]
            row = {"path": path, "label": label, "probability": probability}
            row["top"] = answers
        file.write(json.dumps(row) + "\n")

    def row(path: str, answers: list[tuple[str, float]], error: str) -> None:
        cells = [x for name, p in answers for x in (name, f"{p:.6g}")]
        empty = [""] * (2 * args.top - len(cells))
        rows.writerow([path, *cells, *empty, error])

    if args.out.endswith(".jsonl"):
        return line
    rows.writerow(["path", "label", "probability", *more, "error"])
    return row


class _Progress:
    """A line that replaces itself on a terminal; elsewhere one every half minute."""

    def __init__(self) -> None:
        self._live, self._ended = sys.stderr.isatty(), threading.Event()
        self._done = 0
        self.begin()

    def __enter__(self) -> "_Progress":
        if not self._live:
            threading.Thread(target=self._remind, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _remind(self) -> None:
        """Speaks while a first batch compiles and computes, which may take minutes."""
        while not self._ended.wait(_SAY_S / 20):
            if time.monotonic() - self._said >= _SAY_S:
                self._say()

    def begin(self) -> None:
        """Starts the clock: of pictures, not of loading."""
        self._start = self._said = time.monotonic()

    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._start

    def show(self, done: int) -> None:
        """How many are done, and how fast."""
        self._done = done
        if time.monotonic() - self._said >= (0.2 if self._live else _SAY_S):
            self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        text = f"{self._done:,} pictures, {self._done / self.seconds():.1f} a second"
        begin, end = ("\r\x1b[2K", "") if self._live else ("", "\n")
        print(f"{begin}{text}", end=end, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Makes room for other lines."""
        if self._live:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
