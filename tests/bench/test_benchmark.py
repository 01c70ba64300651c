# SPDX-License-Identifier: Apache-2.0
"""A benchmark from start to leaderboard: interrupted, spread, repeated, asked about."""

import json
import os
import random
import signal
import subprocess
import sys

import pytest
import test_records
from conftest import ROOT, SMALL, save_small_backbone, start_command
from test_protocol import load
from test_vtab import toy

import vpt_jax
from vpt_jax import train
from vpt_jax.bench import benchmark, jobs, launch, protocol
from vpt_jax.data.public import vtab
from vpt_jax.files import preemption, states, workdirs
from vpt_jax.models import vit
from vpt_jax.run import experiment, stages

pytestmark = pytest.mark.usefixtures("standard_promotion")
BOARD = [f"leaderboard.{suffix}" for suffix in ("json", "md", "csv", "tex", "html")]


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """Prepared pictures under the names of two VTAB tasks, and a small backbone."""
    folder = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VPT_JAX_CACHE", str(folder / "cache"))
        patch.setattr(vtab, "NUM_TRAIN", 4)
        patch.setattr(vtab, "NUM_VAL", 2)
        # Not to compile again in every test.
        patch.setattr(jobs, "_forget_compiled", lambda task: None)
        for name in ("dtd", "svhn"):
            patch.setitem(vtab.BENCHMARKS, name, toy(name=name))
        test_records.make(folder / "toy" / "1.0.0", "array_record")
        save_small_backbone(folder / "small.safetensors")
        yield folder


def values(place, *tasks, **changes):
    """The vtab config for toys; changes as in `benchmark__rates`."""
    arg = ",".join(f"task={task}" for task in tasks or ("dtd", "svhn"))
    found = load("vtab", f"{arg},smoke").to_dict()
    found["backbone"] |= {
        "variant": SMALL,
        "checkpoint": str(place / "small.safetensors"),
        "image_size": 32,
    }
    found["task"]["data_dir"] = str(place)
    found["tune"]["batch_size"] = 4
    found["condense"]["keep_ratios"] = (0.5,)
    found["benchmark"]["decays"] = (1e-4,)  # with two rates, a grid of two
    found |= {"baselines": ("linear",), "eval_batch_size": 4}
    for key, value in changes.items():
        group, _, name = key.partition("__")
        if name:
            found[group][name] = value
        else:
            found[group] = value
    return found


def read(workdir):
    return {name: (workdir / name).read_bytes() for name in BOARD}


