# SPDX-License-Identifier: Apache-2.0
r"""What prompts cost at inference, and what condensing them buys.

python -m vpt_jax.studies.cost --config=configs/demo.py --workdir=out/studies

Each number is there for prompts as tokens of every block (what papers count) and as
keys and values (what this package computes): multiply-accumulates by formula, XLA's own
count and memory of the compiled program, and seconds measured on this device. What a
program costs depends on how many prompts each layer has and not on their values, so
nothing is trained: prompts and pictures are random.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import vpt_jax
from vpt_jax.figures import render
from vpt_jax.formats import three_digits, with_prefix
from vpt_jax.studies import study
from vpt_jax.studies.inference import (
    HOW,
    SPREAD,
    Ratio,
    abstract,
    compiled,
    interleaved,
    kept,
    macs,
    ratio,
    ready_to_run,
    uneven,
)
from vpt_jax.studies.study import Figure, Lab, Result, Section, Table, Verdict

PROMPTS = (0, 1, 5, 10, 20, 50, 100, 150, 200)  # per layer
RATIOS = (1.0, 0.5, 0.3, 0.2, 0.1)  # kept, of the most prompts
KEPT = 0.3
# The rules of the verdicts: what "expensive" and "much cheaper" are as ratios, and how
# far from a printed number a reproduced one may be (in G).
EXPENSIVE, MUCH_CHEAPER, PRINTED = 1.5, 0.8, 0.1
# Kim et al., table 1: "GFLOPs" (which are G MACs) and overhead in per cent.
TABLE_1 = {
    0: (17.6, 0.0),
    50: (22.2, 26.1),
    100: (26.9, 52.8),
    150: (31.8, 80.6),
    200: (36.7, 108.5),
}
LARGE = "ViT-B/16"
NAMES = {"tokens": "tokens", "kv": "kv", "prefilled": "kv, prefilled"}
LOOKS = {
    "tokens": ("#D55E00", "s", "Tokens"),
    "kv": ("#E69F00", "^", "Keys and values"),
    "prefilled": ("#0072B2", "o", "Keys and values, prefilled"),
}


def run(
    lab: Lab,
    *,
    prompts: Sequence[int] = PROMPTS,
    timed: Sequence[int] = (100,),
    batches: Sequence[int] = (1, 8, 64),
    large: Sequence[int] = (0, 60, 200),
    seconds: float = 15.0,
) -> Result:
    """Counts, compiles and times.

    Args:
      lab: Its backbone is measured, with deep prompts.
      prompts: Per layer, what is counted by formula; the most are 100 % of condensing.
      timed: Per layer, what is compiled and timed besides 0, `KEPT` and 100 %.
      batches: Pictures per call.
      large: Per layer, what ViT-B/16 is compiled for, without weights; may be empty.
        Every count is three programs of a few seconds.
      seconds: Of timing per batch size, if that is enough for a few rounds.
    """
    model, name, full = lab.model.model, lab.model.info["variant"], max(prompts)
    big = vpt_jax.ViT("B/16")
    counted = {name: model, LARGE: big, "Swin-B": vpt_jax.Swin("B")}
    programs, repeats = [], []
    for batch in batches:
        mine = [
            ready_to_run(model, lab.model.backbone, how, counts, batch)
            for how, counts in cases(model.depth, {0, *timed, kept(full, KEPT), full})
        ]
        # The first once more: what identical programs differ by is noise.
        *times, again = interleaved([call for call, _ in (*mine, mine[0])], seconds)
        programs += [
            {"model": name, **row, "ms": ms}
            for (_, row), ms in zip(mine, times, strict=True)
        ]
        repeats.append({"batch": batch, "ms": again})
    for how, counts in cases(big.depth, set(large), ragged=False):
        _, row = compiled(big, abstract(big), how, counts, batch=8)
        programs.append({"model": LARGE, **row, "ms": []})
    return {
        "backbone": name,
        "full": full,
        "counted": [by_formula(n, m, prompts) for n, m in counted.items()],
        "table_1": table_1(),
        "programs": programs,
        "repeats": repeats,
    }


def cases(
    depth: int, per_layer: set[int], *, ragged: bool = True
) -> list[tuple[str, tuple[int, ...]]]:
    """Programs and their counts; to prefill nothing is the same program as `kv`."""
    even = [(n,) * depth for n in sorted(per_layer)]
    if ragged:
        even.append(uneven(kept(max(per_layer), KEPT), depth))
    return [(how, c) for how in HOW for c in even if any(c) or how != "prefilled"]


def by_formula(name: str, model: Any, prompts: Sequence[int]) -> dict[str, Any]:
    """Multiply-accumulates of a model by prompts per layer, and by ratio kept."""

    def row(counts: tuple[int, ...]) -> dict[str, int]:
        return {how: macs(model, how, counts) for how in HOW}

    full, depth = max(prompts), model.depth
    left = {ratio: kept(full, ratio) for ratio in RATIOS}
    return {
        "name": name,
        "by_prompts": [{"prompts": n, **row((n,) * depth)} for n in prompts],
        "by_ratio": [
            {"ratio": ratio, "prompts": n, **row((n,) * depth)}
            for ratio, n in left.items()
        ],
        "uneven": row(uneven(left[KEPT], depth)),
    }


def table_1() -> list[dict[str, Any]]:
    """The paper's table 1: as printed, and as counted here."""
    model = vpt_jax.ViT("B/16")
    giga = {n: macs(model, "tokens", (n,) * 12) / 1e9 for n in TABLE_1}
    return [
        {
            "prompts": n,
            "printed": printed,
            "giga": giga[n],
            "printed_overhead": overhead,
            "overhead": 100 * (giga[n] / giga[0] - 1),
        }
        for n, (printed, overhead) in TABLE_1.items()
    ]


