# SPDX-License-Identifier: Apache-2.0
r"""Does attention stay low-rank with prompts, and how does its rank grow?

python -m studies.rank --config=configs/demo.py:shapes_location,seeds=3 \
    --workdir=out/studies

Every number is the mean, over test pictures, of one picture's own matrix of one layer
and head. What can be proved about these matrices is in docs/rank_bound.md.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import vpt_jax
from studies import rank_page, study
from studies.growth import growth_fits
from studies.spectra import MATRICES, MEASURES, cumulative, singular_values
from studies.study import Lab, Result
from vpt_jax.data import strips

# Per layer, as training starts from them.
PROMPTS = (0, 1, 2, 6, 10, 20, 40, 100, 150, 200)
TRAINED = (6, 20, 40)
BATCH = 16


def run(
    lab: Lab,
    *,
    prompts: Sequence[int] = PROMPTS,
    trained: Sequence[int] = TRAINED,
    pictures: int = 256,
) -> Result:
    """Measures attention with random and with trained prompts, and fits its growth.

    Random prompts are those from which training with the same seed starts, so the two
    kinds are pairs.

    Args:
      lab: Its backbone is a ViT; whether prompts are deep is read from its config.
      prompts: Numbers per layer, from 0 on.
      trained: Those of them that are trained too.
      pictures: How many at least, spread evenly over the test set, as many for every
        seed's share; all, where it has fewer.

    Raises:
      ValueError: If the backbone is not a ViT or the task has no test pictures.
    """
    model, seeds = lab.model.model, lab.config.seeds
    if not isinstance(model, vpt_jax.ViT):
        raise ValueError(
            f"the rank study needs a ViT; {lab.model.info['variant']} attends within"
            " windows of a fixed size."
        )
    images = sample(lab, -(-pictures // len(seeds)) * len(seeds))
    rows = []

    def add(kind: str, seed: int, values: Any) -> None:
        start = time.perf_counter()
        rows.append({"kind": kind, "seed": seed, **measure(lab, images, values)})
        print(
            f"rank: {rows[-1]['m']} {kind} prompts, seed {seed}:"
            f" {time.perf_counter() - start:.0f} s",
            flush=True,
        )

    for seed in seeds:
        key, _ = jax.random.split(jax.random.key(seed))  # as stages.starting_point
        for m in prompts:
            if m or seed == seeds[0]:  # none are the same for every seed
                deep = lab.config.prompts.deep
                add("random", seed, vpt_jax.init_prompts(key, model, m, deep=deep))
        for m in trained:
            print(f"rank: {m} prompts are trained, seed {seed}", flush=True)
            with study.running(lab, prompts={"num_prompts": m}) as shared:
                tuned = study.tuned(shared, seed)
            add("trained", seed, tuned["prompts"])
    patches = (model.image_size // model.patch) ** 2
    tokens = int(model.class_token) + model.registers + patches
    return {
        "pictures": len(images),
        "tokens": tokens,
        "heads": model.num_heads,
        "seeds": list(seeds),
        "rows": rows,
        "fits": growth_fits(rows, tokens, ("all", "rows"), tuple(MEASURES)),
    }


def sample(lab: Lab, number: int) -> np.ndarray:
    """Test pictures spread evenly over the set: it may be sorted by class."""
    split = lab.pictures.task.test
    if split is None:
        raise ValueError(
            "the rank study looks at test pictures and config.task.splits leaves them"
            " out; use 'all'."
        )
    total = len(split.labels)
    index = np.linspace(0, total - 1, min(number, total)).astype(np.int32)
    return np.asarray(strips.view(split.images, index))


def measure(lab: Lab, images: np.ndarray, prompts: Any) -> dict[str, Any]:
    """Ranks of every matrix, and mean spectra.

    Returns:
      `m`; `mass`, the attention on prompts `[layers][heads]`, mean over pictures;
      `ranks`, by matrix and measure `[shares][layers][heads]`, means over a share of
      the pictures: every seed has one, and picture i is in share i modulo their number;
      `curves` of the whole matrix, cumulative shares of singular values and of their
      squares, means over layers, heads and pictures.
    """
    size, parts = min(BATCH, len(images)), []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        padded = batch[np.arange(size) % len(batch)]  # every batch has one shape
        how = {"model": lab.model.model, "deep": lab.config.prompts.deep}
        how["normalisation"] = lab.model.info["normalisation"]
        parts.append(singular_values(lab.model.backbone, prompts, padded, **how))

    def joined(*arrays: np.ndarray) -> np.ndarray:
        return np.concatenate(arrays, axis=1)[:, : len(images)]

    values, mass = jax.tree.map(joined, *parts)
    shares = len(lab.config.seeds)

    def by_share(ranks: np.ndarray) -> list[Any]:
        means = [ranks[:, i::shares].mean(axis=1) for i in range(shares)]
        return np.stack(means).round(4).tolist()

    return {
        "m": vpt_jax.counts(prompts)[0],
        "mass": mass.mean(axis=1, dtype=np.float64).round(6).tolist(),
        "ranks": {
            matrix: {
                name: by_share(function(values[matrix]))
                for name, function in MEASURES.items()
            }
            for matrix in MATRICES
        },
        "curves": [
            cumulative(values["all"], power).mean(axis=(0, 1, 2)).round(6).tolist()
            for power in (1, 2)
        ],
    }


show = rank_page.show


if __name__ == "__main__":
    study.start("rank", sys.modules[__name__])