@pytest.fixture(scope="module")
def undisturbed(place, tmp_path_factory):
    """The workdir of a finished benchmark, and what `run` returned."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    content = benchmark.run(values(place), workdir, launch.Here(workdir), "a command")
    return workdir, content


def test_what_lies_in_the_workdir(undisturbed):
    workdir, content = undisturbed
    assert {p.name for p in (workdir / "runs").iterdir()} == {"dtd", "svhn"}
    for task in ("dtd", "svhn"):
        found = {p.name for p in (workdir / "runs" / task).iterdir() if p.is_dir()}
        trials = {
            f"{kind}-lr{rate}-wd0.0001"
            for kind in ("linear", "grid-2prompts")
            for rate in (0.5, 2.5)
        }
        assert found == trials | {"final-seed42", "final-seed44"}
        final = workdir / "runs" / task / "final-seed42"
        assert len(list((final / "prompts").iterdir())) == 4
        assert (final / "report.json").exists()
        assert not (final / "checkpoints").exists()
        assert not (
            workdir / "runs" / task / "linear-lr0.5-wd0.0001" / "prompts"
        ).exists()
    assert json.loads((workdir / "leaderboard.json").read_bytes()) == content
    for name, task in content["tasks"].items():
        assert task["missing"] == 0
        assert len(task["grid"]) == 2
        assert task["chosen"]["how"] == "sweep"
        stages = [(row["stage"], row["seed"]) for row in task["rows"]]
        kinds = ("linear", "tune", "condense", "finetune")
        assert stages == [(stage, seed) for seed in (42, 44) for stage in kinds]
        for row in task["rows"]:
            assert row["val_accuracy"] is None, name  # those pictures were trained on
            assert 0 <= row["test_accuracy"] <= 1


def test_a_final_run_is_what_the_same_config_gives_alone(undisturbed, place, tmp_path):
    """No state leaks from one run into the next."""
    workdir, content = undisturbed
    bench = protocol.parse(values(place))
    results = benchmark.finished(bench, workdir)
    (job,) = (j for j in protocol.jobs(bench, results) if j.name == "svhn/final-seed44")
    report = experiment.run(job.config, tmp_path)
    own = [row for row in content["tasks"]["svhn"]["rows"] if row["seed"] == 44]
    alone = [
        {k: v for k, v in r.items() if not k.startswith("latency_")}
        for r in report["rows"]
    ]
    assert alone == own


def test_the_same_command_again_makes_what_is_missing(
    undisturbed, place, tmp_path, monkeypatch
):
    workdir, _ = undisturbed
    before, perform, done = read(workdir), jobs.perform, []
    monkeypatch.setattr(
        jobs, "perform", lambda job, *a, **k: done.append(job.name) or perform(job, *a)
    )
    benchmark.run(values(place), workdir, launch.Here(workdir), "a command")
    assert read(workdir) == before and done == []
    (workdir / "runs/svhn/final-seed42").rename(tmp_path / "gone")
    benchmark.run(values(place), workdir, launch.Here(workdir), "a command")
    assert read(workdir) == before and done == ["svhn/final-seed42"]


class Interrupted(BaseException):
    """As Ctrl-C: nothing catches it."""


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))]
)
def test_interrupted_anywhere_the_leaderboard_is_the_same(
    undisturbed, place, tmp_path, monkeypatch, seed
):
    """Ends in the middle of writing checkpoints, files, and the last rename."""
    rng = random.Random(seed)
    left = [0]

    def fragile(function):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise Interrupted
            return function(*args, **kwargs)

        return wrapped

    for owner, name in (
        (states, "save_checkpoint"),
        (workdirs, "write_json"),
        (vpt_jax, "save_prompts"),
        (jobs, "publish"),
        (stages, "evaluated"),
    ):
        monkeypatch.setattr(owner, name, fragile(getattr(owner, name)))
    interruptions = 0
    while True:
        left[0] = rng.randint(1, 15)
        try:
            launcher = launch.Here(tmp_path)
            benchmark.run(values(place, "svhn"), tmp_path, launcher, "a command")
            break
        except Interrupted:
            interruptions += 1
    assert interruptions >= 3
    board = json.loads((tmp_path / "leaderboard.json").read_bytes())
    expected = json.loads((undisturbed[0] / "leaderboard.json").read_bytes())
    assert board["tasks"]["svhn"] == expected["tasks"]["svhn"]


# What the real command is given: its pictures are known to this process alone.
SWEEP = """
import sys
sys.path.insert(0, {tests!r})
from ml_collections import ConfigDict
from test_vtab import toy
from vpt_jax.data.public import vtab
from vpt_jax.models import vit

vit.VARIANTS["little"] = {sizes!r}
vtab.NUM_TRAIN, vtab.NUM_VAL = 4, 2
vtab.BENCHMARKS["svhn"] = toy(name="svhn")

def get_config():
    return ConfigDict({values!r})
