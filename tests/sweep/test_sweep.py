# SPDX-License-Identifier: Apache-2.0
"""All of VTAB-1k's smoke sweep by the real command: killed, on Ray, through submitit.

19 tasks on small prepared data sets, a 2 x 2 grid, two seeds, the small backbone of the
package. Every way of running it must leave the same leaderboard, byte for byte.
Run by `.ci/sweep`; takes an hour on two cores.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import fixtures_tfds
import pytest

ROOT = Path(__file__).parents[2]
BOARD = [f"leaderboard.{suffix}" for suffix in ("json", "md", "csv", "tex", "html")]
RUNS = 19 * (4 + 4 + 2)
KILLS = 5
SEED = 20261122  # of the moments of the kills


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder with data sets and caches; not the working folder of any command."""
    folder = tmp_path_factory.mktemp("sweep")
    fixtures_tfds.write(folder / "tfds")
    return folder


def environment(place):
    """Of a user's shell, but with caches of our own; one device, as a machine has."""
    names = ("JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR", "TFDS_DATA_DIR")
    kept = {k: v for k, v in os.environ.items() if k not in names}
    return kept | {"VPT_JAX_CACHE": str(place / "cache")}


def command(place, workdir, *more):
    return [
        sys.executable,
        "-m",
        "vpt_jax.main",
        f"--config={ROOT / 'configs/vtab.py'}:smoke",
        f"--config.task.data_dir={place / 'tfds'}",
        f"--workdir={workdir}",
        *more,
    ]


def start(place, workdir, *more):
    """Starts the command; a process group of its own, to be killed as a whole."""
    workdir.mkdir(exist_ok=True)
    with open(workdir.parent / f"{workdir.name}.log", "ab") as log:
        return subprocess.Popen(
            command(place, workdir, *more),
            cwd=place,
            env=environment(place),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def finish(process, place, workdir):
    log = workdir.parent / f"{workdir.name}.log"
    assert process.wait() == 0, log.read_text()[-3000:]
    assert f"[{RUNS}/{RUNS}]" in log.read_text()


def read(workdir):
    return {name: (workdir / name).read_bytes() for name in BOARD}


def done(workdir):
    """Finished runs; hidden folders are unfinished ones."""
    return len(list(workdir.glob("runs/*/[!.]*/result.json")))


@pytest.fixture(scope="module")
def undisturbed(place):
    """The leaderboard of a run that nobody disturbs, and its seconds."""
    workdir, begin = place / "undisturbed", time.monotonic()
    finish(start(place, workdir), place, workdir)
    assert done(workdir) == RUNS
    seconds = time.monotonic() - begin
    print(f"\nundisturbed: {RUNS} runs in {seconds:.0f} s")
    return read(workdir), seconds


def test_an_undisturbed_run_has_all_tasks(undisturbed):
    text = undisturbed[0]["leaderboard.md"].decode()
    assert "Mean over 19 tasks" in text and "Mean over 3 groups" in text


def test_killed_five_times(place, undisturbed):
    workdir, rng = place / "killed", random.Random(SEED)
    for number in range(KILLS):
        # Between two numbers of finished runs, at any moment of a run.
        target = (number + rng.random()) * RUNS / KILLS
        process = start(place, workdir)
        while done(workdir) < target and process.poll() is None:
            time.sleep(0.05)
        time.sleep(4 * rng.random())
        assert process.poll() is None, "it ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"\nkilled with {done(workdir)} of {RUNS} runs done")
    finish(start(place, workdir), place, workdir)
    assert read(workdir) == undisturbed[0]


def test_ray_with_two_nodes_of_which_one_dies(place, undisturbed):
    os.environ["RAY_AUTH_MODE"] = "disabled"
    from ray.cluster_utils import Cluster

    # Nodes give their environment to the workers.
    os.environ |= environment(place)
    os.environ.pop("JAX_NUM_CPU_DEVICES", None)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second = cluster.add_node(num_cpus=1)
        workdir = place / "ray"
        process = start(
            place, workdir, "--launcher=ray", f"--address={cluster.address}"
        )
        while done(workdir) < RUNS // 3 and process.poll() is None:
            time.sleep(0.2)
        assert process.poll() is None
        cluster.remove_node(second, allow_graceful=False)
        print(f"\na node died with {done(workdir)} of {RUNS} runs done")
        finish(process, place, workdir)
    finally:
        cluster.shutdown()
    assert read(workdir) == undisturbed[0]


def test_submitit_on_this_machine(place, undisturbed):
    workdir = place / "slurm"
    finish(start(place, workdir, "--launcher=slurm", "--address=local"), place, workdir)
    assert read(workdir) == undisturbed[0]
