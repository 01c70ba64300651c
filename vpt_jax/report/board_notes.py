# SPDX-License-Identifier: Apache-2.0
"""What a leaderboard's numbers can be compared with, in sentences."""

from collections import Counter

from vpt_jax.report import published
from vpt_jax.report.standings import Board, Line, complete_tasks, task_names

_NORMALISATIONS = {
    "half": "mean and standard deviation 0.5, as Google's weights were trained",
    "imagenet": "ImageNet's mean and standard deviation, as VPT did",
    "none": "values from 0 to 1",
}
_HOW = {
    "sweep": "swept, chosen by validation accuracy",
    "published": "those that were published, without a sweep of ours",
    "default": "the config's, without a sweep",
    "given": "one for all tasks, without a sweep",
}


def notes(board: Board, lines: list[Line]) -> list[str]:
    """Sentences on what is in, and what compares with what, the most needed first."""
    parts = _progress(board), _diverged(lines), _choice(board)
    parts += _backbone(board, lines), _averages(board, lines)
    return [sentence for part in parts for sentence in part]


def _progress(board: Board) -> list[str]:
    names, complete = task_names(board), complete_tasks(board)
    if len(complete) == len(names):
        return []
    missing = sum(task["missing"] for task in board["tasks"].values())
    empty = [name for name in names if not board["tasks"][name]["rows"]]
    text = f"Unfinished: {len(complete)} of {len(names)} tasks are complete"
    text += f", {missing:,} runs are still to come" if missing else ""
    text += f"; nothing yet of {', '.join(empty)}" if empty else ""
    text += ". An em dash is an average that lacks tasks."
    if complete:
        text += (
            " Prompts, parameters and MACs are means over the complete tasks; Seeds"
            " says how many of them a method's tasks have so far."
        )
    return [text]


def _diverged(lines: list[Line]) -> list[str]:
    runs = [
        f"{line['method']} on {run['task']}, seed {run['seed']} (epoch {run['epochs']})"
        for line in lines
        for run in line["diverged"]
    ]
    if not runs:
        return []
    shown = "; ".join(runs[:5]) + ("; ..." if len(runs) > 5 else "")
    number = "One run counts" if len(runs) == 1 else f"{len(runs)} runs count"
    return [
        f"† {number} with the last epoch before loss or prompts became infinite or NaN:"
        f" {shown}."
    ]


def _choice(board: Board) -> list[str]:
    """How learning rates were chosen: of the tasks, else of the config."""
    tasks = board["tasks"].values()
    how = Counter(str(t["chosen"]["how"]) for t in tasks if t["chosen"])
    mode = (board["config"].get("benchmark") or {}).get("mode")
    if not how and mode:
        how = Counter({mode: len(tasks)})
    if not how:
        return []
    parts = [
        _HOW.get(name, name) + (f" ({n} of {len(tasks)} tasks)" if len(how) > 1 else "")
        for name, n in sorted(how.items())
    ]
    text = f"Learning rates and weight decays are {'; '.join(parts)}."
    if board["benchmark"] == "vtab" and "sweep" in how:
        text += " Validation is VTAB-1k's: 200 pictures, trained on only afterwards."
    if set(how) == {"sweep"}:
        text += " VPT chose its own so, with the number of prompts among the choices."
    else:
        text += " VPT swept them for every task and method, which favours its rows."
    return [text]


def _backbone(board: Board, lines: list[Line]) -> list[str]:
    backbone, sentences = board["backbone"], []
    if name := backbone.get("normalisation"):
        text = f"Pictures are normalised with {_NORMALISATIONS.get(name, name)}."
        other = (
            " VPT normalised with ImageNet's, which these weights were not trained"
            " with; that alone moves accuracies."
        )
        sentences.append(text if name == "imagenet" else text + other)
    if any(not line["ours"] for line in lines):
        text = "Published rows are ViT-B/16 supervised on ImageNet-21k"
        if backbone:
            text += f"; this run has {backbone['variant']} from {backbone['name']}"
        same = not backbone or backbone["variant"] == "B/16"
        text += "." if same else ". Another model: they are no comparison."
        sentences.append(text)
    return sentences


def _averages(board: Board, lines: list[Line]) -> list[str]:
    sentences = [
        "± is the sample standard deviation over seeds: of an average, that of the"
        " averages of single seeds."
    ]
    if board["benchmark"] == "vtab":
        deep = published.METHODS["deep"]
        sentences.append(
            "Two averages of VTAB-1k are in use: over its 19 tasks and over its 3"
            f" groups ({deep}: 69.43 and 71.97). Only numbers of one column compare;"
            " those whose average our sources do not state are under As published."
        )
    elif any(line["as_published"] is not None for line in lines):
        sentences.append(
            "Numbers under As published are of other tasks or another average."
        )
    return sentences
