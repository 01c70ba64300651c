# SPDX-License-Identifier: Apache-2.0
"""Performs one run of a benchmark: its folder appears, by a rename, when it is whole.

Until then it is a hidden folder beside it, from which the run goes on. What jobs share
(backbone, pictures, compiled functions) stays in the process from one to the next.
"""

import dataclasses
import functools
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from vpt_jax.bench.protocol import Job
from vpt_jax.files import durable, workdirs
from vpt_jax.run import config as configs
from vpt_jax.run import experiment
from vpt_jax.run.stages import Unit

FOLDER = "runs"  # of the workdir
RESULT = "result.json"

_load_model = functools.lru_cache(maxsize=1)(experiment.load_model)
_load_pictures = functools.lru_cache(maxsize=1)(experiment.load_pictures)


def folder(workdir: Path, name: str) -> Path:
    """Where a finished job lies."""
    return workdir / FOLDER / name


def partial_folder(workdir: Path, name: str) -> Path:
    """Where an unfinished job lies."""
    path = folder(workdir, name)
    return path.with_name(f".{path.name}")


def num_train(backbone: configs.BackboneConfig, task: configs.TaskConfig) -> int:
    """How many pictures a run's training set has; what was loaded stays loaded."""
    model = _load_model(backbone)
    task = dataclasses.replace(task, splits="select")
    return len(_load_pictures(task, model.model.image_size).labels)


def result_of(workdir: Path, job: Job) -> dict[str, Any] | None:
    """The result of a finished job; None of another, or if it is damaged.

    Raises:
      ValueError: If its folder holds a run of another config.
    """
    path = folder(workdir, job.name)
    if not (path / RESULT).exists():
        return None
    try:
        experiment.check_same_config(job.config, path)
        return workdirs.read_record(path / RESULT)
    except workdirs.Damaged:
        return None  # done again; publish moves it aside


def perform(job: Job, workdir: Path, prefix: str = "") -> dict[str, Any]:
    """Runs a job in this process, from where it stopped; its folder is whole after.

    The result has `rows`, and `seconds` if all of it is timed, else None; `prefix` is
    of the lines that tell how far it is.
    """
    path, partial = folder(workdir, job.name), partial_folder(workdir, job.name)
    # A job that was submitted twice is waited for, not done twice.
    with workdirs.locked(partial.with_name(f"{partial.name}.lock"), wait=True):
        done = result_of(workdir, job)
        if done is None and (partial / RESULT).exists():  # killed before the rename
            publish(partial, path)
            done = result_of(workdir, job)
        if done is not None:
            return done
        result = _run(job, partial, prefix)
        if workdirs.writes():
            publish(partial, path)
    return result


def publish(partial: Path, path: Path) -> None:
    """Renames a job's finished folder, without what was only needed to resume."""
    for name in ("checkpoints", "results"):
        shutil.rmtree(partial / name, ignore_errors=True)
    if path.exists():
        workdirs.set_aside(path, lambda text: print(text, flush=True))
    durable.move(partial, path)


def carried(job: Job) -> dict[str, bytes]:
    """Runs a job where the workdir is not: the files of its folder, by path."""
    with tempfile.TemporaryDirectory(prefix="vpt_jax-") as scratch:
        perform(job, Path(scratch))
        path = folder(Path(scratch), job.name)
        found = sorted(p for p in path.rglob("*") if p.is_file())
        return {p.relative_to(path).as_posix(): p.read_bytes() for p in found}


def unpack(job: Job, workdir: Path, content: dict[str, bytes]) -> None:
    """Writes what `carried` returned; the job's folder appears when it is whole."""
    partial = partial_folder(workdir, job.name)
    shutil.rmtree(partial, ignore_errors=True)
    # The result last: a folder that has one is taken as whole.
    for name, data in sorted(content.items(), key=lambda item: item[0] == RESULT):
        with workdirs.atomic_path(partial / name) as temporary:
            temporary.write_bytes(data)
    publish(partial, folder(workdir, job.name))


@functools.lru_cache(maxsize=1)
def _forget_compiled(task: str) -> None:
    """Programs of another task, with other shapes, would only take memory."""
    del task
    jax.clear_caches()


def _run(job: Job, workdir: Path, prefix: str) -> dict[str, Any]:
    timed, start = not workdir.exists(), time.perf_counter()
    units = experiment.plan(job.config)
    if job.kind == "linear":
        units = [Unit("linear", job.config.seeds[0], keep_ratio=0.0)]
    _forget_compiled(job.task)
    model = _load_model(job.config.backbone)
    pictures = _load_pictures(job.config.task, model.model.image_size)
    with experiment.started(job.config, workdir, model, pictures, echo=False) as shared:
        rows, seconds = experiment.run_units(shared, units, prefix)
        if job.kind == "final":
            experiment.write_best(shared, rows)
            content = experiment.make_report(shared, rows, seconds, "")
            if workdirs.writes():
                workdirs.write_json(workdir / "report.json", content)
    if workdirs.writes() and job.kind != "final":
        shutil.rmtree(workdir / "prompts", ignore_errors=True)  # of a trial: 4 MB each
    elapsed = time.perf_counter() - start
    result = {
        "rows": rows,
        "seconds": round(elapsed, 3) if timed else None,
        "backbone": shared.backbone_info,
        "versions": experiment.versions(),
    }
    if workdirs.writes():
        workdirs.write_record(workdir / RESULT, result)
    return result
