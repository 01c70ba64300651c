# SPDX-License-Identifier: Apache-2.0
"""What the study `cost` shows: its tables, figures and verdicts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from studies import cost_figures as figures
from studies import study
from studies.cost_result import Counted, Timed, arrange, share
from studies.inference import HOW, KEPT, SPREAD, Counts, Ratio, kept, plain, ratio
from studies.study import Result, Section, Table, Verdict, percent
from vpt_jax.report.tables import three_digits, with_prefix

# The rules of the verdicts: what "expensive" and "much cheaper" are as ratios, and how
# far from a printed number a reproduced one may be (in G).
EXPENSIVE, MUCH_CHEAPER, PRINTED = 1.5, 0.8, 0.1
LARGE = "ViT-B/16"  # by formula, what the verdicts on multiply-accumulates are about
NAMES = {"tokens": "tokens", "kv": "kv", "prefilled": "kv, prefilled"}
WAYS = {"tokens": "as tokens", "prefilled": "as keys and values"}


def much_cheaper(found: Ratio, noise: Ratio) -> bool | None:
    """Whether a measured ratio is at most `MUCH_CHEAPER`; None where it is not clear.

    Not clear is a spread that covers that bound, covers 1, or meets the spread of a
    program timed against itself.
    """
    if found.low <= MUCH_CHEAPER < found.high or cheaper(found, noise) is None:
        return None
    return found.high <= MUCH_CHEAPER


def cheaper(found: Ratio, noise: Ratio) -> bool | None:
    """Whether a measured ratio is below 1; None where its spread meets the noise."""
    if found.low <= max(1, noise.high) and found.high >= min(1, noise.low):
        return None
    return found.high < 1


def show(result: Result) -> Section:
    """Tables, figures, and the verdicts by the rules at the top."""
    counted, timed = arrange(result)
    return Section(
        "What prompts cost at inference",
        _text(result, counted, timed),
        [
            _formula(list(counted.values())),
            _table_1(result),
            _xla(result),
            *(table for found in timed for table in (_latency(found), _memory(found))),
            *(_condensing(found) for found in timed),
            _both(timed),
        ],
        figures.all_figures(result, counted, timed),
        _verdicts(result, counted, timed),
    )


def _text(
    result: Result, counted: dict[str, Counted], timed: Sequence[Timed]
) -> list[str]:
    added = ", ".join(
        f"{m.name} {100 * (m.overhead('tokens') - 1):.1f} % as tokens and"
        f" {100 * (m.overhead('prefilled') - 1):.1f} % as keys and values"
        for m in counted.values()
    )
    rounds = "; ".join(
        f"{found.name}, batch {b}: {again} in"
        f" {len(found.row(b, 'kv', found.none)['ms'])} rounds"
        for found in timed
        for b, again in found.noise.items()
    )
    text = [
        "As tokens, prompts pass through every block: what papers count. As keys and"
        " values (kv) they only take part in each layer's attention: what is computed"
        " here, exactly the same features. Prefilled: their keys and values are made"
        " once and not in every call.",
        f"Measured: {' and '.join(found.name for found in timed)} ({timed[-1].name}:"
        f" {result['sizes']}). By formula and by XLA's counts alone: ViT-B/16 and"
        " Swin-B. What a program costs does not depend on the values of its weights"
        " and prompts.",
        f"In multiply-accumulates, {result['full']} prompts per layer add to {added}."
        " The share of keys and values falls with the width of a model, that of tokens"
        " with the number of its patches; as tokens of a Swin, prompts are copied into"
        " every window.",
        "All programs of a model and batch size take turns in every round; inputs are"
        " on the device, the first round is dropped. A ratio is the median of the"
        f" rounds' own ratios, in brackets their quantiles {SPREAD[0]:g} and"
        f" {SPREAD[1]:g}. Noise is a program timed twice: {rounds}.",
    ]
    shares = [r["flops"] / r["macs"] / 2 for r in result["programs"] if r["flops"]]
    if shares:
        text.append(
            f"XLA counts {min(shares):.3f} to {max(shares):.3f} times two operations"
            " per multiply-accumulate: normalisation, softmax and GELU are in it."
        )
    return text


def _formula(models: Sequence[Counted]) -> Table:
    shown, full = ("tokens", "prefilled"), models[0].full

    def cells(rows: Sequence[dict[str, Any]]) -> list[str]:
        return [with_prefix(float(row[how])) for row in rows for how in shown]

    rows = [
        [str(n), *cells([m.by_prompts[n] for m in models])]
        for n in models[0].by_prompts
    ]
    rows += [
        [
            f"{percent(left)} of {full}: {kept(full, left)}",
            *cells([m.by_ratio[left] for m in models]),
        ]
        for left in models[0].by_ratio
    ]
    rows.append([f"{percent(KEPT)}, uneven", *cells([m.uneven for m in models])])
    most = next(m for m in models if m.name == LARGE).by_prompts[full]
    return Table(
        ["Prompts per layer"]
        + [f"{m.name}, {how}" for m in models for how in ("tokens", "kv")],
        rows,
        "Multiply-accumulates per picture by formula, keys and values prefilled. To"
        f" make them anew is {with_prefix(float(most['kv'] - most['prefilled']))} per"
        f" call for {full} prompts in {LARGE}, whatever the batch. Uneven: as many in"
        " all, their number rising from layer to layer. kv computes of the last block"
        " only what is read, so it is cheaper even without prompts where that is the"
        " class token.",
    )


def _table_1(result: Result) -> Table:
    rows = []
    for row in result["table_1"]:
        cells = [f"{row['model']}, {row['prompts']}"]
        for printed, here, digits in (
            (row["printed"], row["giga"], 2),
            (row["printed_overhead"], row["overhead"], 1),
        ):
            own = f"{here:.{digits}f}"
            if printed is None:
                cells += ["–", own, "–"]
            else:
                cells += [f"{printed:.1f}", own, f"{here - printed:+.{digits}f}"]
        rows.append(cells)
    return Table(
        [
            "Prompts per layer",
            *("Paper, G", "Here, G", "Difference"),
            *("Paper, overhead %", "Here, %", "Difference"),
        ],
        rows,
        'The paper\'s table 1 ("GFLOPs") against multiply-accumulates of prompts as'
        " tokens. Its overheads are those of its own rounded numbers. The table has a"
        " row for Swin-B whose numbers are not known to us (–): those beside it are"
        " ours, for the same numbers of prompts.",
    )


def _xla(result: Result) -> Table:
    rows, large = [], [row for row in result["programs"] if not row["ms"]]
    most = {
        (row["model"], row["how"]): row
        for row in large
        if max(row["counts"]) == result["full"]
    }
    for row in large:
        none = row["how"] != "tokens" and not any(row["counts"])
        full = most[row["model"], "prefilled" if none else row["how"]]
        rows.append(
            [
                f"{row['model']}, {NAMES[row['how']]}",
                _counts(row["counts"]),
                *_flops(row),
                share(row["flops"], full["flops"]),
                *(_size(row[what]) for what in ("temporary", "arguments")),
                share(row["temporary"], full["temporary"]),
            ]
        )
    batch = str(large[0]["batch"]) if large else "any"
    return Table(
        [
            *("Program", "Prompts", "FLOP", "÷ 2 MACs", "÷ own 100 %"),
            *("Temporary", "Arguments", "Temporary ÷ own 100 %"),
        ],
        rows,
        "XLA's own numbers of the compiled programs, which were not run: FLOP per"
        f" picture, memory in MiB at batch {batch}. Arguments are weights, pictures,"
        " and prompts or their keys and values.",
    )


def _programs(found: Timed) -> list[tuple[str, Counts]]:
    return list(dict.fromkeys((how, counts) for _, how, counts in found.rows))


def _latency(found: Timed) -> Table:
    rows = []
    for how, counts in _programs(found):
        row = [NAMES[how], _counts(counts)]
        for b in found.batches:
            ms = float(np.median(found.row(b, how, counts)["ms"])) / b
            against = str(found.ratio(b, how, counts, found.none))
            row += [three_digits(ms), against if any(counts) else "1"]
        rows.append(row)
    header = [text for b in found.batches for text in (f"Batch {b}, ms", "to none")]
    return Table(
        [f"{found.name}", "Prompts", *header],
        rows,
        f"Time, {found.name}: milliseconds per picture, and the ratio to the same"
        " formulation without prompts.",
    )


def _memory(found: Timed) -> Table:
    rows = []
    for how, counts in _programs(found):
        cells = [found.row(b, how, counts) for b in found.batches]
        sizes = [row["temporary"] for row in cells] + [cells[-1]["arguments"]]
        rows.append(
            [NAMES[how], _counts(counts), *_flops(cells[-1]), *map(_size, sizes)]
        )
    last = found.batches[-1]
    return Table(
        [
            f"{found.name}",
            *("Prompts", "FLOP", "÷ 2 MACs"),
            *(f"Batch {b}, temporary" for b in found.batches),
            f"Batch {last}, arguments",
        ],
        rows,
        f"Memory, {found.name}: MiB that XLA says a call needs besides its arguments"
        " (weights, pictures, and prompts or their keys and values). FLOP per picture"
        f" by XLA at batch {last}.",
    )


def _condensing(found: Timed) -> Table:
    last, full = max(found.batches), found.even(1.0)
    rows = []
    for how in HOW:
        for left, ragged in ((KEPT, False), (KEPT, True), (found.least, False)):
            counts = found.uneven if ragged else found.even(left)
            name = f"{NAMES[how]}, {percent(left)}" + (", uneven" if ragged else "")
            rows.append(
                [
                    name,
                    found.share("macs", last, how, counts, full),
                    found.share("temporary", last, how, counts, full),
                    *(str(found.ratio(b, how, counts, full)) for b in found.batches),
                ]
            )
    return Table(
        [
            f"{found.name}, to its 100 %",
            *("MACs", "Memory"),
            *(f"Batch {b}, time" for b in found.batches),
        ],
        rows,
        f"What condensing {found.full} prompts per layer leaves, {found.name}, as"
        " ratios to the same formulation with all prompts. MACs and temporary memory:"
        f" at batch {last}.",
    )


def _both(timed: Sequence[Timed]) -> Table:
    """Both savings on one scale: tokens with all prompts are 1."""
    rows = []
    for how in WAYS:
        for left in (1.0, KEPT, timed[0].least, 0.0):
            row = [f"{NAMES[how] if left else NAMES[plain(how)]}, {percent(left)}"]
            for found in timed:
                b = max(found.batches)
                base = found.row(b, "tokens", found.even(1.0))
                own = found.row(b, how, found.even(left) if left else found.none)
                time = str(ratio(own["ms"], base["ms"]))
                row += [
                    share(own["macs"], base["macs"]),
                    time if own is not base else "1",
                    share(own["temporary"], base["temporary"]),
                ]
            rows.append(row)
    return Table(
        [
            "Prompts kept",
            *(f"{t.name}, {w}" for t in timed for w in ("MACs", "time", "memory")),
        ],
        rows,
        "What condensing saves and what keys and values save: every number is a ratio"
        f" to tokens with all {timed[0].full} prompts per layer. Time and temporary"
        f" memory at batch {max(timed[0].batches)}.",
    )


def _counts(counts: Sequence[int]) -> str:
    same = len(set(counts)) == 1
    return str(counts[0]) if same else f"{min(counts)}–{max(counts)}"


def _flops(row: dict[str, Any]) -> list[str]:
    """XLA's count, and that over twice ours."""
    flops = row["flops"]
    if not flops:
        return ["–", "–"]
    return [with_prefix(flops), f"{flops / row['macs'] / 2:.3f}"]


