# SPDX-License-Identifier: Apache-2.0
r"""How long it takes from the command to the first training step, and to decode 1,000.

python benchmarks/start_time.py
python benchmarks/start_time.py --predict=B/16 --number=5000     # predict alone

Runs `python -m vpt_jax.main --config=configs/vtab.py:smoke,task=svhn` on a small data
set made for it: once with empty caches, then with warm ones. The clock stops when the
first epoch (7 steps) is in the log, so it stands for an upper bound. A module that
calls itself tensorflow lies on the path and would leave a file if anything imported it.
Then 1,000 JPEG pictures of 500 x 375 are decoded, resized to 224 and cached.

`--predict` compares `Classifier.stream` on `--number` JPEG files of camera size (400 of
1600 x 1200, linked again and again) with the same on squares that are in memory, which
is the model's own speed: random weights, 224 px, 10 prompts per layer. The resident
memory is noted at a fifth of the way and at the end.
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
    parser.add_argument("--predict", default="", help="variant, such as B/16")
    parser.add_argument("--number", type=int, default=5000, help="of pictures")
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    rounds = args.rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.predict:
            predict(folder / "photos", args.predict, args.number, args.batch)
            return
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


def predict(folder: Path, variant: str, number: int, batch: int) -> None:
    """Prints pictures per second from files, and of the model alone."""
    import jax
    import jax.numpy as jnp

    import vpt_jax

    model, key = vpt_jax.ViT(variant, image_size=224), jax.random.key(0)
    images = jnp.zeros((1, 224, 224, 3))
    backbone = jax.jit(model.init)(key, images)["params"]
    prompts = vpt_jax.init_prompts(key, model, num_prompts=10)
    header = {
        "class_names": [f"class {k}" for k in range(100)],
        "deep": True,
        "normalisation": "half",
        "variant": variant,
        "counts": vpt_jax.counts(prompts),
    }
    file = vpt_jax.PromptFile(prompts, vpt_jax.init_head(key, model.width, 100), header)
    classifier = vpt_jax.Classifier(model, backbone, file, "crop")
    paths = photographs(folder, number)
    squares = np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), np.uint8)
    for _ in classifier.stream(squares, batch_size=batch):  # compiles
        pass
    alone = (squares[i % batch] for i in range(number))
    rows = {
        "the model alone": timed(classifier.stream(alone, batch_size=batch), number)
    }
    rows["from files"] = timed(classifier.stream(paths, batch_size=batch), number)
    print(f"{variant}, {number:,} JPEGs of 1600 x 1200, batches of {batch}")
    for name, (seconds, used, memory) in rows.items():
        print(
            f"{name:16} {number / seconds:8.2f} a second, {used / number:.4f} s of a"
            f" core each; memory {memory[0]:,.0f} to {memory[1]:,.0f} MB"
        )
    share = rows["the model alone"][1] / rows["from files"][1]
    print(f"of a core's time {share:.1%} is the model's")


def timed(answers, number: int) -> tuple[float, float, list[float]]:
    """Seconds, seconds of a core, and MB at a fifth of the way and at the end."""
    memory, start, used = [], time.perf_counter(), time.process_time()
    for done, _ in enumerate(answers, start=1):
        if done in (max(1, number // 5), number):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
    return time.perf_counter() - start, time.process_time() - used, memory


def photographs(folder: Path, number: int) -> list[Path]:
    """Paths of JPEG files of camera size, at most 400 of them different."""
    rng, paths = np.random.default_rng(0), []
    folder.mkdir()
    for i in range(number):
        path = folder / f"{i:06}.jpg"
        if i < 400:
            small = rng.integers(0, 256, (120, 160, 3), np.uint8)
            large = Image.fromarray(small).resize(
                (1600, 1200), Image.Resampling.BICUBIC
            )
            large.save(path, quality=90)
        else:
            path.hardlink_to(paths[i % 400])
        paths.append(path)
    return paths


if __name__ == "__main__":
    main()
