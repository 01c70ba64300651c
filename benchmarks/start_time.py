# SPDX-License-Identifier: Apache-2.0
r"""How long it takes from the command to the first training step, and to decode 1,000.

python benchmarks/start_time.py

Runs `python -m vpt_jax.main --config=configs/vtab.py:smoke,task=svhn` on a small data
set made for it: once with empty caches, then with warm ones. The clock stops when the
first epoch (7 steps) is in the log, so it stands for an upper bound. A module that
calls itself tensorflow lies on the path and would leave a file if anything imported it.
Then 1,000 JPEG pictures of 500 x 375 are decoded, resized to 224 and cached.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import fixtures_tfds  # noqa: E402

SPY = "import os, pathlib; pathlib.Path(os.environ['SPY']).touch()\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Start-up and decoding times.")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fixtures_tfds.write(folder / "tfds")
        (folder / "path" / "tensorflow").mkdir(parents=True)
        (folder / "path" / "tensorflow" / "__init__.py").write_text(SPY)
        os.environ["VPT_JAX_CACHE"] = str(folder / "cache")
        os.environ["SPY"] = str(folder / "tensorflow was imported")
        os.environ["PYTHONPATH"] = str(folder / "path")
        cold = first_epoch(folder, folder / "cold")
        warm = [first_epoch(folder, folder / f"warm{i}") for i in range(rounds)]
        print(f"command to first epoch, empty caches: {cold:.2f} s")
        print(f"command to first epoch, warm caches:  {spread(warm)}")
        print(f"tensorflow imported: {(folder / 'tensorflow was imported').exists()}")
        draw_pictures(folder / "pictures")
        times = [decode(folder, i) for i in range(rounds)]
        print(f"1,000 JPEGs of 500 x 375 to 224 x 224, cached: {spread(times)}")


def spread(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"median {statistics.median(values):.2f} s ({low:.2f} to {high:.2f})"


def first_epoch(folder: Path, workdir: Path) -> float:
    """Seconds until a trial run has written its first epoch; it is stopped then."""
    command = [
        sys.executable,
        "-m",
        "vpt_jax.main",
        f"--config={ROOT / 'configs/vtab.py'}:smoke,task=svhn",
        f"--config.task.data_dir={folder / 'tfds'}",
        "--config.baselines=()",
        f"--workdir={workdir}",
    ]
    begin = time.perf_counter()
    with open(workdir.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        while not any("epoch 1/" in p.read_text() for p in workdir.rglob("log.txt")):
            if process.poll() is not None:
                raise SystemExit(workdir.with_suffix(".log").read_text())
            time.sleep(0.02)
        seconds = time.perf_counter() - begin
        process.kill()
        process.wait()
    return seconds


def draw_pictures(folder: Path) -> None:
    """1,000 pictures of two classes: smooth noise, so that JPEG has work to do."""
    rng = np.random.default_rng(0)
    for i in range(1000):
        path = folder / "train" / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = rng.integers(0, 256, (38, 50, 3), np.uint8)
        Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC).save(path)


def decode(folder: Path, number: int) -> float:
    """Seconds to read a folder of pictures for the first time, without start-up."""
    code = (
        "import time; from vpt_jax.data import folder; t = time.perf_counter();"
        f"folder.load({str(folder / 'pictures')!r}, 224, report=lambda text: None);"
        "print(time.perf_counter() - t)"
    )
    cache = {"VPT_JAX_CACHE": str(folder / f"cache{number}")}
    run = [sys.executable, "-c", code]
    out = subprocess.run(
        run, cwd=folder, env=os.environ | cache, check=True, capture_output=True
    )
    return float(out.stdout)


if __name__ == "__main__":
    main()
