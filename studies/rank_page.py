# SPDX-License-Identifier: Apache-2.0
"""What the study `rank` shows: its tables, figures and verdicts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from studies import study
from studies.growth import GROWTH, KINDS, means, repetitions, table_of
from studies.spectra import MEASURES, linformer_rank
from studies.study import Result, Section, Table, Verdict, paired, spread, with_margin
from vpt_jax.report.figures import LAYER_AXIS

NAMES = {
    "90": "90 % of energy",
    "95": "95 % of energy",
    "99": "99 % of energy",
    "effective": "Effective rank",
    "energy_entropy": "Entropy of energy",
}
SHAPES = {"all": "(n+m) × (n+m)", "rows": "n × (n+m)"}
# The rules of the verdicts. A rank is low below this share of what it can be; "stays
# low" is said of at least `MOST` of the heads that are low without prompts, denied
# below `FEW`.
LOW, MOST, FEW = 0.5, 0.9, 0.5
GROWN = tuple((a, b) for a in SHAPES for b in ("95", "effective"))
LOOKS = {"log": ("#0072B2", "-"), "sqrt": ("#E69F00", "-."), "linear": ("#D55E00", ":")}
FORMS = {"log": "log(1 + m/n)", "sqrt": "sqrt(m/n)", "linear": "m/n"}


def low_rank_verdict(result: Result, matrix: str) -> Verdict:
    """Of the heads whose rank is low without prompts, those that stay low.

    Low: 95 % of the energy in fewer than `LOW` of the singular values there are. The
    worst number of prompts decides, random and trained, by its worst seed to support
    the claim and by its best one to deny it.
    """
    n, shares = result["tokens"], {}
    for kind in KINDS:
        found = table_of(result["rows"], kind, matrix, "95")
        low = means({0: found.pop(0)})[0] < LOW * n
        for m, ranks in found.items():
            size = n + m if matrix == "all" else n
            stay = (ranks.mean(axis=1) < LOW * size)[:, low]
            by_seed = stay.mean(axis=1) if low.any() else np.zeros(len(stay))
            shares[kind, m] = float(by_seed.min()), float(by_seed.max())
    none = means(table_of(result["rows"], "random", matrix, "95"))[0]
    before = float(np.mean(none < LOW * n))
    # The most prompts among equals.
    (kind, m), (worst, best) = min(
        shares.items(), key=lambda item: (*item[1], -item[0][1])
    )
    supported = True if worst >= MOST else None
    if best < FEW or before < FEW:
        supported = False
    stay = f"{100 * worst:.0f}" + (f"–{100 * best:.0f}" if best > worst else "")
    return study.verdict(
        f"Attention stays low-rank with prompts ({SHAPES[matrix]}).",
        supported,
        f"{100 * before:.0f} % of all heads are low-rank without prompts (95 % of the"
        f" energy in fewer than {100 * LOW:g} % of the singular values); of these,"
        f" {stay} % (worst and best seed) stay so in the worst case, {m} {kind}"
        f" prompts. Rule: at least {100 * MOST:g} % in every seed supports it, below"
        f" {100 * FEW:g} % in all (or without prompts) not.",
    )


def growth_verdict(result: Result, matrix: str, measured: str = "95") -> Verdict:
    """Whether the logarithm predicts unseen numbers of prompts best.

    Beaten by the linear form: growth is faster. Beaten by the square root alone: as far
    as measured, growth bends no less than the logarithm, but what it tends to is open.
    """
    claim = (
        "Rank grows no faster than logarithmically in the number of prompts"
        f" ({SHAPES[matrix]}, {NAMES[measured]})."
    )
    found = table_of(result["rows"], "random", matrix, measured)
    if not result["fits"]:
        return study.verdict(claim, None, f"{len(found)} numbers of prompts: no fit.")
    most, size = max(found), result["tokens"]
    size += max(found) if matrix == "all" else 0
    grown, error = paired(
        (repetitions(found[most]) - repetitions(found[0])).mean(axis=(-2, -1))
    )
    change = (
        f"From 0 to {most} prompts it changes by {grown:+.1f} ± {error:.1f}, to"
        f" {means(found)[most].mean():.1f} of {size}"
    )
    if grown <= error < np.inf:
        return study.verdict(claim, True, f"{change}: it does not grow.")
    errors = {
        f: np.array(v["held_out"]) for f, v in result["fits"][matrix][measured].items()
    }
    differences = {
        form: paired((errors["log"] - errors[form]).mean(axis=(-2, -1)))
        for form in ("linear", "sqrt")
    }
    supported = None
    if all(mean < -error for mean, error in differences.values()):
        supported = True
    elif differences["linear"][0] > differences["linear"][1]:
        supported = False
    heads = np.stack([errors[form].mean(axis=0) for form in GROWTH])
    best = np.bincount(heads.argmin(axis=0).ravel(), minlength=len(GROWTH))
    listed = ", ".join(f"{f} {errors[f].mean():.2f}" for f in GROWTH)
    than = ", ".join(f"{f} {m:+.2f} ± {e:.2f}" for f, (m, e) in differences.items())
    wins = ", ".join(f"{f} {count}" for f, count in zip(GROWTH, best, strict=True))
    return study.verdict(
        claim,
        supported,
        f"{change}. Held-out errors: {listed}; log minus {than}. Smallest in so many"
        f" of the {best.sum()} heads: {wins}. Rule: log below both by more than the"
        " margin supports it, above linear not.",
    )


def show(result: Result) -> Section:
    """Tables of ranks and fits, spectra, growth, and the verdicts."""
    drawings = {
        "rank-growth": (
            "Rank against prompts",
            "Means over layers and heads; bars are one standard deviation over the"
            " layers: how they differ, not how uncertain the mean is. Lines are fits to"
            " the random prompts. What can be proved is two more for every prompt (all"
            " rows) or one more (tokens' rows): docs/rank_bound.md.",
            _draw_growth,
        ),
        "rank-spectrum": (
            "Cumulative spectrum",
            "Share of the sum of singular values (left, as Linformer shows it) and of"
            f" their squares (right) in the largest k, {SHAPES['all']} matrix, first"
            " seed, means over layers, heads and pictures. Dashed: trained prompts.",
            _draw_spectrum,
        ),
        "rank-layers": (
            "Rank by layer",
            f"Effective rank and 95 % energy rank, {SHAPES['all']} matrix, as a share"
            " of n + m. Means over heads and seeds; dashed: trained prompts.",
            _draw_layers,
        ),
    }
    return Section(
        "The rank of attention with prompts",
        _text(result),
        [
            *(_ranks(result, matrix) for matrix in SHAPES),
            _fits(result),
            _trained(result),
            _bound(result),
        ],
        study.drawn(drawings, result),
        [
            *(low_rank_verdict(result, matrix) for matrix in SHAPES),
            *(growth_verdict(result, *which) for which in GROWN),
        ],
    )


def _text(result: Result) -> list[str]:
    n, seeds = result["tokens"], len(result["seeds"])
    block, rows = (
        means(table_of(result["rows"], "random", matrix, "99"))
        for matrix in ("block", "rows")
    )
    most = max(rows)
    return [
        f"Softmax attention of n = {n} tokens and m prompts per layer, {SHAPES['all']}"
        " with prompts as tokens, as papers mean it; and the tokens' own rows,"
        f" {SHAPES['rows']}, the only ones that deep prompts need and that are computed"
        f" here. {result['pictures']} test pictures, {seeds} seed(s); a number is the"
        " mean over pictures of each matrix's own rank, never a rank of a mean.",
        "The backbone's layers and heads are all that it has and no sample, so means"
        " are over all of them. What chance decides is which prompts are drawn and"
        " which pictures are looked at: a margin (±) is half of Student's 95 % interval"
        f" over {seeds} repetition(s), each with the prompts of one seed and its own"
        f" {result['pictures'] // seeds} of the pictures. It speaks for this backbone"
        " and task only.",
        "Rows of attention sum to 1, so its largest singular value is at least"
        " sqrt(rows / columns) whatever the network does, and squares favour it: energy"
        " ranks are low for dull reasons. The effective rank (entropy of the singular"
        " values) is the stricter measure.",
        f"Prompts' keys can add a rank each (docs/rank_bound.md). With {most} random"
        f" ones the 99 % energy rank of the tokens' rows is {rows[most].mean():.1f}, of"
        f" the part over the tokens' keys {block[most].mean():.1f}; without prompts"
        f" {rows[0].mean():.1f}.",
    ]


def _ranks(result: Result, matrix: str) -> Table:
    rows = []
    for kind in KINDS:
        tables = [
            means(table_of(result["rows"], kind, matrix, name)) for name in MEASURES
        ]
        for m in tables[0]:
            if kind == "trained" and not m:
                continue
            mass = [
                np.mean(row["mass"])
                for row in result["rows"]
                if row["m"] == m and row["kind"] == kind
            ]
            # Means, and the deviation of the layers' own.
            ranks = [spread(table[m].mean(axis=-1), 1) for table in tables]
            name = f"{m} {kind}" if m else "0"
            rows.append([name, *ranks, f"{100 * np.mean(mass):.0f}"])
    return Table(
        ["Prompts", *NAMES.values(), "Attention on prompts %"],
        rows,
        f"{SHAPES[matrix]}: means over layers and heads, and the standard deviation"
        " over layers. Entropy of energy: the effective rank of the squares.",
    )


def _fits(result: Result) -> Table:
    rows = []
    for matrix, by_measure in result["fits"].items():
        for measured in ("90", "95", "99", "effective"):
            row = [f"{SHAPES[matrix]}, {NAMES[measured]}"]
            for found in by_measure[measured].values():
                errors = np.array(found["held_out"]).mean(axis=(-2, -1))
                row += [f"{found['b']:.1f}", with_margin(errors, sign="")]
            rows.append(row)
    header = [text for form in GROWTH for text in (f"{form}: b", "Error")]
    return Table(
        ["Rank", *header],
        rows,
        "a + b f(m / n) with f = log(1 + x), sqrt(x), x, fitted to every head and"
        " repetition by itself; errors (root mean square) at numbers of prompts left"
        " out, one at a time. Means over layers and heads, with margins.",
    )


def _trained(result: Result) -> Table:
    """Trained minus random prompts of the same seed, on its share of the pictures."""
    rows = []
    for matrix, shape in SHAPES.items():
        for measured in ("95", "effective"):
            random, trained = (
                table_of(result["rows"], kind, matrix, measured) for kind in KINDS
            )
            for m in trained:
                if m and m in random:
                    pairs = [repetitions(table[m]) for table in (random, trained)]
                    before, after = (pair.mean(axis=(-2, -1)) for pair in pairs)
                    name = f"{shape}, {NAMES[measured]}, {m}"
                    numbers = [f"{x.mean():.1f}" for x in (before, after)]
                    rows.append([name, *numbers, with_margin(after - before)])
    return Table(
        ["Rank, prompts", "Random", "Trained", "Trained minus random"],
        rows,
        "Trained prompts against those that their training started from. Means over"
        " layers and heads, with margins. A bound by Johnson and Lindenstrauss is the"
        " same for both.",
    )


def _bound(result: Result) -> Table:
    n = result["tokens"]
    most = max(row["m"] for row in result["rows"])
    epsilons = (0.1, 0.25, 0.5, 2 / 3)
    sizes = {f"n = {n}": n, f"n + m = {n + most}": n + most, "n = 197": 197}
    return Table(
        ["Bound", *(f"ε = {epsilon:.2g}" for epsilon in epsilons)],
        [
            [name, *(f"{linformer_rank(tokens, e):.0f}" for e in epsilons)]
            for name, tokens in sizes.items()
        ],
        "5 ln n / (ε² - ε³), the rank that Linformer's theorem asks for; a number"
        " above n says nothing. It is smallest at ε = 2/3.",
    )


def _draw_growth(figure: Any, result: Result) -> None:
    n, rows = result["tokens"], result["rows"]
    all_axes = figure.subplots(1, len(GROWN))
    for axes, (matrix, measured) in zip(all_axes, GROWN, strict=True):
        most = 0
        looks = (("random", "o", "black"), ("trained", "D", "#009E73"))
        for kind, marker, colour in looks:
            found = means(table_of(rows, kind, matrix, measured))
            if kind == "trained":
                found.pop(0)
            if not found:
                continue
            most = max(most, *found)
            layers = np.stack([ranks.mean(axis=-1) for ranks in found.values()])
            axes.errorbar(
                list(found),
                layers.mean(axis=-1),
                layers.std(axis=-1),
                fmt=marker,
                color=colour,
                markersize=5,
                capsize=3,
                label=f"{kind.capitalize()} prompts",
            )
        m = np.linspace(0, most, 200)
        for form, (colour, style) in LOOKS.items() if result["fits"] else ():
            found = result["fits"][matrix][measured][form]
            y = found["a"] + found["b"] * GROWTH[form](m / n)
            axes.plot(m, y, style, color=colour, label=FORMS[form])
        axes.set(title=f"{SHAPES[matrix]},\n{NAMES[measured].lower()}")
        axes.set(xlabel="Prompts per layer", ylim=(0, 1.05 * axes.dataLim.y1))
        axes.title.set_size("medium")
    all_axes[0].set_ylabel("Rank")


def _shown(numbers: Sequence[int]) -> list[tuple[int, Any]]:
    """Numbers of prompts that a figure has room for, with their colours."""
    from matplotlib import colormaps

    shown = [m for m in numbers if m in (0, 6, 20, 40, max(numbers))]
    colours = colormaps["viridis"](np.linspace(0, 0.85, len(shown)))
    return list(zip(shown, colours, strict=True))


def _draw_spectrum(figure: Any, result: Result) -> None:
    rows = [r for r in result["rows"] if r["seed"] == result["seeds"][0]]
    colours = dict(_shown(sorted({row["m"] for row in rows})))
    all_axes = figure.subplots(1, 2)
    for row in rows:
        if row["m"] not in colours:
            continue
        random = row["kind"] == "random"
        for axes, curve in zip(all_axes, row["curves"], strict=True):
            axes.plot(
                np.arange(1, len(curve) + 1),
                curve,
                "-" if random else "--",
                color=colours[row["m"]],
                linewidth=1.5,
                label=f"{row['m']} prompts" if random else None,
            )
    for axes, what in zip(all_axes, ("singular values", "squares"), strict=True):
        axes.set(xscale="log", ylim=(0, 1.02), xlabel="k", ylabel=f"Share of {what}")
        axes.xaxis.set_major_formatter("{x:g}")


def _draw_layers(figure: Any, result: Result) -> None:
    n, rows = result["tokens"], result["rows"]
    all_axes = figure.subplots(1, 2)
    for axes, measured in zip(all_axes, ("effective", "95"), strict=True):
        tables = {kind: means(table_of(rows, kind, "all", measured)) for kind in KINDS}
        for m, colour in _shown(sorted(tables["random"])):
            for kind, style in (("random", "o-"), ("trained", "D--")):
                if m not in tables[kind] or (kind == "trained" and not m):
                    continue
                share = 100 * tables[kind][m].mean(axis=-1) / (n + m)
                layers = np.arange(1, len(share) + 1)
                label = f"{m} prompts" if kind == "random" else None
                axes.plot(layers, share, style, color=colour, ms=4, label=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(title=NAMES[measured], xlabel=LAYER_AXIS, ylim=(0, None))
    all_axes[0].set_ylabel("Rank (% of n + m)")
