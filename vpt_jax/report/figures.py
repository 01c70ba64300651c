# SPDX-License-Identifier: Apache-2.0
"""The figures of a report, as SVG elements, and their captions.

Without pyplot, which would look for a screen. A `_draw_*` function gets an empty
figure, the groups to show (`rows.summarise`) and the report; it returns False where the
data of its figure are missing.
"""

import contextlib
import functools
import io
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from vpt_jax.report import page
from vpt_jax.report.rows import (
    KINDS,
    REFERENCE_KINDS,
    Row,
    default_score,
    kind,
    label,
    summarise,
)

WIDTHS = 9.2, 4.9  # inches: of a screen, and of a phone
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "vpt_jax",  # the same ids every time
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e4e6e9",
    "legend.frameon": False,
}
LAYER_AXIS = "Layer (1 is next to the picture)"


CAPTIONS = {
    "curves": (
        "Training",
        "Mean loss of every epoch, and accuracy on at most 256 pictures of the"
        " validation set, of the first seed. Fine-tuning begins at tuned prompts.",
    ),
    "accuracy": (
        "Accuracy against prompts kept",
        "Markers are mean test accuracies, bars and bands (with several seeds) one"
        " sample standard deviation. Markers of a ratio are set apart to be seen. A"
        " close-up, if any, leaves out what is not fine-tuned.",
    ),
    "layers": (
        "Which layers keep their prompts",
        "A bar is how many prompts of a layer survive the global cut, mean over seeds;"
        " the pale outline is what the layer had.",
    ),
    "importance": (
        "Importance of every prompt",
        "A dot is one prompt, sorted within its layer; the short black line is the"
        " layer's median. The global cut keeps the dots above the line of its ratio;"
        " those close to a line were kept or lost by little.",
    ),
    "cost": (
        "Cost of inference",
        "Multiply-accumulates (MACs) against the prompts of all layers, as spent here"
        " (prompts are only keys and values) and as papers count them (prompts are"
        " tokens of every layer).",
    ),
}


def draw(report: Row, width: float = WIDTHS[0]) -> dict[str, str]:
    """SVG elements of the figures whose data are there, by name; one of `WIDTHS`."""
    drawings = _draw_curves, draw_accuracy, _draw_layers, _draw_importance, _draw_cost
    default = default_score(report)
    groups = summarise(report["rows"], default)
    groups = [group for group in groups if group["score"] in (None, default, "random")]
    if not groups:
        return {}
    functions = {
        name: functools.partial(function, groups=groups, report=report)
        for name, function in zip(CAPTIONS, drawings, strict=True)
    }
    return render(functions, width)


def html(
    functions: Mapping[str, Callable[[Any], bool]],
    captions: Mapping[str, tuple[str, str]],
) -> str:
    """Figures for a screen and a phone, as sections of a page; see `render`."""
    return page.figures(*(render(functions, w) for w in WIDTHS), captions=captions)


def render(
    functions: Mapping[str, Callable[[Any], bool]], width: float = WIDTHS[0]
) -> dict[str, str]:
    """SVG elements by name, to stand in one page: in one style, the same every time.

    `functions` draw into the empty figure that they get; False drops it.
    """
    figures = {}
    with _style() as empty:
        for name, function in functions.items():
            figure = empty(width)
            if function(figure):
                _add_legend(figure)
                figures[name] = _svg(figure, name if width > 6 else f"{name}-narrow")
    return figures


def pixels(function: Callable[[Any], Any]) -> np.ndarray:
    """A figure as uint8 `[h, w, 3]`, for what shows no SVG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with _style() as empty:
        figure = empty(WIDTHS[0])
        function(figure)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


@contextlib.contextmanager
def _style() -> Iterator[Callable[[float], Any]]:
    """Makes empty figures of a width, in one style."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        matplotlib.rcParams.update(STYLE)
        yield lambda width: Figure((width, 4.1), layout="constrained")


def _add_legend(figure: Any) -> None:
    """One legend for all axes, below them, where no data can be."""
    handles = {}
    for axes in figure.axes:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            handles[text] = handle  # a name of many markers is listed once
    if not handles:  # an empty one would take its place all the same
        return
    columns = 2 if figure.get_figwidth() <= 6 else 4 if len(handles) > 5 else 5
    where = {"loc": "outside lower center", "ncols": columns}
    figure.legend(list(handles.values()), list(handles), **where)


def _svg(figure: Any, name: str) -> str:
    """The figure as an SVG element that can stand in a page beside others."""
    file = io.StringIO()
    # Metadata would have the date in it, and the file be another one every time.
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=no_metadata)
    text = file.getvalue()
    svg = text[text.index("<svg") :]  # without the XML declaration and DOCTYPE
    # Matplotlib's ids are unique within a figure only; a page holds several.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)


