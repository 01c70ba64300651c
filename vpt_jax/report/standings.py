# SPDX-License-Identifier: Apache-2.0
"""The lines of a leaderboard: methods, their means over tasks, and published ones.

A board is the content of leaderboard.json: the tasks of a benchmark run, each with rows
like those of a report. Everything here is a function of that dict. Accuracies of lines
are in %.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from vpt_jax.data.public.vtab import BENCHMARKS, GROUPS
from vpt_jax.models.scores import DEFAULT_SCORE
from vpt_jax.report import published
from vpt_jax.report.rows import Row, kind, label, place

Board = dict[str, Any]
Line = dict[str, Any]

OURS = "this run"


class Average(NamedTuple):
    """A column of the leaderboard: the mean of the means over each set of tasks."""

    key: str
    title: str
    sets: tuple[tuple[str, ...], ...]

    @property
    def tasks(self) -> set[str]:
        return {name for tasks in self.sets for name in tasks}


def canonical(board: Board) -> Board:
    """The same board with its keys in one order, so that equal boards write alike.

    Tasks are in the order of the benchmarks' table; others follow by name.
    """
    board = json.loads(json.dumps(board, sort_keys=True))
    tasks = board["tasks"]
    board["tasks"] = {name: tasks[name] for name in task_names(board)}
    return {k: board[k] for k in ("benchmark", "command") if k in board} | board


def task_names(board: Board) -> list[str]:
    """The tasks of a run, in the order of every table."""
    known = [*published.VTAB, *published.FGVC]

    def order(name: str) -> tuple:
        own = board["tasks"][name]["group"], name
        return (known.index(name),) if name in known else (len(known), *own)

    return sorted(board["tasks"], key=order)


def complete_tasks(board: Board) -> list[str]:
    """The tasks of which nothing is missing."""
    tasks = ((name, board["tasks"][name]) for name in task_names(board))
    return [name for name, task in tasks if task["rows"] and not task["missing"]]


def averages(board: Board) -> list[Average]:
    """The averages of a leaderboard, as columns.

    Groups if there are several; the mean over all tasks and, of the whole of VTAB-1k,
    the mean over its groups; while tasks are missing the mean over the complete ones.
    """
    names = task_names(board)
    group_of = {name: board["tasks"][name]["group"] for name in names}
    known = [group for group in GROUPS if group in group_of.values()]
    groups = known + sorted(set(group_of.values()) - set(known))
    members = {g: tuple(n for n in names if group_of[n] == g) for g in groups}
    found = []
    if len(groups) > 1:
        for group, tasks in members.items():
            title = group.capitalize()
            size = sum(row.group == group for row in BENCHMARKS.values())
            if len(tasks) < size:
                title += f" ({len(tasks)} of {size})"
            found.append(Average(group, title, (tasks,)))
    title = f"Mean over {_count(len(names), 'task')}"
    found.append(Average("mean_tasks", title, (tuple(names),)))
    if set(names) == set(published.VTAB):
        sets = tuple(members.values())
        title = f"Mean over {_count(len(sets), 'group')}"
        found.append(Average("mean_groups", title, sets))
    complete = tuple(complete_tasks(board))
    if 0 < len(complete) < len(names):
        title = f"Mean over {_count(len(complete), 'complete task')}"
        found.append(Average("mean_complete", title, (complete,)))
    return found


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def default_score(board: Board) -> str:
    """The score that goes without saying in names of methods."""
    return board["config"].get("score", {}).get("score", DEFAULT_SCORE)


def leaderboard(board: Board) -> list[Line]:
    """The lines of a leaderboard, of the content of leaderboard.json.

    Returns:
      A dict per method, ours first, in the order of a report's table: `method`,
      `source`, `ours`; `tasks` and `averages` by name, each `{mean, sd, n}` or None,
      where `n` counts seeds; `prompts`, `tuned_params`, `tuned_percent`, `macs` and
      `macs_reference`, means over the complete tasks or None; `tasks_in`,
      `seeds` (fewest, most); `diverged`, a dict per seed that stopped being finite;
      `as_published`, a number that fits under none of the averages, and `convention`.
      Ours have `stage`, `score`, `scope` and `keep_ratio` too.
    """
    default = default_score(board)
    methods: dict[tuple, dict[str, list[Row]]] = {}
    for name in task_names(board):
        for row in board["tasks"][name]["rows"]:
            by_task = methods.setdefault(place(row, default), {})
            by_task.setdefault(name, []).append(row)
    lines = [_our_line(board, methods[key], default) for key in sorted(methods)]
    return lines + _published_lines(board) + _headlines(board)


def _our_line(board: Board, by_task: dict[str, list[Row]], default: str) -> Line:
    rows_of = {
        name: {row["seed"]: row for row in sorted(rows, key=lambda row: row["seed"])}
        for name, rows in by_task.items()
    }
    accuracy = {
        name: {seed: 100 * row["test_accuracy"] for seed, row in rows.items()}
        for name, rows in rows_of.items()
    }
    first = next(iter(next(iter(rows_of.values())).values()))
    tasks = complete_tasks(board)

    def cost(value: Callable[[Row], float]) -> float | None:
        if not tasks or not set(tasks) <= rows_of.keys():
            return None
        return _mean(_mean(map(value, rows_of[name].values())) for name in tasks)

    tuned = cost(lambda row: row["tuned_params"])
    size = board["backbone"].get("parameters")
    seeds = [len(rows) for rows in rows_of.values()]
    return {
        **_line(label(first, default), OURS, ""),
        "ours": True,
        **{key: first[key] for key in ("stage", "score", "scope", "keep_ratio")},
        "tasks": {name: _over_seeds(values) for name, values in accuracy.items()},
        "averages": {a.key: _average(a, accuracy) for a in averages(board)},
        "prompts": cost(lambda row: sum(row["counts"])),
        "tuned_params": tuned,
        "tuned_percent": None if tuned is None or not size else 100 * tuned / size,
        "macs": cost(lambda row: row["macs"]),
        "macs_reference": cost(lambda row: row["macs_reference"]),
        "tasks_in": len(rows_of),
        "seeds": [min(seeds), max(seeds)],
        "diverged": [
            {"task": name, "seed": seed, "epochs": row["epochs"]}
            for name, rows in rows_of.items()
            for seed, row in rows.items()
            if diverged(row)
        ],
    }


def diverged(row: Row) -> bool:
    """Whether a row's training stopped being finite before its last epoch."""
    planned = row.get("planned_epochs")
    return planned is not None and row.get("epochs", planned) < planned


