# SPDX-License-Identifier: Apache-2.0
"""Public data sets from the command line: what is there, prepare, check.

  python -m vpt_jax.data list
  python -m vpt_jax.data prepare svhn dtd
  python -m vpt_jax.data check svhn

Exit codes: 0 fine, 1 a data set is wrong or could not be prepared, 2 bad usage or
something is missing, 130 Ctrl-C.
"""

import argparse
import difflib
import sys
import time
from collections.abc import Callable, Sequence

from vpt_jax.data.public import builders, check, listing, vtab
from vpt_jax.files import messages


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vpt_jax.data",
        description="The data sets of VTAB-1k and FGVC: list, prepare, check.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text, tasks in (
        ("list", "show all tasks, and which are prepared", ""),
        ("prepare", "download and prepare", "'all' for those without manual files"),
        ("check", "read all of a prepared set and verify it", "'all' for those there"),
    ):
        about = f"{text.capitalize()}."
        add = commands.add_parser(name, help=text, description=about).add_argument
        if tasks:
            add("task", nargs="+", help=f"as `list` shows them; {tasks}")
        where = "of prepared sets; else $TFDS_DATA_DIR and ~/tensorflow_datasets"
        add("--data_dir", default="", help=where)
        add("--traceback", action="store_true", help="show where an error was raised")
    return parser


def _rows(
    names: Sequence[str], whole: Callable[[vtab.Benchmark], bool]
) -> list[vtab.Benchmark]:
    """The rows of the tasks named, each once; of 'all' those that `whole` accepts."""
    known, rows = vtab.BENCHMARKS, {}
    for name in names:
        if name != "all" and name not in known:
            close = [task for task in known if name and name in task]
            close = close or difflib.get_close_matches(name, known)
            expected = f"'all' or {' or '.join(close or known)}"
            remedy = "`python -m vpt_jax.data list` shows all"
            raise messages.mismatch("", f"task {name!r}", expected, remedy)
        some = filter(whole, known.values()) if name == "all" else [known[name]]
        rows |= {row.name: row for row in some}
    return list(rows.values())


def _prepare(args: argparse.Namespace) -> int:
    rows = _rows(args.task, lambda row: not row.source.manual)
    if "all" in args.task:
        left = [r.name for r in vtab.BENCHMARKS.values() if r not in rows]
        if left:
            print(f"not among all, as they need files by hand: {', '.join(left)}")
    todo, sets = [], {}
    for row in rows:
        sets.setdefault(row.source.name, row)  # several tasks may be on one set
    for row in sets.values():
        try:
            found = vtab.find(row, args.data_dir)
        except ValueError:
            todo.append(row)
        else:
            print(f"{row.source.name}: already prepared in {found}")
    for row in todo:
        builders.require(row, args.data_dir)
    if todo:
        where, names = vtab.data_dirs(args.data_dir)[0], [r.source.name for r in todo]
        size = listing.total_download(row.source for row in todo)
        print(f"to prepare in {where}: {', '.join(names)}; {size} to download")
    failed = False
    for row in todo:
        try:
            found = builders.prepare(row, args.data_dir)
        # tfds' builders raise errors of many kinds; the others go on.
        except Exception as error:
            if args.traceback:
                raise
            failed = True
            _complain(f"{row.source.name} is not prepared: {messages.reason(error)}")
        else:
            print(f"{row.source.name}: prepared in {found}", flush=True)
            print(f"  verify it: python -m vpt_jax.data check {row.name}")
    return int(failed)


def _check(args: argparse.Namespace) -> int:
    rows = _rows(args.task, lambda row: bool(listing.find(row, args.data_dir)))
    for row in rows:
        vtab.find(row, args.data_dir)  # before hours of reading others
    if not rows:
        raise ValueError("got no prepared data set; prepare one, or give --data_dir.")
    wrong = []
    for row in rows:
        start = time.monotonic()
        found = check.check(row, args.data_dir, lambda text: print(text, flush=True))
        for note in found.notes:
            print(f"  note: {note}")
        for error in found.errors:
            print(f"  error: {error}")
        seconds, num = time.monotonic() - start, len(found.errors)
        verdict = f"{num} error{'s' * (num > 1)}" if num else "fine"
        print(f"{row.name}: {verdict} ({seconds:.0f} s)", flush=True)
        wrong += [row.name] if found.errors else []
    if wrong and len(rows) > 1:
        print(f"wrong: {', '.join(wrong)}")
    return int(bool(wrong))


def _complain(error: object) -> None:
    print(f"error: {error} (--traceback shows where)", file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        print(note, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command of these arguments, or the process's; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "list":
            listing.show(args.data_dir)
            return 0
        return (_prepare if args.command == "prepare" else _check)(args)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if args.traceback:
            raise
        _complain(error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
