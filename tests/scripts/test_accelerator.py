# SPDX-License-Identifier: Apache-2.0
"""The benchmark for GPUs and TPUs, on a CPU: its plan, its clock, a whole small run."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import vpt_jax

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("accelerator")
    sys.path.pop(0)


@pytest.fixture
def pretend(script, monkeypatch):
    """Runs the script on a clock and rows of our own; returns what it left and said."""
    now = [0.0]
    monkeypatch.setattr(script.time, "monotonic", lambda: now[0])
    none = dict.fromkeys(script.PEERS, "none")
    monkeypatch.setattr(script, "absent", lambda whose: none)
    monkeypatch.setattr(script.jax.config, "update", lambda *_: None)

    def run(folder, minutes, measure, takes):
        def spend(row, context):
            now[0] += takes(script.seconds(row, 100.0, script.SMALL.budget))
            return measure(row)

        measures = dict.fromkeys(script.MEASURE, spend)
        monkeypatch.setattr(script, "MEASURE", measures)
        start = now[0]
        args = ["--tiny", f"--minutes={minutes}", f"--out={folder}"]
        code = script.main(args)
        rows = json.loads((folder / "results.json").read_text())["rows"]
        return code, rows, now[0] - start

    return run


def planned(script):
    rows = script.plan(script.SMALL, gpu=False)
    return [r for r in rows if r.who == "vpt_jax" and r.part != "first"]


def test_the_plan_has_every_part_and_size_once(script):
    rows = script.plan(script.Sizes())
    assert len({row.name for row in rows}) == len(rows)
    assert {row.part for row in rows} == set(script.MEASURE)
    speed = {row[1:7] for row in rows if row.part == "speed"}
    for variant in ("B/16", "L/16"):
        for batch in (1, 8, 64, 256):
            for dtype in ("bfloat16", "float32"):
                size = (variant, batch)
                assert ("inference", "timm", *size, 0, dtype) in speed
                for num in (50, 100, 200):
                    for what in ("inference", "tuning", "scoring", "fine-tuning"):
                        assert (what, "vpt_jax", *size, num, dtype) in speed
                    assert ("tuning", "PyTorch", *size, num, dtype) in speed
    for row in script.plan(script.Sizes(), gpu=False):
        assert "cudnn" not in row.option + row.what and "xla_gpu" not in row.option
    assert {row.option for row in rows} == set(script.OPTIONS)


def test_the_least_work_of_a_row(script):
    model = vpt_jax.ViT("B/16")
    row = script.Row("speed", "inference", prompts=200, batch=8)
    flop, size = script.work(row)
    assert flop == 2 * vpt_jax.macs(model, (200,) * 12)
    assert size == 4 * 85_798_656 + 8 * 224 * 224 * 3
    kept = row._replace(option="backbone in bfloat16")
    assert size - script.work(kept)[1] == 2 * 85_798_656
    tuning, scoring = (row._replace(what=what) for what in ("tuning", "scoring"))
    assert 2 * flop < script.work(tuning)[0] < 2.1 * flop
    assert script.work(scoring)[0] < script.work(tuning)[0]
    # Twelve times the tokens' keys and values, by width.
    attention = row._replace(part="attention", what="products")
    assert script.work(attention)[0] == 12 * 197 * 397 * 768
    # At least the trials: 19 tasks, 40 pairs, 100 epochs of 800 pictures.
    least = 19 * 40 * 100 * 800 * 2 * 2 * vpt_jax.macs(model, (0,) * 12)
    assert 1.5 < script.checks.sweep_flop(model) / least < 3


def test_the_plan_is_printed(script, capsys):
    assert script.main(["--plan", "--minutes=8", "--parts", "speed", "card"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if "  speed; " in line or "  card; " in line]
    assert len(rows) == sum(
        row.part in ("speed", "card") for row in script.plan(script.Sizes())
    )
    (cut,) = [i for i, line in enumerate(lines) if line.endswith("  8 minutes")]
    assert float(lines[cut - 1].split()[4]) <= 8 <= float(lines[cut + 1].split()[4])
    tuning = next(line for line in lines if "tuning; vpt_jax; B/16; 64; 100" in line)
    assert tuning.split()[:3] == ["67.65", "0.70", "0.0966"]
    assert "whole protocol" in lines[-1]


def test_rows_that_do_not_fit_wait_for_the_next_run(script, pretend, tmp_path):
    rows = planned(script)
    code, found, took = pretend(tmp_path, 2, lambda row: {"x": 1.0}, lambda s: s)
    assert code == 0 and 60 < took <= 120
    assert 0 < len(found) < len(rows) and next(iter(found)) == rows[0].name
    code, found, took = pretend(tmp_path, 99, lambda row: {"x": 2.0}, lambda s: s)
    assert set(found) == {row.name for row in rows}
    assert found[rows[0].name]["x"] == 1.0  # what was done is not done again
    assert {row["state"] for row in found.values()} == {"done"}
    assert "| x |" in (tmp_path / "results.md").read_text()
    assert pretend(tmp_path, 99, lambda row: {}, lambda s: s)[2] == 0
    # Rows that take longer than expected slow the next ones.
    _, found, took = pretend(tmp_path / "slow", 6, lambda row: {}, lambda s: 2 * s)
    first, *others = found.values()
    assert first["took_s"] == 2 * first["expected_s"]
    assert all(row["took_s"] == pytest.approx(row["expected_s"]) for row in others)
    assert 180 < took <= 360


def test_a_row_that_fails_is_shown_and_tried_again_last(script, pretend, tmp_path):
    rows = planned(script)
    order = []

    def fail(row):
        order.append(row.name)
        if row == rows[1] and len(order) < 5:
            raise MemoryError("no room")
        return {"right": row != rows[2]}

    code, found, _ = pretend(tmp_path, 1, fail, lambda s: s)
    assert code == 1 and found[rows[1].name]["error"] == "MemoryError: no room"
    assert found[rows[2].name]["right"] is False
    code, found, _ = pretend(tmp_path, 99, fail, lambda s: s)
    assert order[-1] == rows[1].name and found[rows[1].name]["state"] == "done"
    assert code == 1  # a wrong answer stays one


def test_results_of_another_device_are_not_mixed(script, pretend, tmp_path):
    pretend(tmp_path, 1, lambda row: {}, lambda s: s)
    path = tmp_path / "results.json"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "H100"'))
    with pytest.raises(SystemExit, match="H100.*choose another --out"):
        script.main(["--tiny", f"--out={tmp_path}"])


def test_a_row_that_runs_over_the_time_is_ended(tmp_path):
    code = (
        "import time, accelerator as a\n"
        "with a.ended_at(time.monotonic() + 0.1): time.sleep(600)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{FOLDER}{os.pathsep}{FOLDER.parent}"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 3 and "the time is over" in found.stdout


def test_the_goals_are_ratios_of_the_rows(script):
    def row(what, who, prompts, ms, **more):
        own = script.Row("speed", what, who, prompts=prompts)
        return {**own._asdict(), "ms_a_picture": ms, "of_rate": 0.4, **more}

    lines = script.goals(
        [
            row("tuning", "vpt_jax", 100, 0.3),
            row("tuning", "vpt_jax", 100, 0.2, option="cudnn", of_rate=0.55),
            row("tuning", "torch.compile", 100, 0.5),
            row("inference", "vpt_jax", 200, 0.11),
            row("inference", "vpt_jax", 0, 0.1),
            row("inference", "timm", 0, 0.121),
        ]
    )
    assert [line.split(": ")[1].split(" (")[0] for line in lines] == [
        "2.50 times as fast",
        "0.55 of the card's rate",
        "0.91 times as fast",
        "1.10 times as fast",
    ]


@pytest.mark.slow
def test_a_whole_run_on_a_cpu(script, tmp_path):
    """Every part, in small: processes, profile and all; and again, nothing is left."""
    command = [sys.executable, str(FOLDER / "accelerator.py"), "--tiny"]
    command += ["--minutes=30", f"--out={tmp_path / 'out'}"]
    more = {"PYTHONPATH": str(FOLDER.parent)}
    texts = [
        subprocess.run(
            command,
            env={**os.environ, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        for _ in range(2)
    ]
    assert [text.returncode for text in texts] == [0, 0], texts[0].stdout
    assert "0 rows did not fit" in texts[0].stdout
    assert not [line for line in texts[1].stdout.splitlines() if " s  " in line]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    known = results["rows"]
    # PyTorch's and timm's rows are there where they are installed, or it says why not.
    wanted = script.plan(script.SMALL, gpu=False)
    wanted = [
        r for r in wanted if r.part != "first" and r.who not in results["left_out"]
    ]
    assert set(known) == {row.name for row in wanted}
    for row in known.values():
        assert row["state"] == "done" and row.get("right", True)
        if row["part"] in ("speed", "remedy", "attention"):
            assert row["ms_a_picture"] > 0 and row["of_rate"] > 0
    profile = next(row for row in known.values() if row["part"] == "profile")
    assert sum(profile["kinds"].values()) == pytest.approx(1, abs=1e-3)
    off = [row["logits"] for row in known.values() if row["part"] == "correct"]
    assert np.all(np.array(off) > 0)  # other precisions, other formulations
    page = (tmp_path / "out" / "results.md").read_text()
    assert all(f"## {row.part}\n" in page for row in wanted)