"""


@pytest.mark.slow
def test_a_sweep_that_gets_sigterm_again_and_again_ends_the_same(place, tmp_path):
    """By the real command, at random times."""
    config = tmp_path / "sweep.py"
    config.write_text(
        SWEEP.format(
            tests=str(ROOT / "tests"),
            sizes=vit.VARIANTS["little"],
            values=values(place, "svhn"),
        )
    )

    def start(workdir):
        return start_command(f"--config={config}", f"--workdir={workdir}")

    whole = start(tmp_path / "whole")
    _, error = whole.communicate(timeout=600)
    assert whole.returncode == 0, error
    rng, stopped = random.Random(0), 0
    while True:
        child = start(tmp_path / "stopped")
        child.stdout.readline()  # before it says something it is not listening
        try:
            _, error = child.communicate(timeout=rng.uniform(0.1, 1.5))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGTERM)
            _, error = child.communicate(timeout=600)
        if child.returncode == 0:
            break
        assert child.returncode == preemption.EXIT_CODE, error
        assert "Traceback" not in error
        stopped += 1
    assert stopped >= 3
    boards = [
        json.loads((tmp_path / name / "leaderboard.json").read_bytes())["tasks"]
        for name in ("whole", "stopped")
    ]
    assert boards[0] == boards[1]


class Elsewhere:
    """An engine that performs jobs in any order, where the workdir is not."""

    slots, sees_files = 3, True

    def __init__(self, workdir, fails=()):
        self.workdir, self.waiting, self.fails = workdir, [], fails

    def submit(self, ready):
        assert len(self.waiting) + len(ready) <= self.slots
        self.waiting += ready

    def wait(self):
        job = self.waiting.pop(random.Random(len(self.waiting)).randrange(1000) % 2 - 1)
        if job.name in self.fails:
            return [(job, "the node burnt down")]
        jobs.unpack(job, self.workdir, jobs.carried(job))
        return [(job, "")]


def test_failed_runs_are_named_and_tried_again(undisturbed, place, tmp_path, capsys):
    fails = ("dtd/grid-2prompts-lr0.5-wd0.0001",)
    with pytest.raises(
        ValueError, match=r"1 of 12 runs failed.*lr0.5-wd0.0001: the node"
    ):
        benchmark.run(values(place), tmp_path, Elsewhere(tmp_path, fails), "a command")
    assert "failed: the node burnt down" in capsys.readouterr().out
    board = json.loads((tmp_path / "leaderboard.json").read_bytes())
    assert board["tasks"]["svhn"]["missing"] == 0
    assert board["tasks"]["dtd"]["missing"] == 3  # and the two that need its grid
    assert board["tasks"]["dtd"]["chosen"] is None
    benchmark.run(values(place), tmp_path, Elsewhere(tmp_path), "a command")
    assert read(tmp_path) == read(undisturbed[0])


def test_a_sweep_compiles_once_per_shape(place, tmp_path):
    bench = protocol.parse(values(place))
    trials = bench.trials["svhn"]
    for kind in protocol.TRIALS:
        jobs.perform(trials[kind][0], tmp_path)
        before = train.train_epoch._cache_size()
        for job in trials[kind][1:]:
            jobs.perform(job, tmp_path)
        assert train.train_epoch._cache_size() == before


def test_a_diverged_run_counts_with_its_last_finite_epoch(place, tmp_path):
    config = values(
        place,
        "svhn",
        benchmark__rates=(1e38, 0.5),
        benchmark__decays=(1e6,),  # at that rate, even without a gradient
        baselines=(),
        seeds=(42,),
    )
    content = benchmark.run(config, tmp_path, launch.Here(tmp_path))
    grid = {row["base_lr"]: row for row in content["tasks"]["svhn"]["grid"]}
    assert grid[0.5]["epochs"] == grid[1e38]["planned_epochs"] == 2
    # The first epoch is one of warm-up at rate 0: its result is that of no training.
    assert grid[1e38]["epochs"] == 1
    assert 0 <= grid[1e38]["val_accuracy"] <= 1
    log = tmp_path / "runs/svhn/grid-2prompts-lr1e+38-wd1e+06/log.txt"
    assert "ended with epoch" in log.read_text()


# What a user asks, and what goes wrong.


def test_status(undisturbed, place, tmp_path, capsys):
    workdir, _ = undisturbed
    bench = protocol.parse(values(place))
    rows = benchmark.status(bench, workdir)
    assert [row.task for row in rows] == ["dtd", "svhn"]
    assert {(row.grid, row.final, row.running) for row in rows} == {
        ((4, 4), (2, 2), ())
    }
    assert {row.seconds_left for row in rows} == {0.0}
    rows = benchmark.status(bench, tmp_path / "new")
    assert {(row.grid, row.final) for row in rows} == {((0, 4), (0, 2))}
    assert {row.seconds_left for row in rows} == {None}
    assert not (tmp_path / "new").exists()
    benchmark.print_status(bench, workdir)
    assert "12 of 12 runs done, 0 running; all done." in capsys.readouterr().out


def test_status_of_a_benchmark_on_its_way(place, tmp_path, capsys):
    bench = protocol.parse(values(place))
    first, second = bench.trials["dtd"]["linear"][:2]
    jobs.perform(first, tmp_path)
    log = jobs.partial_folder(tmp_path, second.name) / "log.txt"
    workdirs.write_text(log, "epoch 1")
    row = benchmark.status(bench, tmp_path)[0]
    assert row.grid == (1, 4)
    assert row.running == (second.name,)
    assert row.seconds_left is not None and row.seconds_left > 0
    benchmark.print_status(bench, tmp_path)
    out = capsys.readouterr().out
    assert f"running: {second.name}" in out
    assert "1 of 12 runs done, 1 running" in out


def test_missing_data_is_one_error_before_anything_is_written(place, tmp_path):
    config = values(place, "svhn", "dtd", "eurosat", "dmlab")
    with pytest.raises(ValueError) as error:
        benchmark.run(config, tmp_path / "out", launch.Here(tmp_path / "out"))
    text = "\n".join([str(error.value), *error.value.__notes__])
    assert "2 of 4 data sets are not prepared: eurosat, dmlab" in text
    assert f"vpt_jax.data prepare eurosat dmlab --data_dir={place}" in text
    assert not (tmp_path / "out").exists()


def test_a_workdir_of_another_config_or_command_is_not_touched(undisturbed, place):
    workdir, _ = undisturbed
    before = read(workdir)
    with (
        workdirs.locked(workdir / ".lock"),
        pytest.raises(ValueError, match="another process works on"),
    ):
        benchmark.run(values(place), workdir, launch.Here(workdir))
    with pytest.raises(ValueError, match=r"tune\.epochs: 2 -> 3"):
        launcher = launch.Here(workdir)
        benchmark.run(values(place, tune__epochs=3), workdir, launcher, "a command")
    assert read(workdir) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("spark", "", ""), "launcher 'spark'"),
        (("here", "auto", ""), "add --launcher=ray"),
        (("here", "", "GPU=1"), "add --launcher=ray"),
        (("slurm", "local", "GPU"), "expected KEY=VALUE"),
        (("slurm", "local", "gpus=1,mem_gb=1.5"), "submitit refuses"),
        (("slurm", "", ""), "submitit refuses"),
    ],
)
def test_launchers_that_cannot_work(tmp_path, args, message):
    with pytest.raises(ValueError, match=message):
        launch.make(args[0], tmp_path, *args[1:])


def test_an_engine_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"pip install submitit"):
        launch.make("slurm", tmp_path, "", "")


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """A cluster that takes jobs and says of all what lies in the file `state`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    scripts = {
        "srun": "exit 0",
        "sbatch": f"echo x >> {tmp_path}/sbatch; echo Submitted batch job 42",
        "sacct": "echo 'JobID|State|NodeList'; for i in 0 1 2 3 4 5 6 7; do"
        f' echo "42_$i|$(cat {tmp_path}/state)|node"; done',
        "scancel": "exit 0",
    }
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    (tmp_path / "state").write_text("RUNNING")
    return tmp_path


def test_slurm_jobs_in_the_queue_are_found_again(fake_slurm, place):
    """The command was killed and is given again: nothing is submitted twice."""
    four = values(place, "svhn", benchmark__decays=(1e-4, 0.0))
    ready = list(protocol.parse(four).trials["svhn"]["grid"])
    first = launch.make("slurm", fake_slurm, "", "timeout_min=5")
    first.submit(ready[:3])
    assert first.wait() == []
    again = launch.make("slurm", fake_slurm, "", "timeout_min=5")
    again.submit(ready[:3])
    assert again.wait() == []
    assert (fake_slurm / "sbatch").read_text() == "x\n"
    again.submit(ready[3:])
    assert (fake_slurm / "sbatch").read_text() == "x\nx\n"
    # Jobs that ended are not waited for: what they left is seen from their folders.
    (fake_slurm / "state").write_text("FAILED")
    last = launch.make("slurm", fake_slurm, "", "timeout_min=5")
    last.submit(ready)
    assert (fake_slurm / "sbatch").read_text() == "x\nx\nx\n"
