# SPDX-License-Identifier: Apache-2.0
"""Where the runs of a benchmark are performed: here, or by an engine on a cluster.

`Here` performs one after another in this process. `Ray` makes each a Ray task, whose
files come back as its result. `Slurm` submits job arrays through submitit, which write
into the workdir: all nodes must share it.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from vpt_jax.bench import jobs
from vpt_jax.bench.protocol import Job
from vpt_jax.files import cli, workdirs
from vpt_jax.files.messages import expect
from vpt_jax.prompts import check_choice

LAUNCHERS = ("here", "ray", "slurm")
Finished = list[tuple[Job, str]]  # jobs that ended; the text of an error, or ''
_RETRIES = 10  # of a task whose node died
_POLL_S = 5.0
# The variables that say where data lies; workers are not started by our shell.
_PASSED_ON = ("TFDS_DATA_DIR", "VPT_JAX_CACHE", "JAX_COMPILATION_CACHE_DIR")


@runtime_checkable
class Launcher(Protocol):
    """What the three have in common."""

    slots: int  # how many jobs it should hold at once
    sees_files: bool  # whether data lies where this process looks for it

    def submit(self, ready: Sequence[Job]) -> None:
        """Takes jobs, to be performed in this order."""

    def wait(self) -> Finished:
        """Blocks for some seconds or until a job ends; jobs that ended since."""
        ...


def make(name: str, workdir: Path, address: str, resources: str) -> Launcher:
    """The launcher of a name, see the module's docstring.

    Args:
      name: One of `LAUNCHERS`.
      workdir: Of the benchmark.
      address: Of a Ray cluster (`auto`, `ray://host:10001`; empty: this machine), or
        submitit's executor (empty: `slurm`; `local`: processes of this machine).
      resources: `KEY=VALUE,...` of every run: Ray's, or submitit's parameters.

    Raises:
      ValueError: If the engine is unknown, not installed or cannot be reached, or what
        was given is not for it.
    """
    check_choice("launcher", name, LAUNCHERS)
    if name == "here":
        instead = "none without a launcher; add --launcher=ray or --launcher=slurm"
        expect(not address, "address", address, instead)
        expect(not resources, "resources", resources, instead)
        return Here(workdir)
    # The nodes compute; this process must not take an accelerator from them.
    jax.config.update("jax_platforms", "cpu")
    kind = {"ray": Ray, "slurm": Slurm}[name]
    try:
        return kind(workdir, address, parse_resources(resources))
    except ImportError as error:
        package = {"ray": "'ray[client]'", "slurm": "submitit"}[name]
        raise ValueError(
            f"--launcher={name} needs {error.name}; pip install {package}."
        ) from error


def parse_resources(text: str) -> dict[str, Any]:
    """`GPU=1,slurm_partition=gpu` as a dict; numbers become numbers."""
    found: dict[str, Any] = {}
    for word in filter(None, text.split(",")):
        key, equals, value = word.partition("=")
        expect(key and equals and value, "resources", text, "KEY=VALUE,KEY=VALUE")
        try:
            found[key] = float(value) if "." in value else int(value)
        except ValueError:
            found[key] = value
    return found


class Here:
    """One after another in this process; an error ends it."""

    slots = 1
    sees_files = True

    def __init__(self, workdir: Path) -> None:
        self._workdir = workdir
        self._queue: list[Job] = []

    def submit(self, ready: Sequence[Job]) -> None:
        self._queue += ready

    def wait(self) -> Finished:
        job = self._queue.pop(0)
        jobs.perform(job, self._workdir, prefix=job.name)
        return [(job, "")]


class Ray:
    """Tasks of a Ray cluster."""

    slots = 10_000

    def __init__(
        self, workdir: Path, address: str, resources: Mapping[str, Any]
    ) -> None:
        import ray  # pyright: ignore[reportMissingImports]

        self._ray, self._workdir = ray, workdir
        self.sees_files = not address.startswith("ray://")
        variables = {k: os.environ[k] for k in _PASSED_ON if k in os.environ}
        try:
            ray.init(
                address=address or None,
                runtime_env={"env_vars": variables},
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"cannot reach a Ray cluster at {address!r} ({error}); start one with"
                " `ray start --head`, or leave --address empty."
            ) from error
        named = dict(resources) or _accelerator(ray)
        self._task = ray.remote(_carried)
        self._options = {
            "num_cpus": named.pop("CPU", 1),
            "num_gpus": named.pop("GPU", 0),
            "resources": named or None,
            "max_retries": _RETRIES,
            "retry_exceptions": False,
        }
        self._jobs: dict[Any, Job] = {}

    def submit(self, ready: Sequence[Job]) -> None:
        for job in ready:
            task = self._task.options(name=job.name, **self._options)
            self._jobs[task.remote(job)] = job

    def wait(self) -> Finished:
        ended, _ = self._ray.wait(list(self._jobs), num_returns=1, timeout=_POLL_S)
        found = []
        for reference in ended:
            job = self._jobs.pop(reference)
            try:
                jobs.unpack(job, self._workdir, self._ray.get(reference))
                found.append((job, ""))
            except self._ray.exceptions.RayError as error:
                found.append((job, str(error)))
        return found


def _carried(job: Job) -> dict[str, bytes]:
    cli.keep_compiled()
    return jobs.carried(job)


def _accelerator(ray: Any) -> dict[str, Any]:
    """What one run takes of the cluster if nobody says: a GPU, or a TPU host."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(node.get("GPU") for node in nodes):
        return {"GPU": 1}
    chips = max((node.get("TPU", 0) for node in nodes), default=0)
    # JAX takes all chips of a host, so a run has to.
    return {"TPU": chips} if chips else {}