def _mean(values: Iterable[float]) -> float:
    # fsum: the mean of equal numbers is that number, in whatever order they come.
    values = list(values)
    return math.fsum(values) / len(values)


def _over_seeds(values: Mapping[int, float]) -> dict[str, Any]:
    several = len(values) > 1
    deviation = float(np.std(list(values.values()), ddof=1)) if several else None
    return {"mean": _mean(values.values()), "sd": deviation, "n": len(values)}


def _average(
    average: Average, accuracy: Mapping[str, Mapping[int, float]]
) -> dict[str, Any] | None:
    """An average of accuracies by task and seed; None unless all its tasks are in.

    Its spread is that of the averages of single seeds, of those seeds that every task
    has; its mean is that of the tasks' means over all their seeds.
    """
    if not average.tasks <= accuracy.keys():
        return None

    def mean(value: Callable[[str], float]) -> float:
        return _mean(_mean(map(value, tasks)) for tasks in average.sets)

    seeds = set.intersection(*(set(accuracy[name]) for name in average.tasks))
    per_seed = {s: mean(lambda name, s=s: accuracy[name][s]) for s in sorted(seeds)}
    deviation = _over_seeds(per_seed)["sd"] if per_seed else None
    whole = mean(lambda name: _mean(accuracy[name].values()))
    return {"mean": whole, "sd": deviation, "n": len(per_seed)}


def _published_lines(board: Board) -> list[Line]:
    """VPT and its baselines, per task; nothing where no task of the run is known."""
    names, tasks, lines = task_names(board), complete_tasks(board), []
    for method, name in published.METHODS.items():
        known = {
            name: getattr(BENCHMARKS[name].published, method)
            for name in names
            if name in BENCHMARKS
        }
        if not known:
            continue
        # A published number is a mean already; it stands for the one seed it has.
        accuracy = {task: {0: value} for task, value in known.items()}
        means = {a.key: _average(a, accuracy) for a in averages(board)}
        line = _line(name, published.SOURCE, published.PER_TASK)
        line["tasks"] = {n: _published(value) for n, value in known.items()}
        line["averages"] = {k: v and _published(v["mean"]) for k, v in means.items()}
        line["tasks_in"] = len(known)
        if method == "linear":
            line["prompts"] = 0
        if method == "deep" and tasks and set(tasks) <= known.keys():
            rows = [BENCHMARKS[task] for task in tasks]
            line["prompts"] = _mean(published.DEPTH * row.prompts for row in rows)
            line["tuned_percent"] = _mean(row.tuned_percent for row in rows)
        lines.append(line)
    return lines


def _headlines(board: Board) -> list[Line]:
    """Methods of which only averages over a whole benchmark are known."""
    benchmark, lines = board["benchmark"], []
    if benchmark not in published.WHOLE:
        return []
    whole = set(board["tasks"]) == set(published.WHOLE[benchmark])
    for row in published.HEADLINES:
        mean = row.vtab if benchmark == "vtab" else row.fgvc
        if mean is None:
            continue
        line = _line(row.name, row.source, mean.convention)
        fits = whole and mean.average
        line["averages"] = {
            a.key: _published(mean.value) if fits and a.key == mean.average else None
            for a in averages(board)
        }
        line["as_published"] = None if fits else mean.value
        if benchmark == "vtab":
            line["tuned_percent"] = row.tuned_percent
        lines.append(line)
    return lines


def _published(value: float) -> dict[str, Any]:
    return {"mean": value, "sd": None, "n": None}


def _line(method: str, source: str, convention: str) -> Line:
    numbers = ("prompts", "tuned_params", "tuned_percent", "macs", "macs_reference")
    return {
        "method": method,
        "source": source,
        "ours": False,
        "tasks": {},
        **dict.fromkeys(numbers),
        "tasks_in": None,
        "seeds": None,
        "diverged": [],
        "as_published": None,
        "convention": convention,
    }


def main_lines(board: Board, lines: list[Line]) -> list[Line]:
    """The lines that a narrow table has room for: ours without controls, VPT-Deep."""
    scores = (None, default_score(board))
    wanted = ("linear", "tune", "global")
    ours = [line for line in lines if line["ours"] and kind(line) in wanted]
    deep = published.METHODS["deep"]
    return [line for line in ours if line["score"] in scores] + [
        line for line in lines if not line["ours"] and line["method"] == deep
    ]