def much_cheaper(found: Ratio, noise: Ratio) -> bool | None:
    """Whether a measured ratio is at most `MUCH_CHEAPER`; None where it is not clear.

    Not clear is a spread that covers that bound, covers 1, or meets the spread of a
    program timed against itself.
    """
    if found.low <= MUCH_CHEAPER < found.high:
        return None
    if found.low <= max(1, noise.high) and found.high >= min(1, noise.low):
        return None
    return found.high <= MUCH_CHEAPER


class Found(NamedTuple):
    """A result, arranged by what its rows are about."""

    name: str
    full: int
    left: int
    even: dict[int, tuple[int, ...]]  # counts by prompts per layer
    uneven: tuple[int, ...]
    counted: dict[str, dict[str, Any]]
    timed: dict[tuple[int, str, tuple[int, ...]], dict[str, Any]]
    batches: list[int]
    noise: dict[int, Ratio]

    def row(self, batch: int, how: str, counts: tuple[int, ...]) -> dict[str, Any]:
        """Of a timed program."""
        return self.timed[batch, how if any(counts) else _plain(how), counts]

    def ratio(
        self, batch: int, how: str, counts: tuple[int, ...], base: tuple[int, ...]
    ) -> Ratio:
        """Measured, to the same formulation with other counts."""
        return ratio(*(self.row(batch, how, c)["ms"] for c in (counts, base)))

    def overhead(self, name: str, how: str) -> float:
        """Multiply-accumulates of the most prompts to those of none."""
        rows = {row["prompts"]: row for row in self.counted[name]["by_prompts"]}
        return rows[self.full][how] / rows[0][how]

    def saved(self, name: str, how: str, *, ragged: bool = False) -> float:
        """Multiply-accumulates of `KEPT` of the prompts to those of all."""
        model = self.counted[name]
        rows = {row["ratio"]: row for row in model["by_ratio"]}
        return (model["uneven"] if ragged else rows[KEPT])[how] / rows[1.0][how]


def _plain(how: str) -> str:
    return "kv" if how == "prefilled" else how


def arrange(result: Result) -> Found:
    """Arranges a result for `show`."""
    rows = [row for row in result["programs"] if row["ms"]]
    timed = {(row["batch"], row["how"], tuple(row["counts"])): row for row in rows}
    repeats = {again["batch"]: again["ms"] for again in result["repeats"]}
    first = rows[0]["how"], tuple(rows[0]["counts"])
    left, depth = kept(result["full"], KEPT), len(rows[0]["counts"])
    per_layer = sorted({c[0] for _, _, c in timed if len(set(c)) == 1})
    return Found(
        result["backbone"],
        result["full"],
        left,
        {n: (n,) * depth for n in per_layer},
        uneven(left, depth),
        {model["name"]: model for model in result["counted"]},
        timed,
        list(repeats),
        {b: ratio(ms, timed[b, *first]["ms"]) for b, ms in repeats.items()},
    )


