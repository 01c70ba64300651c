# SPDX-License-Identifier: Apache-2.0
"""Several real processes work on one run: the same end, also after a kill."""

import json
import signal
import socket
import subprocess

import jax
import numpy as np
import pytest
from conftest import ROOT, save_small_backbone, start_command
from test_main import end_state

import vpt_jax
from vpt_jax.files import cli

CONFIG = """
import runpy

def get_config():
    c = runpy.run_path({demo!r})["get_config"]("digits,smoke")
    c.backbone.update(variant="demo/16", checkpoint={checkpoint!r})
    c.tune.epochs, c.finetune.epochs, c.checkpoint_every = 3, 1, 1
    c.condense.keep_ratios, c.condense.scopes, c.baselines = (0.3,), ("global",), ()
    return c
"""
# vpt_jax.main, in a process that kills itself after DIE_AT epochs.
PROGRAM = """
import os, runpy, signal
from vpt_jax.files import workdirs

log_epoch, left = workdirs.Log.epoch, [int(os.environ["DIE_AT"])]

def epoch(*args):
    log_epoch(*args)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)

workdirs.Log.epoch = epoch
runpy.run_module("vpt_jax.main", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config file, beside it a small backbone and what is compiled."""
    folder = tmp_path_factory.mktemp("config")
    path = save_small_backbone(folder / "small.safetensors", "demo/16")
    demo = str(ROOT / "configs" / "demo.py")
    text = CONFIG.format(demo=demo, checkpoint=str(path))
    (folder / "config.py").write_text(text)
    return folder / "config.py"


def start(config, workdir, num, victim=None, die_at=0):
    """Runs `num` processes to their ends; `victim` dies after `die_at` epochs."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for i in range(num):
        several = [
            f"--coordinator=127.0.0.1:{port}",
            f"--num_processes={num}",
            f"--process_id={i}",
            "--heartbeat=10",
        ]
        child = start_command(
            f"--config={config}",
            f"--workdir={workdir}",
            *several * (num > 1),
            python=("-c", PROGRAM),
            VPT_JAX_CACHE=str(config.parent / "cache"),
            DIE_AT=str(die_at if i == victim else 0),
        )
        children.append(child)
    try:
        said = [child.communicate(timeout=300) for child in children]
    finally:
        for child in children:
            child.kill()
    return [
        subprocess.CompletedProcess(child.args, child.returncode, *s)
        for child, s in zip(children, said, strict=True)
    ]


def end_state_and_device(workdir):
    report = json.loads((workdir / "report.json").read_text())
    return *end_state(workdir), report["versions"]["device"]


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    (done,) = start(config, workdir, 1)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.parametrize(
    ("num", "victim"), [(2, 1), (4, 0)], ids=["two", "four, the first dies"]
)
@pytest.mark.slow
def test_processes_agree_stop_together_and_resume(config, alone, tmp_path, num, victim):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    ended = start(config, whole, num)
    assert [e.returncode for e in ended] == [0] * num, ended
    assert "report:" in ended[0].stdout
    # Process 0 speaks, and the library that sums.
    spoken = "".join(e.stdout for e in ended[1:]).splitlines()
    assert [line for line in spoken if not line.startswith("[Gloo] ")] == []

    state, rows, device = end_state_and_device(whole)
    one_state, one_rows, _ = end_state_and_device(alone)
    assert device.startswith(f"{num} x ")
    assert rows == one_rows and state.keys() == one_state.keys()
    for path in sorted((whole / "prompts").iterdir()):
        a = vpt_jax.load_prompts(path)
        b = vpt_jax.load_prompts(alone / "prompts" / path.name)
        for x, y in zip(
            jax.tree.leaves((a.prompts, a.head)),
            jax.tree.leaves((b.prompts, b.head)),
            strict=True,
        ):
            # Sums over the batch in another order, amplified by three epochs.
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)

    ended = start(config, broken, num, victim, die_at=2)
    assert ended[victim].returncode == -signal.SIGKILL
    for i, e in enumerate(ended):
        if i != victim:
            assert e.returncode == 1, e
            (line,) = (x for x in e.stderr.splitlines() if x.startswith("error: "))
            assert "another process of this job was lost; start all" in line
            assert "Traceback" not in e.stderr
    assert not (broken / "report.json").exists()
    ended = start(config, broken, num)
    assert [e.returncode for e in ended] == [0] * num, ended
    assert "continuing after epoch" in (broken / "log.txt").read_text()
    assert end_state_and_device(broken) == (state, rows, device)


def test_a_lost_process_is_told_from_wrong_input():
    said = "UNKNOWN: Gloo AllGather failed: Read error: Connection reset by peer"
    assert cli.lost_another(ValueError(said))
    assert not cli.lost_another(ValueError("unknown score 'magic'"))
