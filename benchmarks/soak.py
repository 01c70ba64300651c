# SPDX-License-Identifier: Apache-2.0
r"""Whether memory and step time stay flat over a long run.

python benchmarks/soak.py --steps 72000 --json soak.json

Trains prompts of a ViT of two layers for as many steps as a ViT-B/16 takes in two hours
on one accelerator (at 10 a second), through the command's own training (`fitting.fit`):
checkpoints, log lines and TensorBoard events are written as ever. Every second the
resident memory and the time per step are noted. The first tenth is warm-up: compilation
and pools that fill. Of the rest, a line is fitted through the memory, and the median
step times of the first and last third are compared.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vpt_jax
from vpt_jax import train
from vpt_jax.files import workdirs
from vpt_jax.run import config, fitting

# That the fitted line may rise over the whole run; larger falls do not count.
MEMORY_MB = 8.0
STEP_SHARE = 0.1  # by which steps may become slower
EPOCH_STEPS, BATCH = 50, 8
SIZES = {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32, "patch": 4}


class Sampler(workdirs.Log):
    """A log that notes memory and step time about once a second."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "log.txt", folder / "events", echo=False)
        self.samples: list[tuple[int, float, float]] = []  # step, MB, ms per step
        self._last = time.perf_counter(), 0

    def epoch(self, name: str, epoch: int, *args: Any, **kwargs: Any) -> None:
        super().epoch(name, epoch, *args, **kwargs)
        now, step = time.perf_counter(), epoch * EPOCH_STEPS
        elapsed = now - self._last[0]
        if elapsed > 1:
            per_step = 1000 * elapsed / (step - self._last[1])
            self.samples.append((step, resident_mb(), per_step))
            self._last = now, step


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Memory and step time over a run.")
    parser.add_argument("--steps", type=int, default=72_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    found = soak(args.steps)
    found["command"] = f"python benchmarks/soak.py --steps {args.steps}"
    print(json.dumps({k: v for k, v in found.items() if k != "samples"}, indent=2))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return int(not found["flat"])


def soak(steps: int) -> dict[str, Any]:
    """Trains for about `steps` steps, and what became of memory and step time."""
    model = vpt_jax.ViT(image_size=16, **SIZES)
    backbone = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    rng = np.random.default_rng(0)
    num = EPOCH_STEPS * BATCH
    images = jnp.asarray(rng.integers(0, 256, (num, 16, 16, 3), np.uint8))
    labels = jnp.asarray(np.arange(num) % 3, jnp.int32)
    trainable = {
        "prompts": vpt_jax.init_prompts(jax.random.key(1), model, 4),
        "head": vpt_jax.init_head(jax.random.key(2), model.width, 3),
    }
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        log = Sampler(Path(name))
        job = fitting.Fit(
            name="soak",
            prefix="",
            config_key="base_lr",
            settings=config.TrainConfig(
                epochs=max(steps // EPOCH_STEPS, 1),
                warmup_epochs=0,
                base_lr=0.1,
                weight_decay=0.0,
                batch_size=BATCH,
            ),
            recipe=train.Recipe(),
            seed=0,
            directory=Path(name) / "checkpoints",
            checkpoint_every=10,
            diverged="error",
        )
        fitting.fit(job, trainable, backbone, images, labels, log, model=model)
        log.close()
    return {**verdict(log.samples), "seconds": round(time.perf_counter() - start, 1)}


def verdict(samples: list[tuple[int, float, float]]) -> dict[str, Any]:
    """Slopes after the warm-up, and whether they lie within the bounds."""
    end = samples[-1][0]
    kept = [s for s in samples if s[0] > end / 10]
    step, memory, times = (np.array(column) for column in zip(*kept, strict=True))
    # Memory that an allocator gives back at once must not hide what grows: put back.
    change = np.diff(memory, prepend=memory[0])
    held = memory - np.cumsum(np.where(change < -MEMORY_MB, change, 0.0))
    rise = float(np.polyfit(step, held, 1)[0] * (step[-1] - step[0]))
    third = max(len(times) // 3, 1)
    first, last = (float(np.median(part)) for part in (times[:third], times[-third:]))
    slower = last / first - 1
    return {
        "steps": end,
        "memory_mb": round(statistics.median(memory.tolist()), 1),
        "memory_rise_mb": round(rise, 2),
        "memory_bound_mb": MEMORY_MB,
        "step_ms_first": round(first, 4),
        "step_ms_last": round(last, 4),
        "slower": round(slower, 4),
        "slower_bound": STEP_SHARE,
        "flat": rise < MEMORY_MB and slower < STEP_SHARE,
        "samples": [[s, round(m, 2), round(t, 4)] for s, m, t in samples],
    }


def resident_mb() -> float:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


if __name__ == "__main__":
    sys.exit(main())
