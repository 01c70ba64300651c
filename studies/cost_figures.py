# SPDX-License-Identifier: Apache-2.0
"""The figures of the study `cost`: heading, caption and what draws, for each."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from studies.cost_result import Counted, Timed
from studies.inference import KEPT, SPREAD, kept
from studies.study import Drawing, Figure, Result, drawn

LOOKS = {
    "tokens": ("#D55E00", "s", "Tokens"),
    "kv": ("#E69F00", "^", "Keys and values"),
    "prefilled": ("#0072B2", "o", "Keys and values, prefilled"),
}


def all_figures(
    result: Result, counted: Mapping[str, Counted], timed: Sequence[Timed]
) -> list[Figure]:
    """Multiply-accumulates, and two figures of every measured model."""
    shown = dict.fromkeys(("ViT-B/16", "Swin-B", timed[0].name))
    models = [counted[name] for name in shown]
    spreads = " and ".join(f"{quantile:g}" for quantile in SPREAD)
    drawings: list[Drawing] = [
        (
            "Multiply-accumulates against prompts",
            "Per picture, by formula. Crosses are the numbers that the paper prints.",
            functools.partial(_draw_macs, models=models, printed=result["table_1"]),
        )
    ]
    for found in timed:
        drawings += [
            (
                f"Measured latency against prompts, {found.name}",
                f"Medians over the rounds; bars are the quantiles {spreads}. Hollow,"
                " set aside to be seen: as many prompts in all, their number rising"
                " from layer to layer.",
                functools.partial(_draw_latency, found=found),
            ),
            (
                f"What condensing leaves, {found.name}",
                "Multiply-accumulates, measured time and temporary memory, as a share"
                " of what the same formulation takes with all"
                f" {found.full} prompts per layer. Bars are the quantiles {spreads} of"
                " the rounds' own ratios. The leftmost points have no prompts.",
                functools.partial(_draw_kept, found=found),
            ),
        ]
    return drawn({f"cost-{i}": drawing for i, drawing in enumerate(drawings)})


def _draw_macs(
    figure: Any, models: Sequence[Counted], printed: Sequence[dict[str, Any]]
) -> None:
    all_axes = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, model in zip(all_axes, models, strict=True):
        x, rows = list(model.by_prompts), list(model.by_prompts.values())
        scale, unit = (1e9, "G") if rows[-1]["tokens"] >= 1e9 else (1e6, "M")
        for how in ("tokens", "prefilled"):
            colour, marker, label = LOOKS[how]
            y = [row[how] / scale for row in rows]
            axes.plot(x, y, f"{marker}-", color=colour, label=label)
        known = [r for r in printed if r["model"] == model.name and r["printed"]]
        if known:
            x, y = ([row[what] for row in known] for what in ("prompts", "printed"))
            axes.plot(x, y, "kx", ms=10, label="Table 1 of the paper")
        axes.set(title=model.name, xlabel="Prompts per layer")
        axes.set(ylabel=f"MACs per picture ({unit})", ylim=(0, 1.08 * axes.dataLim.y1))


def _draw_latency(figure: Any, found: Timed) -> None:
    left = sorted({0, *(kept(found.full, ratio) for ratio in found.ratios)})
    all_axes = figure.subplots(1, len(found.batches), squeeze=False)[0]
    for axes, batch in zip(all_axes, found.batches, strict=True):
        for how, (colour, marker, label) in LOOKS.items():
            look = {"color": colour, "marker": marker, "capsize": 3, "ms": 5}
            rows = [found.row(batch, how, (n,) * found.depth) for n in left]
            y, bars = _with_bars(rows)
            axes.errorbar(left, y, bars, **look, label=label)
            y, bars = _with_bars([found.row(batch, how, found.uneven)])
            aside = kept(found.full, KEPT) + 0.03 * found.full
            axes.errorbar(aside, y, bars, **look, mfc="white")
        axes.set(title=f"Batch {batch}", xlabel="Prompts per layer")
        axes.set_ylim(0, 1.05 * axes.dataLim.y1)
    all_axes[0].set_ylabel("Milliseconds per picture")


def _with_bars(rows: Sequence[dict[str, Any]]) -> tuple[Any, Any]:
    """Medians per picture, and how far the quantiles are below and above them."""
    times = np.array([row["ms"] for row in rows]) / rows[0]["batch"]
    middle, (low, high) = np.median(times, axis=1), np.quantile(times, SPREAD, axis=1)
    return middle, np.stack([middle - low, high - middle])


def _draw_kept(figure: Any, found: Timed) -> None:
    batch, full = max(found.batches), found.even(1.0)
    left = [0.0, *sorted(found.ratios)]
    counts = [found.even(r) if r else found.none for r in left]
    x = [100 * r for r in left]
    all_axes = figure.subplots(1, 3, sharey=True)
    for how, (colour, marker, label) in LOOKS.items():
        look = {"color": colour, "marker": marker, "ms": 5}
        rows = [found.row(batch, how, c) for c in (*counts, full)]
        macs = [100 * row["macs"] / rows[-1]["macs"] for row in rows[:-1]]
        all_axes[0].plot(x, macs, **look, label=label)
        times = np.array([found.ratio(batch, how, c, full) for c in counts]).T
        middle, low, high = 100 * times
        bars = np.stack([middle - low, high - middle])
        all_axes[1].errorbar(x, middle, bars, **look, capsize=3)
        sizes = [row["temporary"] for row in rows]
        if all(sizes):
            all_axes[2].plot(x, [100 * s / sizes[-1] for s in sizes[:-1]], **look)
    names = (f"MACs, batch {batch}", f"Time, batch {batch}", f"Memory, batch {batch}")
    for axes, name in zip(all_axes, names, strict=True):
        axes.set(title=name, xlabel="Prompts kept (%)")
    all_axes[0].set(ylabel="% of the cost of all prompts", ylim=(0, None))
