# SPDX-License-Identifier: Apache-2.0
"""What the study `importance` shows: its tables, figures and verdicts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from studies.ranks import pearson
from studies.study import (
    Result,
    Section,
    Table,
    Verdict,
    clear,
    drawn,
    percent,
    spread,
    verdict,
    with_margin,
)

DEFAULT, GATE, SECOND = "removal", "key_gate", "removal, second_order"
CUTS, KEPT = (0.5, 0.3, 0.1), 0.3
ENOUGH = 0.8  # Spearman's correlation over all prompts
COLOURS = {"size": "#0072B2", "mean": "#D55E00", "divergence": "#009E73"}
NAMES = {"size": "size of the change", "mean": "mean change"}


def show(result: Result) -> Section:
    """Tables, figures and verdicts."""
    text = [
        f"Every prompt was removed by its key mask and the loss of"
        f" {result['examples']} training pictures taken without it."
        " The size of the change is the mean of its absolute value per picture, what"
        " mean_abs estimates; the mean change is leave_one_out, the change of the"
        " training loss. They order the prompts differently (Spearman"
        f" {_spread([s['oracles_agree'] for s in result['seeds']])}).",
        "key_gate is the derivative of a gate on the prompt's key; removal has the"
        " softmax's exact answer to a removed key in its place, at the same cost;"
        " second_order adds half the mean square over pictures, the loss's curvature.",
    ]
    drawings = {
        "scatter": (
            "Scores against exact removal",
            "A dot is a prompt of one seed, placed by its ranks (right and up: more"
            " important), coloured by its layer. On the diagonal, score and oracle"
            " agree.",
            _draw_scatter,
        ),
        "bars": (
            "How well every score orders the prompts",
            f"Spearman's correlation over all prompts in float32; bars are means, dots"
            f" are seeds, the dashed line is {ENOUGH}.",
            _draw_bars,
        ),
        "groups": (
            "Are scores additive?",
            "A dot is a random tenth of all prompts: the sum of their scores against"
            " the change of the loss without them.",
            _draw_groups,
        ),
    }
    tables = (_agreement, _stability, _cuts, _costs, _planted, _groups)
    return Section(
        "Importance against exact removal",
        text,
        [table(result) for table in tables],
        drawn(drawings, result),
        [
            *(_finds(result, *claim) for claim in _CLAIMS),
            _right_question(result),
            _taylor(result),
            *(_additive(result, name) for name in ("signed", SECOND, "leave_one_out")),
        ],
    )


_CLAIMS = (
    (DEFAULT, "size", "The default score (removal, mean_abs) finds the prompts whose"
     " removal changes the loss of pictures most."),
    (GATE, "size", "key_gate (mean_abs) finds the prompts whose removal changes the"
     " loss of pictures most."),
    (GATE, "mean", "key_gate (mean_abs) finds the prompts whose removal raises the"
     " training loss most (leave_one_out)."),
    (SECOND, "mean", "removal with second_order finds the prompts whose removal raises"
     " the training loss most (leave_one_out)."),
)  # fmt: skip


def of(result: Result, score: str, dtype: str, oracle: str, what: str) -> list[float]:
    """A number of a score, for every seed."""
    return [
        row[what]
        for seed in result["seeds"]
        for row in seed["rows"]
        if (row["score"], row["dtype"], row["oracle"]) == (score, dtype, oracle)
    ]


def enough(by_dtype: Mapping[str, Sequence[float]]) -> tuple[bool | None, str]:
    """Whether correlations are high, and their text.

    Yes: every seed and precision reaches ENOUGH; no: a mean does not.
    """
    text = "; ".join(f"{d} {_spread(values)}" for d, values in by_dtype.items())
    if all(min(values) >= ENOUGH for values in by_dtype.values()):
        return True, text
    far = any(np.mean(values) < ENOUGH for values in by_dtype.values())
    return False if far else None, text


def _finds(result: Result, score: str, oracle: str, claim: str) -> Verdict:
    dtypes = _names(result, "dtype")
    found = {d: of(result, score, d, oracle, "spearman") for d in dtypes}
    decided, numbers = enough(found)
    because = (
        f"Spearman with the {NAMES[oracle]}: {numbers}. Rule: at least {ENOUGH} in"
        " every seed and precision; not supported if a mean is below."
    )
    return verdict(claim, decided, because)


def _right_question(result: Result) -> Verdict:
    """Which oracle's choice leaves the smaller loss when most prompts go at once."""
    i = CUTS.index(KEPT)
    gain = [
        seed["cuts"]["oracle, mean"][i] - seed["cuts"]["oracle, size"][i]
        for seed in result["seeds"]
    ]
    return verdict(
        "Prompts that change the loss of pictures most are better kept than those whose"
        " removal raises the training loss most.",
        clear(gain),
        f"with the best {percent(KEPT)} by exact removal alone, the training loss by"
        f" mean is that by size {with_margin(gain, 3)} (paired, 95 % interval over"
        " seeds).",
    )