def _draw_curves(figure: Any, groups: list[Row], report: Row) -> bool:
    """Loss by epoch of every training of the first seed, and accuracy on val."""
    seed, default = report["importance"]["seed"], default_score(report)
    rows = [r for r in report["rows"] if r["seed"] == seed and r.get("watched")]
    rows = [r for r in rows if len(r.get("losses", ())) > 1]
    if not rows:
        return False
    left, right = panels(figure, 2)
    for row in rows:
        ratios = sorted({r["keep_ratio"] for r in rows})
        style = ("-", "--", ":", "-.")[ratios[::-1].index(row["keep_ratio"]) % 4]
        look = {"color": KINDS[kind(row)][0], "linestyle": style, "linewidth": 1.4}
        name = label(row, default)
        left.plot(range(1, len(row["losses"]) + 1), row["losses"], **look, label=name)
        epochs, values = zip(*row["watched"], strict=True)
        right.plot(epochs, [100 * v for v in values], **look, marker="o", markersize=3)
    probe = [r["val_accuracy"] for r in report["rows"]
             if r["stage"] == "linear" and r["seed"] == seed]  # fmt: skip
    if probe and probe[0] is not None:
        right.axhline(100 * probe[0], color="#999999", lw=1, label="Linear probe")
    left.set(xlabel="Epoch", ylabel="Loss on train", yscale="log")
    left.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    left.yaxis.set_major_formatter("{x:g}")
    left.minorticks_off()
    right.set(xlabel="Epoch", ylabel="Accuracy on val (%)")
    return True


def panels(figure: Any, num: int) -> list[Any]:
    """Axes side by side; one below the other on a narrow figure."""
    wide = figure.get_figwidth() > 6
    if not wide:
        figure.set_figheight(0.6 + num * 3)
    return list(figure.subplots(*((1, num) if wide else (num, 1)), squeeze=False).flat)


def draw_accuracy(figure: Any, groups: list[Row], report: Row) -> bool:
    """Test accuracy against the ratio kept, with a close-up if that shows more."""
    cut = [group for group in groups if kind(group) not in REFERENCE_KINDS]
    if not cut:
        return False
    default = default_score(report)
    ratios = sorted({group["keep_ratio"] for group in cut})
    # Without repetitions, in the order of the table.
    names = list(dict.fromkeys(label(group, default, ratio=False) for group in cut))

    shown_groups = [groups]
    # These two are often far below the others and would squeeze them together.
    near = [group for group in groups if kind(group) not in ("linear", "condense")]
    if near and np.ptp(_accuracy_limits(groups)) > 2 * np.ptp(_accuracy_limits(near)):
        shown_groups.append(near)
    all_axes = panels(figure, len(shown_groups))
    for axes, shown in zip(all_axes, shown_groups, strict=True):
        for group in shown:
            name, x = label(group, default, ratio=False), None
            if kind(group) not in REFERENCE_KINDS:
                offset = 0.6 * (names.index(name) + 0.5) / len(names)
                x = ratios.index(group["keep_ratio"]) + offset
            _draw_group(axes, group, name, x)
        axes.set(xlim=(-0.2, len(ratios) - 0.2), ylim=_accuracy_limits(shown))
        axes.set(xlabel="Prompts kept (% of all prompts)", ylabel="Test accuracy (%)")
        ticks = [f"{100 * ratio:.4g} %" for ratio in ratios]
        axes.set_xticks(np.arange(len(ratios)) + 0.3, ticks)
    if len(shown_groups) > 1:
        all_axes[1].set_title("Close-up")
    return True


def _accuracy_limits(groups: list[Row]) -> tuple[float, float]:
    """Axis limits, in per cent, that show the groups with their deviations."""
    lows = [group["test_accuracy"] - (group["test_sd"] or 0) for group in groups]
    highs = [group["test_accuracy"] + (group["test_sd"] or 0) for group in groups]
    low, high = 100 * min(lows), 100 * max(highs)
    margin = max(0.08 * (high - low), 0.2)
    return low - margin, high + margin


def _draw_group(axes: Any, group: Row, name: str, x: float | None) -> None:
    """A marker and bar at a ratio; a reference is a line and band across all."""
    what = kind(group)
    colour, style = KINDS[what]
    look = {"color": colour}
    y, deviation = 100 * group["test_accuracy"], 100 * (group["test_sd"] or 0)
    if x is None:
        axes.axhline(y, linestyle=style, linewidth=1.3, label=name, **look)
        axes.axhspan(y - deviation, y + deviation, alpha=0.08, linewidth=0, **look)
        return
    # Hollow: controls of the two kinds of cut must not look the same.
    if group["scope"] == "layer" and what != "layer":
        look["markerfacecolor"] = "white"
    axes.plot(x, y, style, markersize=7, label=name, **look)
    if deviation:
        _, _, bars = axes.errorbar(x, y, deviation, color=colour, capsize=3)
        bars[0].set_gid("spread")