def show(result: Result) -> Section:
    """Tables, two figures, and the verdicts by the rules at the top."""
    found = arrange(result)
    drawn = render(
        {
            "cost-macs": functools.partial(_draw_macs, found=found),
            "cost-latency": functools.partial(_draw_latency, found=found),
        }
    )
    captions = (
        (
            "Multiply-accumulates against prompts",
            "Per picture, by formula. Crosses are the numbers that the paper prints.",
        ),
        (
            "Measured latency against prompts",
            f"{found.name}: medians over the rounds; bars are the quantiles"
            f" {SPREAD[0]:g} and {SPREAD[1]:g}. Hollow, set aside to be seen: as many"
            " prompts in all, their number rising from layer to layer.",
        ),
    )
    return Section(
        "What prompts cost at inference",
        _text(result, found),
        [
            _formula(found),
            _table_1(result),
            _xla(result, found),
            _latency(found),
            _condensing(found),
        ],
        [Figure(*c, svg) for c, svg in zip(captions, drawn.values(), strict=True)],
        _verdicts(result, found),
    )


def _text(result: Result, found: Found) -> list[str]:
    added = ", ".join(
        f"{name} {100 * (found.overhead(name, 'tokens') - 1):.1f} % as tokens and"
        f" {100 * (found.overhead(name, 'prefilled') - 1):.1f} % as keys and values"
        for name in found.counted
    )
    rounds = "; ".join(
        f"batch {b}: {again} in {len(found.row(b, 'kv', found.even[0])['ms'])} rounds"
        for b, again in found.noise.items()
    )
    text = [
        "As tokens, prompts pass through every block: what papers count. As keys and"
        " values (kv) they only take part in each layer's attention: what is computed"
        " here, exactly the same features. Prefilled: their keys and values are made"
        " once and not in every call.",
        f"In multiply-accumulates, {found.full} prompts per layer add to {added}. The"
        " share of keys and values falls with the width of a model, that of tokens with"
        " the number of its patches.",
        "All programs take turns in every round; inputs are on the device, the first"
        " round is dropped. A ratio is the median of the rounds' own ratios, in"
        f" brackets their quantiles {SPREAD[0]:g} and {SPREAD[1]:g}. Noise is a program"
        f" timed twice: {rounds}.",
    ]
    shares = [r["flops"] / r["macs"] / 2 for r in result["programs"] if r["flops"]]
    if shares:
        text.append(
            f"XLA counts {min(shares):.3f} to {max(shares):.3f} times two operations"
            " per multiply-accumulate: normalisation, softmax and GELU are in it."
        )
    return text


def _formula(found: Found) -> Table:
    models = list(found.counted.values())
    shown = ("tokens", "prefilled")
    rows = []
    for part in ("by_prompts", "by_ratio"):
        for i, first in enumerate(models[0][part]):
            name = str(first["prompts"])
            if part == "by_ratio":
                name = f"{100 * first['ratio']:g} % of {found.full}: {name}"
            rows.append([name, *_macs_cells([m[part][i] for m in models], shown)])
    name = f"{100 * KEPT:g} %, uneven"
    rows.append([name, *_macs_cells([m["uneven"] for m in models], shown)])
    most = {row["prompts"]: row for row in found.counted[LARGE]["by_prompts"]}
    made = float(most[found.full]["kv"] - most[found.full]["prefilled"])
    return Table(
        ["Prompts per layer"]
        + [f"{m['name']}, {kind}" for m in models for kind in ("tokens", "kv")],
        rows,
        "Multiply-accumulates per picture by formula, keys and values prefilled. To"
        f" make them anew is {with_prefix(made)} per call for {found.full} prompts in"
        f" {LARGE}, whatever the batch. Uneven: as many in all, their number rising"
        " from layer to layer. kv computes of the last block only what is read, so it"
        " is cheaper even without prompts where that is the class token.",
    )


def _macs_cells(rows: Sequence[dict], shown: Sequence[str]) -> list[str]:
    return [with_prefix(float(row[how])) for row in rows for how in shown]


