# SPDX-License-Identifier: Apache-2.0
r"""Does attention stay low-rank with prompts, and how does its rank grow?

python -m vpt_jax.studies.rank --config=configs/demo.py --workdir=out/studies

Every number is the mean, over test pictures, of one picture's own matrix of one layer
and head. What can be proved about these matrices is in docs/rank_bound.md.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import vpt_jax
from vpt_jax.data import strips
from vpt_jax.figures import LAYER_AXIS, render
from vpt_jax.studies import study
from vpt_jax.studies.spectra import (
    GROWTH,
    MATRICES,
    cumulative,
    energy_rank,
    entropy_rank,
    fit,
    held_out,
    linformer_rank,
    singular_values,
)
from vpt_jax.studies.study import Figure, Lab, Result, Section, Table, Verdict

PROMPTS = (0, 1, 2, 5, 10, 20, 50, 100, 200)  # per layer, as training starts from them
TRAINED = (5, 20, 50)
BATCH = 16
MEASURES = {
    "90": functools.partial(energy_rank, share=0.90),
    "95": functools.partial(energy_rank, share=0.95),
    "99": functools.partial(energy_rank, share=0.99),
    "effective": entropy_rank,
    "energy_entropy": functools.partial(entropy_rank, power=2),
}
NAMES = {
    "90": "90 % of energy",
    "95": "95 % of energy",
    "99": "99 % of energy",
    "effective": "Effective rank",
    "energy_entropy": "Entropy of energy",
}
SHAPES = {"all": "(n+m) × (n+m)", "rows": "n × (n+m)", "block": "n × n"}
# The rules of the verdicts. A rank is low below this share of what it can be; "stays
# low" is said of at least `MOST` of the heads that are low without prompts, denied
# below `FEW`. Errors differ where their mean difference over layers is `SURE` times
# its standard error.
LOW, MOST, FEW, SURE = 0.5, 0.9, 0.5, 2.0
KINDS = ("random", "trained")
GROWN = tuple((a, b) for a in ("all", "rows") for b in ("95", "effective"))
LOOKS = {"log": ("#0072B2", "-"), "sqrt": ("#E69F00", "-."), "linear": ("#D55E00", ":")}


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
      pictures: How many, spread evenly over the test set; all, where it has fewer.

    Raises:
      ValueError: If the backbone is not a ViT or the task has no test pictures.
    """
    model = lab.model.model
    if not isinstance(model, vpt_jax.ViT):
        raise ValueError(
            f"the rank study needs a ViT; {lab.model.info['variant']} attends within"
            " windows of a fixed size."
        )
    images, deep = sample(lab, pictures), lab.config.prompts.deep

    def measured(kind: str, seed: int, values: Any) -> dict[str, Any]:
        return {"kind": kind, "seed": seed, **measure(lab, images, values)}

    rows = []
    for seed in lab.config.seeds:
        key, _ = jax.random.split(jax.random.key(seed))  # as stages.starting_point
        for m in prompts:
            if m or seed == lab.config.seeds[0]:  # none are the same for every seed
                drawn = vpt_jax.init_prompts(key, model, m, deep=deep)
                rows.append(measured("random", seed, drawn))
        for m in trained:
            with study.running(lab, prompts={"num_prompts": m}) as shared:
                tuned = study.tuned(shared, seed)
            rows.append(measured("trained", seed, tuned["prompts"]))
    tokens = len(rows[0]["curves"]["block"][0])
    return {
        "pictures": len(images),
        "tokens": tokens,
        "seeds": list(lab.config.seeds),
        "rows": rows,
        "fits": growth_fits(rows, tokens),
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
    """Ranks `[layers][heads]` of every matrix, and mean spectra; means over pictures.

    `curves` holds cumulative shares of singular values and of their squares, means over
    layers and heads too.
    """
    size, parts = min(BATCH, len(images)), []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        padded = batch[np.arange(size) % len(batch)]  # every batch has one shape
        found = singular_values(
            lab.model.backbone,
            prompts,
            padded,
            model=lab.model.model,
            normalisation=lab.model.info["normalisation"],
            deep=lab.config.prompts.deep,
        )
        parts.append(jax.tree.map(np.asarray, found))

    def joined(*arrays: np.ndarray) -> np.ndarray:
        return np.concatenate(arrays, axis=1)[:, : len(images)]

    values, mass = jax.tree.map(joined, *parts)

    def over_pictures(x: np.ndarray) -> list[list[float]]:
        return x.mean(axis=1, dtype=np.float64).tolist()

    return {
        "m": vpt_jax.counts(prompts)[0],
        "mass": over_pictures(mass),
        "ranks": {
            matrix: {
                name: over_pictures(function(values[matrix]))
                for name, function in MEASURES.items()
            }
            for matrix in MATRICES
        },
        "curves": {
            matrix: [
                cumulative(values[matrix], power).mean(axis=(0, 1, 2)).tolist()
                for power in (1, 2)
            ]
            for matrix in MATRICES
        },
    }


def table_of(
    rows: Sequence[dict[str, Any]], kind: str, matrix: str, measured: str
) -> dict[int, np.ndarray]:
    """Ranks `[layers, heads]` by number of prompts, means over seeds; 0 is of both."""
    found: dict[int, list[Any]] = {}
    for row in rows:
        if row["kind"] == kind or not row["m"]:
            found.setdefault(row["m"], []).append(row["ranks"][matrix][measured])
    return {m: np.mean(found[m], axis=0) for m in sorted(found)}


def growth_fits(rows: Sequence[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Fits to random prompts' ranks, of every layer and head by itself.

    Returns:
      By matrix, measure and form: `a` and `b` (means), and `held_out` `[layers]`, the
      error at numbers of prompts left out, mean over heads. Empty with fewer than 4
      numbers of prompts.
    """
    if len(table_of(rows, "random", "all", "95")) < 4:
        return {}
    fits: dict[str, Any] = {}
    for matrix in ("all", "rows"):
        for measured in MEASURES:
            found = table_of(rows, "random", matrix, measured)
            x, y = np.array(list(found)) / tokens, np.stack([*found.values()], axis=-1)
            for form in GROWTH:
                a, b = fit(x, y, form)
                error = held_out(x, y, form).mean(axis=-1)
                fits.setdefault(matrix, {}).setdefault(measured, {})[form] = {
                    "a": float(a.mean()),
                    "b": float(b.mean()),
                    "held_out": error.tolist(),
                }
    return fits


def spread(differences: Any) -> tuple[float, float]:
    """Mean over layers, and `SURE` standard errors of it (infinite for one layer)."""
    d = np.asarray(differences, np.float64)
    if len(d) < 2:
        return float(d.mean()), float("inf")
    return float(d.mean()), float(SURE * d.std(ddof=1) / np.sqrt(len(d)))


def low_rank_verdict(result: Result, matrix: str) -> Verdict:
    """Of the heads whose rank is low without prompts, those that stay low.

    Low: 95 % of the energy in fewer than `LOW` of the singular values there are. The
    worst number of prompts decides, random and trained.
    """
    n, shares = result["tokens"], {}
    for kind in KINDS:
        found = table_of(result["rows"], kind, matrix, "95")
        low = found.pop(0) < LOW * n
        for m, ranks in found.items():
            size = n + m if matrix == "all" else n
            stay = (ranks < LOW * size)[low]
            shares[kind, m] = float(stay.mean()) if low.any() else 0.0
    before = float(
        np.mean(table_of(result["rows"], "random", matrix, "95")[0] < LOW * n)
    )
    # The most prompts among equals.
    (kind, m), worst = min(shares.items(), key=lambda item: (item[1], -item[0][1]))
    supported = True if worst >= MOST else None
    if worst < FEW or before < FEW:
        supported = False
    return study.verdict(
        f"Attention stays low-rank with prompts ({SHAPES[matrix]}).",
        supported,
        f"{100 * before:.0f} % of all heads are low-rank without prompts (95 % of the"
        f" energy in fewer than {100 * LOW:g} % of the singular values); of these,"
        f" {100 * worst:.0f} % stay so in the worst case, {m} {kind} prompts. Rule: at"
        f" least {100 * MOST:g} % supports it, below {100 * FEW:g} % (of either) not.",
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
    most = max(found)
    grown, error = spread((found[most] - found[0]).mean(axis=-1))
    change = f"From 0 to {most} prompts it changes by {grown:+.1f} ± {error:.1f}"
    if grown <= error:
        return study.verdict(claim, True, f"{change}: it does not grow.")
    fits = result["fits"][matrix][measured]
    differences = {
        form: spread(np.subtract(fits["log"]["held_out"], fits[form]["held_out"]))
        for form in ("linear", "sqrt")
    }
    supported = None
    if all(mean < -margin for mean, margin in differences.values()):
        supported = True
    elif differences["linear"][0] > differences["linear"][1]:
        supported = False
    errors = ", ".join(f"{f} {np.mean(fits[f]['held_out']):.2f}" for f in GROWTH)
    than = ", ".join(f"{f} {m:+.2f} ± {e:.2f}" for f, (m, e) in differences.items())
    return study.verdict(
        claim,
        supported,
        f"{change}. Held-out errors: {errors}; log minus {than} (mean over layers,"
        f" {SURE:g} standard errors). Rule: log below both by more than that supports"
        " it, above linear not.",
    )


def show(result: Result) -> Section:
    """Tables of ranks and fits, spectra, growth, and the verdicts."""
    drawn = render(
        {
            "rank-growth": functools.partial(_draw_growth, result=result),
            "rank-spectrum": functools.partial(_draw_spectrum, result=result),
            "rank-layers": functools.partial(_draw_layers, result=result),
        }
    )
    captions = (
        (
            "Rank against prompts",
            "Means over layers and heads; bars are one standard deviation over layers."
            " Lines are fits to the random prompts. What can be proved is two more for"
            " every prompt (all rows) or one more (tokens' rows): docs/rank_bound.md.",
        ),
        (
            "Cumulative spectrum",
            "Share of the sum of singular values (left, as Linformer shows it) and of"
            f" their squares (right) in the largest k, {SHAPES['all']} matrix, means"
            " over layers, heads and pictures. Dashed: trained prompts.",
        ),
        (
            "Rank by layer",
            f"Effective rank and 95 % energy rank, {SHAPES['all']} matrix, as a share"
            " of n + m. Means over heads; dashed: trained prompts.",
        ),
    )
    return Section(
        "The rank of attention with prompts",
        _text(result),
        [
            _ranks(result, "all"),
            _ranks(result, "rows"),
            _fits(result),
            _bound(result),
        ],
        [Figure(*c, svg) for c, svg in zip(captions, drawn.values(), strict=True)],
        [
            *(low_rank_verdict(result, matrix) for matrix in ("all", "rows")),
            *(growth_verdict(result, *which) for which in GROWN),
        ],
    )


def _text(result: Result) -> list[str]:
    n, seeds = result["tokens"], len(result["seeds"])
    text = [
        f"Softmax attention of n = {n} tokens and m prompts per layer, {SHAPES['all']}"
        " with prompts as tokens, as papers mean it; and the tokens' own rows,"
        f" {SHAPES['rows']}, the only ones that deep prompts need and that are computed"
        f" here. {result['pictures']} test pictures, {seeds} seed(s); a number is the"
        " mean over pictures of each matrix's own rank, never a rank of a mean.",
        "Rows of attention sum to 1, so its largest singular value is at least"
        " sqrt(rows / columns) whatever the network does, and squares favour it: energy"
        " ranks are low for dull reasons. The effective rank (entropy of the singular"
        " values) is the stricter measure.",
    ]
    block, rows = (
        table_of(result["rows"], "random", matrix, "99") for matrix in ("block", "rows")
    )
    most = max(rows)
    text.append(
        f"Prompts' keys can add a rank each (docs/rank_bound.md). With {most} random"
        f" ones the 99 % energy rank of the tokens' rows is {rows[most].mean():.1f}, of"
        f" the part over the tokens' keys {block[most].mean():.1f}; without prompts"
        f" {rows[0].mean():.1f}."
    )
    for measured in ("95", "effective"):
        random, trained = (
            table_of(result["rows"], kind, "all", measured) for kind in KINDS
        )
        parts = []
        for m in trained:
            if m in random and m:
                mean, margin = spread((trained[m] - random[m]).mean(axis=-1))
                parts.append(f"{mean:+.1f} ± {margin:.1f} with {m}")
        if parts:
            text.append(
                f"{NAMES[measured]}, trained minus random prompts of the same seed,"
                f" {SHAPES['all']} (mean over layers, {SURE:g} standard errors):"
                f" {', '.join(parts)}. A bound by Johnson and Lindenstrauss is the same"
                " for both."
            )
    return text


def _ranks(result: Result, matrix: str) -> Table:
    rows = []
    for kind in KINDS:
        tables = [table_of(result["rows"], kind, matrix, name) for name in MEASURES]
        for m in tables[0]:
            if kind == "trained" and not m:
                continue
            mass = [
                np.mean(row["mass"])
                for row in result["rows"]
                if row["m"] == m and row["kind"] == kind
            ]
            name = f"{m} {kind}" if m else "0"
            rows.append(
                [name]
                + [_with_spread(table[m]) for table in tables]
                + [f"{100 * np.mean(mass):.0f}"]
            )
    return Table(
        ["Prompts", *NAMES.values(), "Attention on prompts %"],
        rows,
        f"{SHAPES[matrix]}: means over layers and heads, and the standard deviation"
        " over layers. Entropy of energy: the effective rank of the squares.",
    )


def _with_spread(ranks: np.ndarray) -> str:
    """Mean of `[layers, heads]`, and the deviation of the layers' means."""
    layers = ranks.mean(axis=-1)
    deviation = f" ± {layers.std(ddof=1):.1f}" if len(layers) > 1 else ""
    return f"{layers.mean():.1f}{deviation}"


def _fits(result: Result) -> Table:
    rows = []
    for matrix, by_measure in result["fits"].items():
        for measured in ("95", "99", "effective"):
            row = [f"{SHAPES[matrix]}, {NAMES[measured]}"]
            for found in by_measure[measured].values():
                row += [f"{found['b']:.1f}", _error(found["held_out"])]
            rows.append(row)
    header = [text for form in GROWTH for text in (f"{form}: b", "Error")]
    return Table(
        ["Rank", *header],
        rows,
        "a + b f(m / n) with f = log(1 + x), sqrt(x), x, fitted to every head; errors"
        " at numbers of prompts left out, mean and standard deviation over layers.",
    )


def _error(values: Sequence[float]) -> str:
    return _with_spread(np.asarray(values)[:, None])


def _bound(result: Result) -> Table:
    n = result["tokens"]
    most = max(row["m"] for row in result["rows"])
    epsilons = (0.1, 0.25, 0.5, 2 / 3)
    return Table(
        ["Bound", *(f"ε = {epsilon:.2g}" for epsilon in epsilons)],
        [
            [name, *(f"{linformer_rank(tokens, e):.0f}" for e in epsilons)]
            for name, tokens in (
                (f"n = {n}", n),
                (f"n + m = {n + most}", n + most),
                ("n = 197", 197),
            )
        ],
        "5 ln n / (ε² - ε³), the rank that Linformer's theorem asks for; a number"
        " above n says nothing. It is smallest at ε = 2/3.",
    )


def _draw_growth(figure: Any, result: Result) -> bool:
    n, rows = result["tokens"], result["rows"]
    names = {"log": "log(1 + m/n)", "sqrt": "sqrt(m/n)", "linear": "m/n"}
    shown = [which for which in GROWN if which != ("rows", "95")]
    all_axes = figure.subplots(1, len(shown))
    for axes, (matrix, measured) in zip(all_axes, shown, strict=True):
        most = 0
        for kind, marker, colour in (
            ("random", "o", "black"),
            ("trained", "D", "#009E73"),
        ):
            found = table_of(rows, kind, matrix, measured)
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
            axes.plot(m, y, style, color=colour, label=names[form])
        axes.set(title=f"{SHAPES[matrix]}, {NAMES[measured].lower()}")
        axes.set(xlabel="Prompts per layer", ylim=(0, 1.05 * axes.dataLim.y1))
        axes.title.set_size("medium")
    all_axes[0].set_ylabel("Rank")
    return True


def _draw_spectrum(figure: Any, result: Result) -> bool:
    from matplotlib import colormaps

    rows = [r for r in result["rows"] if r["seed"] == result["seeds"][0]]
    numbers = sorted({row["m"] for row in rows})
    shown = [m for m in numbers if m in (0, 5, 20, 50, numbers[-1])]
    colours = colormaps["viridis"](np.linspace(0, 0.85, len(shown)))
    all_axes = figure.subplots(1, 2)
    for row in rows:
        if row["m"] not in shown:
            continue
        random = row["kind"] == "random"
        for axes, curve in zip(all_axes, row["curves"]["all"], strict=True):
            axes.plot(
                np.arange(1, len(curve) + 1),
                curve,
                "-" if random else "--",
                color=colours[shown.index(row["m"])],
                linewidth=1.5,
                label=f"{row['m']} prompts" if random else None,
            )
    for axes, what in zip(all_axes, ("singular values", "squares"), strict=True):
        axes.set(xscale="log", ylim=(0, 1.02), xlabel="k", ylabel=f"Share of {what}")
        axes.xaxis.set_major_formatter("{x:g}")
    return True


def _draw_layers(figure: Any, result: Result) -> bool:
    from matplotlib import colormaps

    n, rows = result["tokens"], result["rows"]
    all_axes = figure.subplots(1, 2)
    for axes, measured in zip(all_axes, ("effective", "95"), strict=True):
        tables = {kind: table_of(rows, kind, "all", measured) for kind in KINDS}
        numbers = sorted(tables["random"])
        shown = [m for m in numbers if m in (0, 5, 20, 50, numbers[-1])]
        colours = colormaps["viridis"](np.linspace(0, 0.85, len(shown)))
        for colour, m in zip(colours, shown, strict=True):
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
    return True


if __name__ == "__main__":
    study.start("rank", sys.modules[__name__])