def _global_cuts(groups: list[Row]) -> list[tuple[Any, Row]]:
    """Colour and group of each global cut, by rising ratio."""
    from matplotlib import colormaps

    # Where there is a fine-tuned group it replaces the one that is not.
    cuts = {
        group["keep_ratio"]: group
        for wanted in ("condense", "global")
        for group in groups
        if kind(group) == wanted and group["scope"] != "layer"
        if group["score"] != "random"
    }
    colours = colormaps["viridis"](np.linspace(0.05, 0.8, len(cuts)))
    return [(c, cuts[r]) for c, r in zip(colours, sorted(cuts), strict=True)]


def _draw_layers(figure: Any, groups: list[Row], report: Row) -> bool:
    """Prompts of every layer, before and after each global cut."""
    cuts = _global_cuts(groups)
    if not cuts:
        return False
    axes = figure.subplots()
    layers = np.arange(1, len(groups[0]["counts"]) + 1)
    for group in groups:
        if kind(group) == "tune":
            look = {"color": "#f4f5f7", "edgecolor": "#aab1b9", "label": "Before"}
            axes.bar(layers, group["mean_counts"], 0.9, **look)
    width = 0.8 / len(cuts)
    for number, (colour, group) in enumerate(cuts):
        offset = 0.8 * ((number + 0.5) / len(cuts) - 0.5)  # side by side
        name = f"Kept at {100 * group['keep_ratio']:.4g} %"
        axes.bar(layers + offset, group["mean_counts"], width, color=colour, label=name)
    axes.set_xticks(layers)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel=LAYER_AXIS, ylabel="Prompts of the layer")
    return True


def _draw_importance(figure: Any, groups: list[Row], report: Row) -> bool:
    """Every prompt's importance by layer, and where the global cuts fell."""
    importance = report["importance"]
    layers = importance["layers"]
    values = np.array(sorted((v for layer in layers for v in layer), reverse=True))
    if not len(values):
        return False
    axes = figure.subplots()
    for number, layer in enumerate(layers, start=1):
        x = number + 0.38 * np.linspace(-1, 1, len(layer))
        axes.plot(x, sorted(layer), ".", color="#8494a8", markersize=4)
        median = np.median(layer) if layer else np.nan  # a layer without prompts
        axes.hlines(median, number - 0.42, number + 0.42, "black", lw=2, zorder=3)
    for colour, group in _global_cuts(groups):
        kept = group["prompts_max"]
        if 0 < kept < len(values):
            # Halfway between the last prompt kept and the first one lost.
            height = values[kept - 1 : kept + 1].mean()
            name = f"Cut at {100 * group['keep_ratio']:.4g} %"
            axes.axhline(height, color=colour, linestyle="--", lw=1.5, label=name)
    _scale_importance(axes, values)
    axes.set_xticks(range(1, len(layers) + 1))
    score = f"{importance['score']}, {importance['reduction']}"
    axes.set(xlabel=LAYER_AXIS, ylabel=f"Importance ({score})")
    return True


def _scale_importance(axes: Any, values: np.ndarray) -> None:
    """Makes the y axis logarithmic as far as the falling `values` allow it."""
    if np.all(values > 0):
        axes.set_yscale("log", subs=())
    elif np.any(values):  # a log axis has no place for zeros and negative scores
        sizes = np.abs(values[values != 0])
        axes.set_yscale("symlog", linthresh=np.quantile(sizes, 0.1))
    if values[0] < 1e3 * values[-1]:  # powers of ten alone would be too few ticks
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def _draw_cost(figure: Any, groups: list[Row], report: Row) -> bool:
    """MACs against the number of prompts."""
    groups = sorted(groups, key=lambda group: (group["prompts_max"], group["macs"]))
    scale, unit = (1e9, "G") if groups[-1]["macs_reference"] >= 1e9 else (1e6, "M")
    axes = figure.subplots()
    prompts = [group["prompts_max"] for group in groups]
    macs = [group["macs_reference"] / scale for group in groups]
    axes.plot(prompts, macs, "s-", color="#D55E00", label="MACs as papers count them")
    macs = [group["macs"] / scale for group in groups]
    axes.plot(prompts, macs, "o-", color="#0072B2", label="MACs as spent here")
    axes.set(xlabel="Prompts in all layers", ylabel=f"MACs per picture ({unit})")
    axes.set_ylim(0, 1.08 * axes.dataLim.y1)
    return True
