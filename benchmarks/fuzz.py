# SPDX-License-Identifier: Apache-2.0
r"""Feeds every reader thousands of bad inputs and counts what comes of it.

python benchmarks/fuzz.py --cases 10000 --json docs/reliability/fuzz.json

The cases are those of tests/fuzzing.py, of which the tests run a few hundred. A reader
must accept a case or refuse it by one error of our own; all else is a crash, and is
printed. Every reader has a process of its own, so that its memory is its own: the most
that it used above what it had before the first case. The seed changes with every run
unless it is given (`--seed`); with `--json`, readers that are not run keep what the
file says of them.
"""

import argparse
import collections
import json
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/weights"), str(ROOT)]

import fuzzing  # noqa: E402
import hypothesis  # noqa: E402


def memory(name):
    """`VmRSS` or `VmHWM` of this process in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(s.split()[1]) for s in lines if s.startswith(name)) / 1024


def fuzz(name, cases, seed, verbose=True):
    """Runs cases of one reader in this process; a row of the table."""
    reader = fuzzing.READERS[name]()
    counts, slowest, crashes = collections.Counter(), 0.0, collections.Counter()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=cases,
            deadline=None,
            database=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(reader.cases)
        def run(case):
            nonlocal slowest
            began = time.perf_counter()
            try:
                counts[reader.attempt(case, folder)] += 1
            except Exception as error:
                counts["crashes"] += 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{type(error).__name__} at {where.filename}:{where.lineno}"
                crashes[kind] += 1
                if verbose and crashes[kind] == 1:
                    print(f"--- {name}: {str(case)[:300]}", file=sys.stderr)
                    traceback.print_exc(limit=-4)
            seconds = time.perf_counter() - began
            if verbose and seconds > max(slowest, 1.0):
                print(
                    f"{name}: {seconds:.1f} s for {repr(case)[:300]}", file=sys.stderr
                )
            slowest = max(slowest, seconds)

        warm_up(reader, folder)
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # peak memory counts from here
        run()
    for kind, number in crashes.most_common():
        print(f"{number:6} {kind}", file=sys.stderr)
    return {
        "reader": name,
        "cases": counts.total(),
        "refused": counts["refused"],
        "accepted": counts["accepted"],
        "crashes": counts["crashes"],
        "seconds": round(time.perf_counter() - start, 1),
        "slowest_s": round(slowest, 3),
        "peak_mib": round(max(memory("VmHWM") - before, 0.0), 1),
        "seed": seed,
        "command": f"python benchmarks/fuzz.py --readers '{name}' --cases {cases}"
        f" --seed {seed}",
    }


def warm_up(reader, folder):
    """Imports and first compilations are not the readers' time and memory."""

    @hypothesis.settings(
        max_examples=5,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(reader.cases)
    def few(case):
        try:
            reader.attempt(case, folder)
        except Exception:  # will be counted when it comes again
            return

    few()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--readers", nargs="+", choices=list(fuzzing.READERS))
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--json", type=Path, help="file to update")
    parser.add_argument(
        "--row", action="store_true", help="one reader, in this process"
    )
    args = parser.parse_args()
    seed = time.time_ns() % 2**32 if args.seed is None else args.seed
    names = args.readers or list(fuzzing.READERS)
    if args.row:
        print(json.dumps(fuzz(names[0], args.cases, seed)))
        return
    rows = {}
    if args.json and args.json.exists():
        rows = {row["reader"]: row for row in json.loads(args.json.read_text())["rows"]}
    for name in names:
        options = ["--readers", name, "--cases", str(args.cases), "--seed", str(seed)]
        done = subprocess.run(
            [sys.executable, __file__, *options, "--row"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        print({k: v for k, v in rows[name].items() if k != "command"}, flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            order = [rows[name] for name in fuzzing.READERS if name in rows]
            content = {
                # Rows may be of several runs; each has the whole of its own.
                "command": "python benchmarks/fuzz.py --readers READER --cases CASES"
                " --seed SEED",
                "rows": order,
            }
            args.json.write_text(json.dumps(content, indent=2) + "\n")
    sys.exit(1 if any(rows[name]["crashes"] for name in names) else 0)


if __name__ == "__main__":
    main()