def _taylor(result: Result) -> Verdict:
    """Degenerate: tiny, and its examples' values do not survive another rounding."""
    sizes = [s["taylor_size"]["float32"] for s in result["seeds"]]
    each = [_stable(s, "taylor", "examples") for s in result["seeds"]]
    key_gate = [_stable(s, "key_gate", "examples") for s in result["seeds"]]
    rank = {o: of(result, "taylor", "float32", o, "spearman") for o in NAMES}
    low = of(result, "taylor", "bfloat16", "size", "spearman")
    tiny, broken = max(sizes) < 1e-3, max(each) < 0.5
    supported = True if tiny and broken else False if not tiny else None
    return verdict(
        "The literal token gate (taylor) is degenerate for deep prompts.",
        supported,
        f"|score| is {max(sizes):.1e} of |p||g| in float32 (rule: below 1e-3); the"
        f" values of examples in float32 and bfloat16 correlate at {_spread(each)}"
        f" (rule: below 0.5; key_gate: {_spread(key_gate)}). What is left of its size"
        " still orders the prompts, by their gradient's length: Spearman with the size"
        f" of the change {_spread(rank['size'])} in float32, {_spread(low)} in"
        f" bfloat16; with the mean change {_spread(rank['mean'])}.",
    )


def _additive(result: Result, name: str) -> Verdict:
    """Supported: every seed correlates at ENOUGH with a slope within 0.5 to 2."""
    numbers = [_line(seed["groups"], name) for seed in result["seeds"]]
    r, slopes = ([n[i] for n in numbers] for i in (0, 1))
    good = min(r) >= ENOUGH and 0.5 <= min(slopes) and max(slopes) <= 2
    return verdict(
        f"The loss change without a group is the sum of its prompts' {name}.",
        good,
        f"Pearson {_spread(r)}, slope of actual on predicted {_spread(slopes)}. Rule:"
        f" at least {ENOUGH} and a slope of 0.5 to 2 in every seed.",
    )


def _line(groups: dict[str, list[float]], name: str) -> tuple[float, float]:
    x, y = np.array(groups[name]), np.array(groups["actual"])
    varies = float(np.var(x))
    slope = float(np.mean((x - x.mean()) * (y - y.mean())) / varies) if varies else 0.0
    return pearson(x, y), slope


def _names(result: Result, what: str) -> list[str]:
    """The scores (`score`) or precisions (`dtype`) of a result."""
    return list(dict.fromkeys(row[what] for row in result["seeds"][0]["rows"]))


def _stable(seed: Result, score: str, what: str) -> Any:
    return next(row[what] for row in seed["stability"] if row["score"] == score)


def _spread(values: Sequence[Any]) -> str:
    return spread(values, 3)


def _agreement(result: Result) -> Table:
    first = [(o, d) for o in NAMES for d in _names(result, "dtype")]
    more = {
        "kendall": "Kendall",
        "layer_spearman": "in layers",
        "layer_kendall": "Kendall in layers",
        "precision": "top 30 %",
    }
    others = [(o, what) for o in NAMES for what in more]
    rows = []
    for name in _names(result, "score"):
        row = [_spread(of(result, name, d, o, "spearman")) for o, d in first]
        means = (np.mean(of(result, name, "float32", o, what)) for o, what in others)
        rows.append([name, *row, *(f"{mean:.2f}" for mean in means)])
    header = [f"{o}, {d}" for o, d in first]
    header += [f"{o}: {more[what]}" for o, what in others]
    return Table(
        ["Score", *header],
        rows,
        "Agreement with exact removal (size and mean of the change, both in float32)."
        " First Spearman's correlation over all prompts, of scores in either precision;"
        " then, in float32, Kendall's tau over all prompts, the means over layers of"
        " Spearman's correlation and Kendall's tau within them, and the share of the"
        " true best 30 % found.",
    )


def _stability(result: Result) -> Table:
    seeds, rows = result["seeds"], []
    for name in _names(result, "score"):
        by_what = (
            [_stable(seed, name, what) for seed in seeds]
            for what in ("halves", "dtypes", "examples")
        )
        rows.append([name, *map(_spread, by_what)])
    for oracle in NAMES:
        halves = _spread([seed["oracle_halves"][oracle] for seed in seeds])
        rows.append([f"oracle, {oracle}", halves, "-", "-"])
    return Table(
        ["Score", "halves", "precisions", "examples"],
        rows,
        "Stability: Spearman's correlation between scores from two halves of the"
        " pictures and between float32 and bfloat16; and the correlation, over"
        " pictures, of their values in both precisions (median of prompts).",
    )


def _costs(result: Result) -> Table:
    one = result["cost"]["loss"]
    return Table(
        ["Computed", "seconds per batch", "forward passes"],
        [
            [name, f"{seconds:.2f}", f"{seconds / one:.1f}"]
            for name, seconds in result["cost"].items()
        ],
        "Time of one batch, compiled, median of three, and as a multiple of that of"
        " the loss alone.",
    )