def _table_1(result: Result) -> Table:
    rows = [
        [
            str(row["prompts"]),
            f"{row['printed']:.1f}",
            f"{row['giga']:.2f}",
            f"{row['giga'] - row['printed']:+.2f}",
            f"{row['printed_overhead']:.1f}",
            f"{row['overhead']:.1f}",
            f"{row['overhead'] - row['printed_overhead']:+.1f}",
        ]
        for row in result["table_1"]
    ]
    return Table(
        [
            "Prompts",
            *("Paper, G", "Here, G", "Difference"),
            *("Paper, overhead %", "Here, %", "Difference"),
        ],
        rows,
        f'The paper\'s table 1 ({LARGE}, "GFLOPs") against multiply-accumulates of'
        " prompts as tokens. Its overheads are those of its own rounded numbers.",
    )


def _xla(result: Result, found: Found) -> Table:
    def size(value: int | None) -> str:
        return "–" if value is None else f"{value / 2**20:.2f}"

    last = {found.name: max(found.batches)}
    rows = [
        [
            f"{row['model']}, {NAMES[row['how']]}",
            str(row["batch"]),
            _counts(row["counts"]),
            with_prefix(row["flops"]) if row["flops"] else "–",
            f"{row['flops'] / row['macs'] / 2:.3f}" if row["flops"] else "–",
            *(size(row[what]) for what in ("temporary", "arguments", "outputs")),
        ]
        for row in result["programs"]
        if row["batch"] == last.get(row["model"], row["batch"])
    ]
    return Table(
        [
            *("Program", "Batch", "Prompts", "FLOP", "÷ 2 MACs"),
            *("Temporary", "Arguments", "Outputs"),
        ],
        rows,
        "XLA's own numbers of the compiled programs: FLOP per picture, memory in MiB."
        " Arguments are weights, pictures, and prompts or their keys and values.",
    )


def _counts(counts: Sequence[int]) -> str:
    same = len(set(counts)) == 1
    return str(counts[0]) if same else f"{min(counts)}–{max(counts)}"


def _latency(found: Found) -> Table:
    programs = dict.fromkeys((how, counts) for _, how, counts in found.timed)
    rows = []
    for how, counts in programs:
        row = [NAMES[how], _counts(counts)]
        for b in found.batches:
            ms = float(np.median(found.row(b, how, counts)["ms"])) / b
            against = str(found.ratio(b, how, counts, found.even[0]))
            row += [three_digits(ms), against if any(counts) else "1"]
        rows.append(row)
    header = [text for b in found.batches for text in (f"Batch {b}, ms", "to none")]
    return Table(
        ["Program", "Prompts", *header],
        rows,
        f"Measured, {found.name}: milliseconds per picture, and the ratio to the same"
        " formulation without prompts.",
    )


def _condensing(found: Found) -> Table:
    last, full = max(found.batches), found.even[found.full]
    rows = []
    for how in HOW:
        for counts in (found.even[found.left], found.uneven):
            ragged = counts == found.uneven
            mine, most = (found.row(last, how, c)["temporary"] for c in (counts, full))
            rows.append(
                [
                    NAMES[how] + (", uneven" if ragged else ""),
                    *(
                        f"{found.saved(m, how, ragged=ragged):.2f}"
                        for m in found.counted
                    ),
                    f"{mine / most:.2f}" if mine and most else "–",
                    *(str(found.ratio(b, how, counts, full)) for b in found.batches),
                ]
            )
    return Table(
        [
            f"{100 * KEPT:g} % to 100 %",
            *(f"{name} MACs" for name in found.counted),
            "Memory",
            *(f"Batch {b}, time" for b in found.batches),
        ],
        rows,
        f"What condensing {found.full} prompts per layer to {found.left} leaves, as"
        f" ratios. Time, and temporary memory at batch {last}: {found.name}. MACs of"
        " kv: one picture a call.",
    )


