# SPDX-License-Identifier: Apache-2.0
"""The figures of a leaderboard, in the style of a report's."""

import functools
from typing import Any

import numpy as np

from vpt_jax.report import figures, published
from vpt_jax.report.rows import KINDS, Row, kind
from vpt_jax.report.standings import (
    Board,
    Line,
    averages,
    complete_tasks,
    default_score,
    main_lines,
    task_names,
)

PUBLISHED: dict[str, Any] = {
    "marker": "D",
    "color": "#CC79A7",
    "markersize": 5,
    "fillstyle": "none",
}


def captions(board: Board) -> dict[str, tuple[str, str]]:
    """Heading and caption of every figure, by name."""
    number = len(complete_tasks(board))
    over = "one task" if number == 1 else f"the {number} complete tasks"
    return {
        "board_accuracy": (
            "Accuracy against prompts kept",
            f"Means over {over}; bars and bands (with several seeds) are one sample"
            " standard deviation of the averages of single seeds. Markers of a ratio"
            " are set apart to be seen. The dotted line is what was published of"
            f" {published.METHODS['deep']} on the same tasks.",
        ),
        "board_tasks": (
            "Every task",
            "Mean test accuracies of ours and what was published of"
            f" {published.METHODS['deep']}, and how many points ours are above that."
            " Bars are one sample standard deviation over seeds.",
        ),
    }


def draw(board: Board, lines: list[Line]) -> dict[str, str]:
    """Draws the figures whose data are there: SVG elements by name."""
    drawings = {"board_accuracy": _accuracy, "board_tasks": _tasks}
    given = {"board": board, "lines": lines}
    return figures.render(
        {name: functools.partial(f, **given) for name, f in drawings.items()}
    )


def _deep(lines: list[Line]) -> list[Line]:
    name = published.METHODS["deep"]
    return [line for line in lines if not line["ours"] and line["method"] == name]


def _accuracy(figure: Any, board: Board, lines: list[Line]) -> bool:
    """The report's figure, of averages over the complete tasks."""
    keys = [average.key for average in averages(board)]
    key = "mean_complete" if "mean_complete" in keys else "mean_tasks"
    default = default_score(board)
    groups: list[Row] = []
    for line in lines:
        value = line["averages"].get(key)
        if value and line["ours"] and line["score"] in (None, default, "random"):
            deviation = None if value["sd"] is None else value["sd"] / 100
            accuracy = {"test_accuracy": value["mean"] / 100, "test_sd": deviation}
            groups.append(line | accuracy)
    report = {"importance": {"score": default}}
    if not groups or not figures.draw_accuracy(figure, groups, report):
        return False
    for line in _deep(lines):
        if not (value := line["averages"].get(key)):
            continue
        mean = value["mean"]
        for number, axes in enumerate(figure.axes):
            low, high = axes.get_ylim()
            if number and not low < mean < high:
                continue  # a close-up stays close
            look = {"color": PUBLISHED["color"], "linestyle": ":", "linewidth": 1.8}
            axes.axhline(mean, label=f"{line['method']}, published", **look)
            margin = 0.05 * (high - low)
            low = min(low, mean - margin)
            axes.set_ylim(low, max(high, mean + margin))
    return True


def _tasks(figure: Any, board: Board, lines: list[Line]) -> bool:
    """A dot per task and method; beside it, how far ours are from VPT-Deep."""
    names = task_names(board)
    looks = _looks(board, lines)
    if not looks:
        return False
    deep = _deep(lines)
    figure.set_size_inches(9.2, 1.4 + 0.29 * len(names))
    all_axes = figure.subplots(1, 1 + len(deep), sharey=True, squeeze=False)[0]
    zero = dict.fromkeys(names, 0.0)
    _dots(all_axes[0], looks + [(line, PUBLISHED) for line in deep], names, zero)
    all_axes[0].set_xlabel("Test accuracy (%)")
    for axes, line in zip(all_axes[1:], deep, strict=True):
        near = [(other, look) for other, look in looks if kind(other) != "linear"]
        base = {name: value["mean"] for name, value in line["tasks"].items()}
        _dots(axes, near, names, base)
        axes.axvline(0, color=PUBLISHED["color"], linewidth=1.2)
        axes.set_xlabel(f"Points above published {line['method']}")
    all_axes[0].set_yticks(range(len(names)), names)
    all_axes[0].set_ylim(len(names) - 0.5, -0.5)
    return True


def _looks(board: Board, lines: list[Line]) -> list[tuple[Line, dict[str, Any]]]:
    """What is shown of ours, and how: references, the largest and smallest ratio."""
    ours = [line for line in main_lines(board, lines) if line["ours"]]
    cuts = [line for line in ours if kind(line) == "global"]
    looks = {
        "linear": {"marker": "|", "color": "black", "markersize": 8},
        "tune": {"marker": "o", "color": "black", "markersize": 5.5},
    }
    shown = [(line, looks[kind(line)]) for line in ours if kind(line) in looks]
    colours = (KINDS["global"][0], "#56B4E9")
    for line, colour in zip(cuts[:1] + cuts[1:][-1:], colours, strict=False):
        shown.append((line, {"marker": "o", "color": colour, "markersize": 5}))
    return shown


def _dots(
    axes: Any,
    shown: list[tuple[Line, dict[str, Any]]],
    names: list[str],
    base: dict[str, float],
) -> None:
    """The accuracies minus those of `base`; methods of a task are set apart."""
    axes.grid(axis="x", color=figures.STYLE["grid.color"])
    offsets = np.linspace(-0.27, 0.27, len(shown)) if len(shown) > 1 else [0.0]
    for (line, look), offset in zip(shown, offsets, strict=True):
        kept = [n for n in names if n in line["tasks"] and n in base]
        means = np.array([line["tasks"][name]["mean"] - base[name] for name in kept])
        spreads = np.array([line["tasks"][name]["sd"] or 0.0 for name in kept])
        heights = np.array([names.index(name) for name in kept]) + offset
        name = line["method"] if line["ours"] else f"{line['method']}, published"
        axes.plot(means, heights, linestyle="", label=name, **look)
        if np.any(spreads):
            low, high = means - spreads, means + spreads
            axes.hlines(heights, low, high, color=look["color"], linewidth=1)
