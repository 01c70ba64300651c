# SPDX-License-Identifier: Apache-2.0
r"""Kills the real command at random moments, and compares the end with no kill at all.

python benchmarks/faults.py --faults 20 --seed 0 --json faults.json

The command (`python -m vpt_jax.main`, all stages, own pictures, a backbone of two
layers) is started, ended by a fault, and started again, until it has come to its end;
then rows, scores and released prompts must be those of the undisturbed command, bit for
bit. Faults: SIGKILL and SIGTERM at a random time; SIGKILL just before or after a file
of one kind is flushed or renamed, or while Orbax writes; and, after a kill, a flipped
bit or a cut in a file that the next start reads.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("cache", "checkpoint", "orbax", "record", "prompts", "scores", "results")
KINDS = ("kill", "term", "flip", "cut", *PLACES, "report")
VARIANT = "faults/16"
SIZES = {"width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64, "image_size": 32}
OVERRIDES = (
    "--config.backbone.variant=faults/16",
    "--config.prompts.num_prompts=4",
    "--config.tune.epochs=3",
    "--config.tune.warmup_epochs=0",
    "--config.tune.batch_size=8",
    "--config.finetune.epochs=2",
    "--config.finetune.warmup_epochs=0",
    "--config.finetune.batch_size=8",
    "--config.condense.keep_ratios=(0.5,)",
    "--config.condense.scopes=('global',)",
    "--config.baselines=()",
    "--config.eval_batch_size=20",
    "--config.checkpoint_every=1",
)
REPEAT = 10  # kills of a workdir before it is left alone


class Place(NamedTuple):
    """A moment inside a process: the `count`-th operation on files of a kind."""

    kind: str
    count: int
    after: bool


class Result(NamedTuple):
    """Faults by kind, those after which the end was another, and what went wrong."""

    kinds: dict[str, int]
    lost: int
    complaints: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kills the command, compares the end.")
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = inject(Path(folder), schedule(args.faults, args.seed), args.seed)
    total = sum(result.kinds.values())
    found = {
        "command": f"python benchmarks/faults.py --faults {args.faults} --seed"
        f" {args.seed}",
        "faults": total,
        "survived": total - result.lost,
        "lost": result.lost,
        "kinds": result.kinds,
        "complaints": result.complaints,
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(found, indent=2))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return int(bool(result.lost) or total < args.faults)


def schedule(faults: int, seed: int) -> list[str]:
    """Kinds of faults: all before one comes again, in a random order."""
    rng = random.Random(seed)
    found: list[str] = []
    while len(found) < faults:
        found += rng.sample(KINDS, len(KINDS))
    return found[:faults]


def inject(
    folder: Path, kinds: Sequence[str], seed: int = 0, *, twice: bool = True
) -> Result:
    """Runs the command undisturbed (`twice`: it must repeat), then with faults."""
    rng = random.Random(seed)
    prepare(folder)
    seconds, expected = undisturbed(folder, folder / "undisturbed")
    if twice:
        seconds, again = undisturbed(folder, folder / "again")
        if again != expected:
            raise SystemExit("two undisturbed runs differ")
    counted: collections.Counter[str] = collections.Counter()
    complaints, lost = [], 0
    left, missed, chain = list(kinds), 0, 0
    while left and missed < 5:
        workdir, own, known = folder / f"chain{chain}", [], len(complaints)
        chain += 1
        while left and len(own) < REPEAT:
            kind = left[0]
            fired, complaint = disturb(folder, workdir, kind, seconds, rng)
            complaints += complaint
            if not fired:  # it came to its end before
                missed += 1
                break
            own.append(left.pop(0))
            missed = 0
        code = wait(start(folder, workdir))
        found = end_state(workdir) if code == 0 else {}
        wrong = [k for k in {**expected, **found} if found.get(k) != expected.get(k)]
        good = not wrong and len(complaints) == known
        if not good:
            lost += len(own)
            text = f"{own}: exit code {code}, other: {wrong}"
            complaints.append(f"{text}\n{output(workdir)[-2000:]}")
        counted.update(own)
        print(f"{workdir.name}: {', '.join(own)}: {'same' if good else 'LOST'}")
    return Result(dict(counted), lost, complaints)


def undisturbed(folder: Path, workdir: Path) -> tuple[float, dict[str, Any]]:
    """Seconds and end of a command that nothing happens to."""
    begin = time.perf_counter()
    if wait(start(folder, workdir)) != 0:
        raise SystemExit(output(workdir))
    return time.perf_counter() - begin, end_state(workdir)


def prepare(folder: Path) -> None:
    """Pictures and a backbone."""
    import jax
    import jax.numpy as jnp

    import vpt_jax
    from vpt_jax.weights.checkpoint import save_backbone

    model = vpt_jax.ViT(patch=16, **SIZES)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes["params"]
    )
    card = {"normalisation": "half"}
    save_backbone(folder / "backbone.safetensors", params, card)
    arrays = {}
    for split, num in (("train", 80), ("val", 20), ("test", 40)):
        labels = np.arange(num) % 2
        images = rng.integers(0, 128, (num, 32, 32, 3), np.uint8)
        images[labels == 1] += 100
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    np.savez(folder / "pictures.npz", **arrays)


def start(
    folder: Path, workdir: Path, place: Place | None = None
) -> subprocess.Popen[bytes]:
    """The command in a process of its own, which ends itself at a place."""
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--child",
        json.dumps(place),
        f"--config={ROOT / 'configs/folder.py'}:{folder / 'pictures.npz'}",
        f"--config.backbone.checkpoint={folder / 'backbone.safetensors'}",
        *OVERRIDES,
        f"--workdir={workdir}",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "VPT_JAX_CACHE": str(workdir.with_suffix(".cache")),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
    }
    with open(workdir.with_suffix(".out"), "wb") as out:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=out)


def wait(process: subprocess.Popen[bytes]) -> int:
    return process.wait(timeout=600)


def output(workdir: Path) -> str:
    return workdir.with_suffix(".out").read_text(errors="replace")


def disturb(
    folder: Path, workdir: Path, kind: str, seconds: float, rng: random.Random
) -> tuple[bool, list[str]]:
    """One fault; False if the command ended before. And exit codes that are wrong."""
    if kind in ("kill", "term", "flip", "cut"):
        process = start(folder, workdir)
        sent = signal.SIGTERM if kind == "term" else signal.SIGKILL
        try:
            process.wait(rng.uniform(0.3, 0.95) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(sent)
        code = wait(process)
        # Before the command listens, SIGTERM ends it as it ends any other.
        good = (75, -signal.SIGTERM) if kind == "term" else (-signal.SIGKILL,)
        complaint = [] if code in (0, *good) else [f"{kind}: {code} {output(workdir)}"]
        if kind in ("flip", "cut"):  # of a finished run too
            return damage(workdir, kind, rng), complaint
        return code != 0, complaint
    count = rng.randint(1, {"checkpoint": 30, "orbax": 2, "cache": 2}.get(kind, 3))
    process = start(folder, workdir, Place(kind, count, rng.random() < 0.5))
    code = wait(process)
    good = code in (0, -signal.SIGKILL)
    return code != 0, [] if good else [f"{kind}: {code} {output(workdir)}"]


def damage(workdir: Path, kind: str, rng: random.Random) -> bool:
    """Flips a bit of, or cuts, a file that the next start reads."""
    folders = [workdir / n for n in ("checkpoints", "prompts", "scores", "results")]
    folders.append(workdir.with_suffix(".cache") / "pictures")
    found = [p for f in folders for p in sorted(f.rglob("*")) if p.is_file()]
    found = [p for p in found if p.stat().st_size and ".damaged" not in str(p)]
    if not found:
        return False
    path = rng.choice(found)
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    if kind == "flip":
        data[at] ^= 1 << rng.randrange(8)
    else:
        del data[at:]
    path.write_bytes(data)
    return True


def end_state(workdir: Path) -> dict[str, Any]:
    """All that must not depend on interruptions."""
    state: dict[str, Any] = {}
    for folder in ("prompts", "scores"):
        for path in sorted((workdir / folder).iterdir()):
            if path.suffix != ".damaged":
                state[f"{folder}/{path.name}"] = path.read_bytes()
    report = json.loads((workdir / "report.json").read_bytes())
    rows = [json.loads(p.read_bytes())["row"] for p in results(workdir)]
    for row in (*rows, *report["rows"]):
        del row["latency_ms"], row["latency_spread"]
    state |= {"rows": rows, "report": report["rows"]}
    return state | {"importance": report["importance"]}


def results(workdir: Path) -> list[Path]:
    return sorted((workdir / "results").glob("*.json"))


# In the process that is to end.


def place_of(path: str) -> str:
    """The kind of file that a path belongs to, its temporary name too."""
    if ".pictures" in path:
        return "cache"
    if "training.json" in path:
        return "record"
    for kind in ("checkpoints", "prompts", "scores", "results"):
        if f"/{kind}/" in path or path.endswith(f"/{kind}"):
            return kind.removesuffix("s") if kind == "checkpoints" else kind
    return "report" if "report." in path else ""


def child(place: Place | None, arguments: Sequence[str]) -> None:
    """The command, with operations on files counted."""
    from vpt_jax.models import vit

    vit.VARIANTS[VARIANT.partition("/")[0]] = SIZES
    if place:
        count_down(place)
    sys.argv = ["vpt_jax.main", *arguments]
    runpy.run_module("vpt_jax.main", run_name="__main__", alter_sys=True)


def count_down(place: Place) -> None:
    """Replaces the functions that make files durable by ones that may kill."""
    import orbax.checkpoint as ocp

    left = [place.count]

    @contextlib.contextmanager
    def counted(kind: str):
        hit = False
        if kind == place.kind:
            left[0] -= 1
            hit = left[0] == 0
        if hit and not place.after:
            die()
        yield
        if hit:
            die()

    replace, fsync, save = os.replace, os.fsync, ocp.StandardCheckpointer.save

    def new_replace(source: Any, target: Any) -> None:
        with counted(place_of(str(target))):
            replace(source, target)

    def new_fsync(handle: int) -> None:
        with counted(place_of(os.readlink(f"/proc/self/fd/{handle}"))):
            fsync(handle)

    def new_save(self: Any, *args: Any, **kwargs: Any) -> None:
        if place.kind == "orbax":
            left[0] -= 1
            if left[0] == 0:
                delay = random.Random(place.count).uniform(0.0, 0.05)
                threading.Timer(delay, die).start()
        save(self, *args, **kwargs)

    os.replace, os.fsync = new_replace, new_fsync
    ocp.StandardCheckpointer.save = new_save


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        where = json.loads(sys.argv[2])
        child(where and Place(*where), sys.argv[3:])
    else:
        sys.exit(main())