def _cuts(result: Result) -> Table:
    seeds = result["seeds"]
    rows = [
        [name, *(_spread([seed["cuts"][name][i] for seed in seeds]) for i in range(n))]
        for name, n in ((name, len(cut)) for name, cut in seeds[0]["cuts"].items())
    ]
    return Table(
        ["Kept by", *(f"best {percent(ratio)}" for ratio in CUTS)],
        rows,
        f"Training loss with the best prompts alone, before fine-tuning; with all it is"
        f" {_spread([seed['loss'] for seed in seeds])}.",
    )


def _planted(result: Result) -> Table:
    by_seed = [seed["planted"] for seed in result["seeds"]]
    rows = []
    for name in by_seed[0][0]["percentiles"]:
        found = [[case["percentiles"][name] for case in cases] for cases in by_seed]
        rows.append([name, *(f"{mean:.0f}" for mean in np.mean(found, axis=0))])
    mass = max(cases[-1]["attention"] for cases in by_seed)
    return Table(
        ["Rank in per cent", *(case["case"] for case in by_seed[0])],
        rows,
        "Planted prompts, 0 is ranked last and 100 first; a right score has the ranks"
        " of its oracle. twins: the most important prompt of a layer and a copy, which"
        " stand in for each other. flat: a constant vector, an ordinary key to the"
        " network, without gradient along itself and with a huge one elsewhere."
        f" unattended: at most {mass:.0e} of the attention; nothing changes without"
        " it.",
    )


def _groups(result: Result) -> Table:
    rows = []
    for name in _added(result):
        lines = [_line(seed["groups"], name) for seed in result["seeds"]]
        rows.append([name, *map(_spread, zip(*lines, strict=True))])
    return Table(
        ["Sum of", "Pearson", "slope"],
        rows,
        "Predicted against actual loss change of random groups of a tenth of all"
        " prompts; slope of actual on predicted.",
    )


def _added(result: Result) -> list[str]:
    return [name for name in result["seeds"][0]["groups"] if name != "actual"]


def _draw_scatter(figure: Any, result: Result) -> None:
    """Rank against rank, for the default and for the better scores."""
    from matplotlib.ticker import MaxNLocator

    panels = ((GATE, "size"), (DEFAULT, "size"), (SECOND, "mean"))
    points = None
    all_axes = figure.subplots(1, len(panels))
    for axes, (score, oracle) in zip(all_axes, panels, strict=True):
        for seed in result["seeds"]:
            x, y = (
                100 * (stats.rankdata(v) - 1) / max(1, len(v) - 1)
                for v in (seed["scores"]["float32"][score], seed["oracles"][oracle])
            )
            layers = np.array(seed["layers"]) + 1
            points = axes.scatter(x, y, 9, layers, cmap="viridis")
        axes.axline((0, 0), slope=1, color="#aab1b9", lw=1)
        axes.set(xlabel=f"Rank by {score} (%)", ylabel=f"Rank by {NAMES[oracle]} (%)")
        mean = _spread(of(result, score, "float32", oracle, "spearman"))
        axes.set_title(f"Spearman {mean}", fontsize=10)
        axes.set_box_aspect(1)
    bar = figure.colorbar(points, ax=all_axes, label="Layer", shrink=0.7)
    bar.locator = MaxNLocator(integer=True)
    bar.update_ticks()


def _draw_bars(figure: Any, result: Result) -> None:
    draw_scores(figure, result, _names(result, "score"), NAMES)


def draw_scores(
    figure: Any,
    result: Result,
    names: Sequence[str],
    oracles: Mapping[str, str],
    label: Callable[[str], str] = str,
) -> None:
    """Spearman's correlation of every score with every oracle, means and seeds."""
    axes, step = figure.subplots(), 0.8 / len(oracles)
    for k, (oracle, text) in enumerate(oracles.items()):
        y = np.arange(len(names)) + step * (k - (len(oracles) - 1) / 2)
        values = [of(result, name, "float32", oracle, "spearman") for name in names]
        look = {"color": COLOURS[oracle], "alpha": 0.75, "label": f"With the {text}"}
        axes.barh(y, np.mean(values, axis=1), 0.9 * step, **look)
        for place, dots in zip(y, values, strict=True):
            axes.plot(dots, [place] * len(dots), ".", color="black", markersize=4)
    axes.axvline(ENOUGH, color="black", linestyle="--", lw=1)
    name_rows(axes, [label(name) for name in names])
    axes.set(xlabel="Spearman's correlation over all prompts")


def name_rows(axes: Any, names: Sequence[str]) -> None:
    """Names the rows of a figure from the top down."""
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.grid(False, axis="y")


def _draw_groups(figure: Any, result: Result) -> None:
    names = _added(result)
    all_axes = figure.subplots(1, len(names), sharey=True)
    for axes, name in zip(all_axes, names, strict=True):
        for k, seed in enumerate(result["seeds"]):
            x, y = seed["groups"][name], seed["groups"]["actual"]
            axes.plot(x, y, ".", color=f"C{k}", label=f"Seed {seed['seed']}")
        axes.axline((0, 0), slope=1, color="#aab1b9", lw=1)
        axes.set(xlabel=f"Sum of {name}")
    all_axes[0].set_ylabel("Loss change without the group")
