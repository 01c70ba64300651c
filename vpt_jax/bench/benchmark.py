# SPDX-License-Identifier: Apache-2.0
"""Runs a benchmark: hands its jobs to a launcher, collects results, writes the board.

A job is done when its folder `runs/TASK/NAME/` is there, so the same command goes on
with what is missing. `status` is what `--list` shows.
"""

import dataclasses
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vpt_jax.bench import jobs, protocol
from vpt_jax.bench.launch import Launcher
from vpt_jax.bench.protocol import Benchmark, Job
from vpt_jax.data.public import extracted, vtab
from vpt_jax.files import workdirs
from vpt_jax.files.messages import advised
from vpt_jax.report import leaderboard
from vpt_jax.run import experiment, parsing

_PENDING = "submitted.json"
_FRESH_S = 600.0  # a run whose files moved within this time is running
_FORWARD = 1 / 3  # of the work of a training step


def run(
    values: ConfigDict | Mapping[str, Any],
    workdir: Path,
    launcher: Launcher,
    command: str = "",
) -> dict[str, Any]:
    """Performs all jobs that are not done; the content of leaderboard.json, as written.

    Raises:
      ValueError: If the config or a data set cannot work, before anything is written;
        or if jobs failed on a cluster, after the others are done.
    """
    bench = protocol.parse(values)
    if launcher.sees_files:
        check_data(bench)
    results = finished(bench, workdir)
    pending: dict[str, Job] = {}
    failed: dict[str, str] = {}
    start = time.monotonic()
    with workdirs.locked(workdir / ".lock"):
        while True:
            taken = {*results, *failed, *pending}
            ready = [j for j in protocol.jobs(bench, results) if j.name not in taken]
            if ready := ready[: launcher.slots - len(pending)]:
                launcher.submit(ready)
                pending |= {job.name: job for job in ready}
            if not pending:
                break
            workdirs.write_record(workdir / _PENDING, {"names": sorted(pending)})
            for job, error in launcher.wait():
                del pending[job.name]
                if error:
                    failed[job.name] = error
                    print(f"{job.name} failed: {error}", flush=True)
                    continue
                result = jobs.result_of(workdir, job)
                if result is None:
                    raise ValueError(
                        f"{job.name} ended without a result in {workdir}; expected"
                        " nodes that share --workdir (Slurm)."
                    )
                results[job.name] = result
                _tell(bench, results, job, start)
                own = (j for j in protocol.planned(bench) if j.task == job.task)
                if all(j.name in results for j in own):
                    leaderboard.write(board(bench, results, command), workdir)
        content = board(bench, results, command)
        leaderboard.write(content, workdir)
        workdirs.write_record(workdir / _PENDING, {"names": []})
    if failed:
        name, error = next(iter(failed.items()))
        raise ValueError(
            f"{len(failed)} of {len(protocol.planned(bench))} runs failed, the first"
            f" is {name}: {error}. The same command tries them again."
        )
    return content


def check_data(bench: Benchmark) -> None:
    """Raises one ValueError if data sets of a benchmark are not prepared."""
    data_dir = bench.base.get("task", {}).get("data_dir", "")
    errors = {}
    for task in bench.tasks:
        if task in vtab.BENCHMARKS and not extracted.find(task, data_dir):
            try:
                vtab.find(vtab.BENCHMARKS[task], data_dir)
            except ValueError as error:
                errors[task] = error
    if len(errors) == 1:
        raise next(iter(errors.values()))
    if errors:
        where = f" --data_dir={shlex.quote(data_dir)}" if data_dir else ""
        raise advised(
            f"{len(errors)} of {len(bench.tasks)} data sets are not prepared:"
            f" {', '.join(errors)}.",
            "Prepare them once (only this needs TensorFlow), or run others: task=NAME.",
            "  pip install tensorflow h5py opencv-python-headless",
            f"  python -m vpt_jax.data prepare {' '.join(errors)}{where}",
        )


def finished(bench: Benchmark, workdir: Path) -> dict[str, dict[str, Any]]:
    """Results of all jobs whose folders are there."""
    results: dict[str, dict[str, Any]] = {}
    while True:  # finals can be named, and found, once their grid is read
        new = {
            job.name: result
            for job in protocol.jobs(bench, results)
            if job.name not in results
            and (result := jobs.result_of(workdir, job)) is not None
        }
        if not new:
            return results
        results |= new


def board(
    bench: Benchmark, results: Mapping[str, Mapping[str, Any]], command: str
) -> dict[str, Any]:
    """The content of leaderboard.json: nothing in it depends on the clock."""
    named = [job.name for job in protocol.jobs(bench, results)]
    known = [results[name] for name in named if name in results]
    versions: dict[str, set[str]] = {}
    for name, value in (pair for x in known for pair in x["versions"].items()):
        versions.setdefault(name, set()).add(value)
    return {
        "benchmark": bench.settings.name,
        "command": command,
        "versions": {k: ", ".join(sorted(v)) for k, v in versions.items()},
        "backbone": known[0]["backbone"] if known else {},
        "config": parsing.plain(
            {
                **bench.base,
                "benchmark": dataclasses.asdict(bench.settings),
                "tasks": {n: dataclasses.asdict(own) for n, own in bench.tasks.items()},
            }
        ),
        "tasks": protocol.board(bench, results),
    }


