# SPDX-License-Identifier: Apache-2.0
r"""What prompts cost at inference, and what condensing them buys.

python -m studies.cost --config=configs/demo.py:shapes_location --workdir=out/studies

Each number is there for prompts as tokens of every block (what papers count) and as
keys and values (what this package computes): multiply-accumulates by formula, XLA's own
count and memory of the compiled program, and seconds measured on this device. What a
program costs depends on how many prompts each layer has and not on their values, so
nothing is trained: prompts and pictures are random.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import vpt_jax
from studies import cost_page, study
from studies.inference import (
    HOW,
    KEPT,
    RATIOS,
    Counts,
    Program,
    abstract,
    all_compiled,
    initial,
    interleaved,
    kept,
    macs,
    plain,
    ready_to_run,
    uneven,
)
from studies.study import Lab, Result

PROMPTS = (0, 1, 5, 10, 20, 50, 100, 150, 200)  # per layer
# Kim et al., table 1, ViT-B/16: "GFLOPs" (which are G MACs) and overhead in per cent.
TABLE_1 = {
    0: (17.6, 0.0),
    50: (22.2, 26.1),
    100: (26.9, 52.8),
    150: (31.8, 80.6),
    200: (36.7, 108.5),
}
LARGE = {"ViT-B/16": vpt_jax.ViT("B/16"), "Swin-B": vpt_jax.Swin("B")}
# Measured beside the lab's backbone: windows, a shift and a merging in a few ms.
SMALL = vpt_jax.Swin(
    embed_dim=64, depths=(2, 2), num_heads=(2, 4), window=7, patch=4, image_size=56
)


def run(
    lab: Lab,
    *,
    prompts: Sequence[int] = PROMPTS,
    ratios: Sequence[float] = RATIOS,
    batches: Sequence[int] = (1, 8, 32),
    large: Sequence[int] = (0, 20, 60, 200),
    small: vpt_jax.Swin = SMALL,
    seconds: float = 15.0,
) -> Result:
    """Counts, compiles and times.

    Args:
      lab: Its backbone is measured, with deep prompts.
      prompts: Per layer, what is counted by formula. The most are 100 % of condensing;
        none of them and what `ratios` leave of the most are measured.
      ratios: Of prompts kept; `KEPT` and 1 are among them.
      batches: Pictures per call.
      large: Per layer, what the models of `LARGE` are compiled for, without weights;
        may be empty. A program of Swin-B takes about 7 seconds.
      small: Measured too, with random weights.
      seconds: Of timing per model and batch size, if that is enough for a few rounds.
    """
    name, full = lab.model.info["variant"], max(prompts)
    measured = {
        name: (lab.model.model, lab.model.backbone),
        "small Swin": (small, initial(small)),
    }
    counted = {**{n: model for n, (model, _) in measured.items()}, **LARGE}
    programs, repeats = [], []
    for n, (model, backbone) in measured.items():
        left = {0, *(kept(full, ratio) for ratio in ratios)}
        which = cases(model.depth, left, ragged=uneven(kept(full, KEPT), model.depth))
        for batch in batches:
            print(f"cost: {n}, batch {batch}, {len(which)} programs", flush=True)
            rows, again = timed(model, backbone, which, batch, seconds)
            programs += [{"model": n, **row} for row in rows]
            repeats.append({"model": n, "batch": batch, "ms": again})
    for n, model in LARGE.items() if large else ():
        which = cases(model.depth, large, ("tokens", "prefilled"))
        print(f"cost: {n}, {len(which)} programs compiled", flush=True)
        found = all_compiled(model, abstract(model), which, batch=8)
        programs += [{"model": n, **row, "ms": []} for _, row in found]
    return {
        "measured": list(measured),
        "sizes": sizes(small),
        "full": full,
        "counted": [by_formula(n, m, prompts, ratios) for n, m in counted.items()],
        "table_1": table_1(),
        "programs": programs,
        "repeats": repeats,
    }


def cases(
    depth: int,
    per_layer: Iterable[int],
    ways: Sequence[str] = HOW,
    ragged: Counts = (),
) -> list[Program]:
    """Programs and their counts; to prefill nothing is the same program as `kv`."""
    counts = [(n,) * depth for n in sorted(set(per_layer))]
    if ragged:
        counts.append(ragged)
    found = [(how if any(c) else plain(how), c) for how in ways for c in counts]
    return list(dict.fromkeys(found))


def timed(
    model: Any, backbone: Any, which: Sequence[Program], batch: int, seconds: float
) -> tuple[list[dict[str, Any]], list[float]]:
    """A row for every program, with its `ms`; and the first one's, timed once more."""
    found = all_compiled(model, backbone, which, batch)
    calls = [
        ready_to_run(program, model, backbone, *names, batch)
        for (program, _), names in zip(found, which, strict=True)
    ]
    # What identical programs differ by is noise.
    *times, again = interleaved([*calls, calls[0]], seconds)
    rows = [{**row, "ms": ms} for (_, row), ms in zip(found, times, strict=True)]
    return rows, again


def by_formula(
    name: str, model: Any, prompts: Sequence[int], ratios: Sequence[float] = RATIOS
) -> dict[str, Any]:
    """Multiply-accumulates of a model by prompts per layer, and by ratio kept."""

    def row(counts: Counts) -> dict[str, int]:
        return {how: macs(model, how, counts) for how in HOW}

    full, depth = max(prompts), model.depth
    left = {ratio: kept(full, ratio) for ratio in ratios}
    return {
        "name": name,
        "depth": depth,
        "by_prompts": [{"prompts": n, **row((n,) * depth)} for n in prompts],
        "by_ratio": [
            {"ratio": ratio, "prompts": n, **row((n,) * depth)}
            for ratio, n in left.items()
        ],
        "uneven": row(uneven(left[KEPT], depth)),
    }


def table_1() -> list[dict[str, Any]]:
    """The paper's table 1: as printed (ViT-B/16 alone is known), as counted here."""
    rows = []
    for name, model in LARGE.items():
        giga = {n: macs(model, "tokens", (n,) * model.depth) / 1e9 for n in TABLE_1}
        for n, printed in TABLE_1.items():
            known = printed if name == "ViT-B/16" else (None, None)
            rows.append(
                {
                    "model": name,
                    "prompts": n,
                    "printed": known[0],
                    "giga": giga[n],
                    "printed_overhead": known[1],
                    "overhead": 100 * (giga[n] / giga[0] - 1),
                }
            )
    return rows


def sizes(model: vpt_jax.Swin) -> str:
    """A sentence's part about a Swin of free sizes."""
    blocks, width = " + ".join(map(str, model.depths)), model.embed_dim
    widths = " and ".join(str(width * 2**i) for i in range(model.num_stages))
    return (
        f"{model.image_size} px, patches of {model.patch}, windows of {model.window},"
        f" {blocks} blocks of width {widths}, random weights"
    )


show = cost_page.show


if __name__ == "__main__":
    study.start("cost", sys.modules[__name__])