def _verdicts(result: Result, found: Found) -> list[Verdict]:
    last, none, full = max(found.batches), found.even[0], found.even[found.full]
    ways = {"tokens": "as tokens", "prefilled": "as keys and values"}
    most = max(abs(row["giga"] - row["printed"]) for row in result["table_1"])
    verdicts = [
        study.verdict(
            "The paper's table 1 counts multiply-accumulates of prompts as tokens.",
            most < PRINTED,
            f"Largest difference {most:.2f} G; rule: below {PRINTED:g}.",
        )
    ]
    for how, way in ways.items():
        verdicts.append(
            study.verdict(
                f"Prompts are expensive at inference ({way}).",
                found.overhead(LARGE, how) >= EXPENSIVE,
                f"{found.full} prompts per layer are {found.overhead(LARGE, how):.2f}"
                f" times the MACs of none in {LARGE}; rule: at least {EXPENSIVE:g}."
                f" {found.name}: {found.overhead(found.name, how):.2f}, measured"
                f" {found.ratio(last, how, full, none)} at batch {last}.",
            )
        )
    claim = f"Condensing to {100 * KEPT:g} % makes inference much cheaper"
    for how, way in ways.items():
        verdicts.append(
            study.verdict(
                f"{claim} ({way}, by MACs).",
                found.saved(LARGE, how) <= MUCH_CHEAPER,
                f"{found.saved(LARGE, how):.2f} of those of {found.full} prompts per"
                f" layer in {LARGE}; rule: at most {MUCH_CHEAPER:g}. {found.name}:"
                f" {found.saved(found.name, how):.2f}.",
            )
        )
    for how, way in ways.items():
        left = found.even[found.left]
        times = {b: found.ratio(b, how, left, full) for b in found.batches}
        listed = ", ".join(f"{value} at batch {b}" for b, value in times.items())
        verdicts.append(
            study.verdict(
                f"{claim} ({way}, measured on {found.name}).",
                much_cheaper(times[last], found.noise[last]),
                f"{listed}; the same program twice {found.noise[last]}. Rule, batch"
                f" {last}: all of the spread at most {MUCH_CHEAPER:g}; undecided where"
                " it covers that or 1, or meets the noise.",
            )
        )
    return verdicts


def _draw_macs(figure: Any, found: Found) -> bool:
    shown = list(dict.fromkeys((LARGE, found.name)))
    all_axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, name in zip(all_axes, shown, strict=True):
        rows = found.counted[name]["by_prompts"]
        scale, unit = (1e9, "G") if rows[-1]["tokens"] >= 1e9 else (1e6, "M")
        x = [row["prompts"] for row in rows]
        for how in ("tokens", "prefilled"):
            colour, marker, label = LOOKS[how]
            y = [row[how] / scale for row in rows]
            axes.plot(x, y, f"{marker}-", color=colour, label=label)
        if name == LARGE:
            printed = [giga for giga, _ in TABLE_1.values()]
            axes.plot(list(TABLE_1), printed, "kx", ms=10, label="Table 1 of the paper")
        axes.set(title=name, xlabel="Prompts per layer")
        axes.set(ylabel=f"MACs per picture ({unit})", ylim=(0, 1.08 * axes.dataLim.y1))
    return True


def _draw_latency(figure: Any, found: Found) -> bool:
    all_axes = figure.subplots(1, len(found.batches), squeeze=False)[0]
    for axes, batch in zip(all_axes, found.batches, strict=True):
        for how, (colour, marker, label) in LOOKS.items():
            look = {"color": colour, "marker": marker, "capsize": 3, "ms": 5}
            rows = [found.row(batch, how, counts) for counts in found.even.values()]
            y, bars = _with_bars(rows)
            axes.errorbar(list(found.even), y, bars, **look, label=label)
            y, bars = _with_bars([found.row(batch, how, found.uneven)])
            aside = found.left + 0.03 * found.full
            axes.errorbar(aside, y, bars, **look, mfc="white")
        axes.set(title=f"Batch {batch}", xlabel="Prompts per layer")
        axes.set_ylim(0, 1.05 * axes.dataLim.y1)
    all_axes[0].set_ylabel("Milliseconds per picture")
    return True


def _with_bars(rows: Sequence[dict[str, Any]]) -> tuple[Any, Any]:
    """Medians per picture, and how far the quantiles are below and above them."""
    times = np.array([row["ms"] for row in rows]) / rows[0]["batch"]
    middle, (low, high) = np.median(times, axis=1), np.quantile(times, SPREAD, axis=1)
    return middle, np.stack([middle - low, high - middle])


if __name__ == "__main__":
    study.start("cost", sys.modules[__name__])