def _size(value: int | None) -> str:
    return "–" if value is None else f"{value / 2**20:.2f}"


def _verdicts(
    result: Result, counted: dict[str, Counted], timed: Sequence[Timed]
) -> list[Verdict]:
    return [
        _reproduced(result),
        *(_expensive(counted, timed, how) for how in WAYS),
        *(_cheaper_by_macs(counted, how) for how in WAYS),
        *(_cheaper_measured(found, how) for found in timed for how in WAYS),
        *(_without_condensing(found) for found in timed),
    ]


def _reproduced(result: Result) -> Verdict:
    far = [abs(r["giga"] - r["printed"]) for r in result["table_1"] if r["printed"]]
    return study.verdict(
        "The paper's table 1 counts multiply-accumulates of prompts as tokens"
        f" ({LARGE}).",
        max(far) < PRINTED,
        f"Largest difference {max(far):.2f} G; rule: below {PRINTED:g}.",
    )


def _expensive(
    counted: dict[str, Counted], timed: Sequence[Timed], how: str
) -> Verdict:
    large, others = counted[LARGE], []
    for model in counted.values():
        if model is not large:
            others.append(f"{model.name} {model.overhead(how):.2f}")
    for found in timed:
        b = max(found.batches)
        time = found.ratio(b, how, found.even(1.0), found.none)
        others.append(f"{found.name} measured {time} at batch {b}")
    return study.verdict(
        f"Prompts are expensive at inference ({WAYS[how]}).",
        large.overhead(how) >= EXPENSIVE,
        f"{large.full} prompts per layer are {large.overhead(how):.2f} times the MACs"
        f" of none in {LARGE}; rule: at least {EXPENSIVE:g}. {', '.join(others)}.",
    )


