# SPDX-License-Identifier: Apache-2.0
r"""Runs docs/walkthrough.md from top to bottom, as a reader would, and shows what came.

python docs/make_walkthrough.py            # runs it and writes the outputs into it
python docs/make_walkthrough.py --check    # runs it; fails where a step fails

Every block of `bash` or `python` is a step, each a process of its own, all in one empty
folder. A `text` block after it holds what the step printed.
"""

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PAGE = Path(__file__).parent / "walkthrough.md"
STEP = re.compile(r"```(bash|python)\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)
LINES = 16  # of an output; more are cut in the middle


def run(kind: str, code: str, folder: Path) -> str:
    """What a step prints; exits with it if it fails."""
    words = ["bash", "-euc", code] if kind == "bash" else [sys.executable, "-c", code]
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, "VPT_JAX_CACHE": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{code}\n{done.stdout}\nThis step failed with {done.returncode}.")
    return done.stdout


def spent() -> float:
    """Seconds of a core that the steps took so far, on a busy machine too."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def shown(text: str, folder: Path) -> str:
    """An output as the page has it."""
    lines = text.replace(str(folder), "/home/you").rstrip().splitlines()
    lines = [line for line in lines if "still at work" not in line]  # a busy machine
    if len(lines) > LINES:
        lines = [*lines[: LINES // 2], "...", *lines[-LINES // 2 :]]
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    """Runs all steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    page, parts, at = PAGE.read_text(encoding="utf-8"), [], 0
    folder = Path(tempfile.mkdtemp(prefix="walkthrough"))
    begin = time.perf_counter()
    for step in STEP.finditer(page):
        kind, code, _ = step.groups()
        start, used = time.perf_counter(), spent()
        output = run(kind, code, folder)
        took = f"{time.perf_counter() - start:6.1f} s"
        took += f", {spent() - used:6.1f} s of a core"
        print(f"{took}  {code.strip().splitlines()[0][:60]}", flush=True)
        block = f"```{kind}\n{code}```\n"
        if text := shown(output, folder):
            block += f"\n```text\n{text}\n```\n"
        parts += [page[at : step.start()], block]
        at = step.end()
    print(f"{time.perf_counter() - begin:6.1f} s, {spent():6.1f} s of a core, in all")
    if not check:
        PAGE.write_text("".join([*parts, page[at:]]), encoding="utf-8")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