class TaskStatus(NamedTuple):
    """Of one task: jobs done and in all, names of those running, seconds left."""

    task: str
    grid: tuple[int, int]
    final: tuple[int, int]
    running: tuple[str, ...]
    seconds_left: float | None  # None: nothing was measured yet


def status(bench: Benchmark, workdir: Path) -> list[TaskStatus]:
    """What is done, running and left, without touching anything."""
    results, pending = finished(bench, workdir), _fresh_pending(workdir)
    planned = protocol.planned(bench)
    found = []
    for task in bench.tasks:
        own = [job for job in planned if job.task == task]
        left = [job for job in own if job.name not in results]
        final = [job for job in own if job.kind == "final"]
        grid = [job for job in own if job.kind != "final"]
        running = (j.name for j in left if j.name in pending or _is_moving(workdir, j))
        found.append(
            TaskStatus(
                task,
                (sum(j.name in results for j in grid), len(grid)),
                (sum(j.name in results for j in final), len(final)),
                tuple(running),
                _seconds_of(left, planned, results),
            )
        )
    return found


def print_status(bench: Benchmark, workdir: Path) -> None:
    """Prints `status` as a table."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    table = Table("task", box=None, padding=(0, 2, 0, 0))
    for name in ("grid", "final runs", "running", "time left"):
        table.add_column(name, justify="right")
    rows = status(bench, workdir)
    for row in rows:
        grid = "{}/{}".format(*row.grid) if row.grid[1] else ""
        cells = grid, "{}/{}".format(*row.final), str(len(row.running) or "")
        table.add_row(row.task, *cells, _duration(row.seconds_left))
    console.print(table)
    done, total = (sum(row.grid[i] + row.final[i] for row in rows) for i in (0, 1))
    running = [name for row in rows for name in row.running]
    shown = running[:10]
    if len(running) > len(shown):
        shown.append(f"{len(running) - len(shown)} more")
    for name in shown:
        console.print(f"running: {name}")
    known = [row.seconds_left for row in rows if row.seconds_left is not None]
    left = f"{_duration(sum(known))} left on one device" if known else "not yet timed"
    if done == total:
        left = "all done"
    console.print(f"{done} of {total} runs done, {len(running)} running; {left}.")


def _tell(bench: Benchmark, results: Mapping[str, Any], job: Job, start: float) -> None:
    """One line about a job that ended."""
    planned = protocol.planned(bench)
    rows, seconds = results[job.name]["rows"], results[job.name]["seconds"]
    split = "val" if job.kind != "final" else "test"
    best = next((r for r in rows if r["stage"] == "tune"), rows[0])
    text = f"{split} {100 * best[f'{split}_accuracy']:.1f} %"
    text += f", {seconds:.0f} s" if seconds else ""
    unfinished = [j for j in planned if j.name not in results]
    left = _seconds_of(unfinished, planned, results)
    text += "" if left is None else f"; {_duration(left)} left on one device"
    number = f"[{len(planned) - len(unfinished)}/{len(planned)}]"
    elapsed = time.monotonic() - start
    print(f"{elapsed:7.0f} s  {number} {job.name}: {text}", flush=True)


def _seconds_of(
    left: Sequence[Job], planned: Sequence[Job], results: Mapping[str, Any]
) -> float | None:
    """How long jobs take at the speed of those that were timed; None of none."""
    timed = [j for j in planned if results.get(j.name, {}).get("seconds")]
    seconds = sum(results[job.name]["seconds"] for job in timed)
    return sum(map(_work, left)) * seconds / sum(map(_work, timed)) if timed else None


def _work(job: Job) -> float:
    """Pictures that a job trains on, times epochs; those it only looks at for less.

    The number of prompts hardly counts: 200 cost a tenth more than none.
    """
    train, test = _sizes(job)
    if job.kind == "linear":
        return train * _FORWARD
    work = 0.0
    for unit in experiment.plan(job.config):
        if unit.stage in ("linear", "condense"):  # features once; nothing at all
            epochs = _FORWARD if unit.stage == "linear" else 0
        else:
            epochs = getattr(job.config, unit.trains_as).epochs
        work += epochs * train + _FORWARD * test
    return work


def _sizes(job: Job) -> tuple[int, int]:
    """Training and evaluated pictures, by the published sizes."""
    row, splits = vtab.BENCHMARKS.get(job.task), job.config.task.splits
    if row is None:  # tasks of tasks.py
        return 1000, 2000
    sizes = {name: run.stop - run.start for name, run in vtab.part_runs(row).items()}
    train = sizes.get("train800", sizes["train"])
    val = sizes.get("val200", sizes["val"])
    train += val if splits == "final" else 0
    return train, val if splits == "select" else sizes["test"]


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _fresh_pending(workdir: Path) -> set[str]:
    """Jobs that a running command has given to an engine."""
    path = workdir / _PENDING
    if not path.exists() or time.time() - path.stat().st_mtime > _FRESH_S:
        return set()
    return set(workdirs.read_record(path)["names"])


def _is_moving(workdir: Path, job: Job) -> bool:
    log = jobs.partial_folder(workdir, job.name) / "log.txt"
    return log.exists() and time.time() - log.stat().st_mtime < _FRESH_S