def _cheaper_by_macs(counted: dict[str, Counted], how: str) -> Verdict:
    large = counted[LARGE]
    others = ", ".join(
        f"{m.name} {m.saved(how):.2f}" for m in counted.values() if m is not large
    )
    return study.verdict(
        f"Condensing to {percent(KEPT)} makes inference much cheaper ({WAYS[how]}, by"
        " MACs).",
        large.saved(how) <= MUCH_CHEAPER,
        f"{large.saved(how):.2f} of those of {large.full} prompts per layer in {LARGE};"
        f" rule: at most {MUCH_CHEAPER:g}. {others}.",
    )


def _cheaper_measured(found: Timed, how: str) -> Verdict:
    last, full = max(found.batches), found.even(1.0)
    times = {b: found.ratio(b, how, found.even(KEPT), full) for b in found.batches}
    listed = ", ".join(f"{value} at batch {b}" for b, value in times.items())
    least = found.ratio(last, how, found.even(found.least), full)
    return study.verdict(
        f"Condensing to {percent(KEPT)} makes inference much cheaper ({WAYS[how]},"
        f" measured on {found.name}).",
        much_cheaper(times[last], found.noise[last]),
        f"{listed}; to {percent(found.least)} {least}; the same program twice"
        f" {found.noise[last]}. Rule, batch {last}: all of the spread at most"
        f" {MUCH_CHEAPER:g}; undecided where it covers that or 1, or meets the noise.",
    )


def _without_condensing(found: Timed) -> Verdict:
    last = max(found.batches)
    tokens = found.row(last, "tokens", found.even(KEPT))
    keys = found.row(last, "prefilled", found.even(1.0))
    time = ratio(keys["ms"], tokens["ms"])
    macs = share(keys["macs"], tokens["macs"])
    return study.verdict(
        f"All prompts as keys and values are cheaper than {percent(KEPT)} of them as"
        f" tokens (measured on {found.name}).",
        cheaper(time, found.noise[last]),
        f"{time} of the time at batch {last}, {macs} of the MACs. Rule: all of the"
        " spread below 1 supports it, above 1 not; undecided where it covers 1 or"
        f" meets that of the same program twice, {found.noise[last]}.",
    )