class Slurm:
    """Arrays of Slurm jobs, by submitit."""

    sees_files = True

    def __init__(
        self, workdir: Path, address: str, resources: Mapping[str, Any]
    ) -> None:
        import submitit

        self._workdir = workdir.absolute()
        try:
            self._executor = submitit.AutoExecutor(
                folder=self._workdir / "slurm" / "%j", cluster=address or "slurm"
            )
            self._executor.update_parameters(name="vpt_jax", **resources)
        except (RuntimeError, ValueError, TypeError, NameError) as error:
            raise ValueError(
                f"submitit refuses ({error}); expected a machine with Slurm or"
                " --address=local, and its parameters as --resources."
            ) from error
        # The local executor starts all that it gets at once.
        self.slots = os.cpu_count() or 1 if address == "local" else 1000
        self._jobs: list[tuple[Job, Any]] = []
        self._record = self._workdir / "slurm" / "submitted.json"
        self._before = self._still_there() if address != "local" else {}

    def _still_there(self) -> dict[str, Any]:
        """Jobs that an earlier command left in the queue, by name."""
        import submitit

        if not self._record.exists():
            return {}
        numbers = workdirs.read_record(self._record)
        folder = self._workdir / "slurm" / "%j"
        found = {n: submitit.SlurmJob(folder, number) for n, number in numbers.items()}
        return {n: job for n, job in found.items() if not job.done(force_check=True)}

    def submit(self, ready: Sequence[Job]) -> None:
        self._jobs += [
            (j, self._before[j.name]) for j in ready if j.name in self._before
        ]
        new = [job for job in ready if job.name not in self._before]
        if new:
            tasks = [_SlurmTask(job, self._workdir) for job in new]
            self._jobs += zip(new, self._executor.submit_array(tasks), strict=True)
        numbers = {job.name: handle.job_id for job, handle in self._jobs}
        workdirs.write_record(self._record, numbers)

    def wait(self) -> Finished:
        from submitit.core.utils import UncompletedJobError

        found, running = [], []
        for job, handle in self._jobs:
            if not handle.done():
                running.append((job, handle))
                continue
            try:
                error = handle.exception()
                found.append((job, str(error) if error else ""))
            except UncompletedJobError as error:
                found.append((job, str(error)))
        self._jobs = running
        if not found:
            time.sleep(1.0)
        return found


class _SlurmTask:
    """What submitit pickles; after a time-out or a preemption it is submitted again."""

    def __init__(self, job: Job, workdir: Path) -> None:
        self._job, self._workdir = job, workdir

    def __call__(self) -> None:
        cli.keep_compiled()
        jobs.perform(self._job, self._workdir, prefix=self._job.name)

    def checkpoint(self) -> Any:
        """Called by submitit; the run goes on from its own checkpoints."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)
