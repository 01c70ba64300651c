# SPDX-License-Identifier: Apache-2.0
"""What is looked at rather than read: answers, mistakes, attention to prompts."""

import base64
import functools
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from vpt_jax.report import figures, page


def html(looks: Mapping[str, Any], classes: Sequence[str]) -> str:
    """Sections of a report on its `looks`, see `run.looks`; empty without any."""
    if not looks:
        return ""
    where = {"test": "the test set", "val": "the validation set"}[looks["split"]]
    right = f"{100 * looks['accuracy']:.1f}"
    parts = [
        f"<h2>What the best model answers</h2><p>Of the models above the one that was"
        f" best on val: {right} % right on {where}.</p>"
    ]
    if looks["confused"]:
        pairs = (
            f"{label} taken for {answer}: {n}" for label, answer, n in looks["confused"]
        )
        parts.append(page.bullets([f"Most frequent mistakes: {'; '.join(pairs)}."]))
    if looks["confusion"]:
        functions = {"confusion": lambda f: _draw(f, looks["confusion"], classes)}
        parts.append(figures.html(functions, _CAPTIONS))
    if looks["examples"]:
        parts.append(_pictures(looks["examples"]))
    return "".join(parts)


def pictures(looks: Mapping[str, Any], classes: Sequence[str]) -> dict[str, np.ndarray]:
    """The same for TensorBoard, by name: uint8 `[h, w, 3]`; empty without any."""
    found = {}
    if looks.get("confusion"):
        found["confusion"] = figures.pixels(
            lambda figure: _draw(figure, looks["confusion"], classes)
        )
    for name, shown in _sections(looks.get("examples", ())).items():
        if shown:
            draw = functools.partial(_draw_examples, examples=shown)
            found[name.lower().replace(" ", "_")] = figures.pixels(draw)
    return found


def _sections(examples: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {
        "Most confident mistakes": [e for e in examples if e["label"] != e["answer"]],
        "Right answers": [e for e in examples if e["label"] == e["answer"]],
    }


def _draw_examples(figure: Any, examples: Sequence[Mapping[str, Any]]) -> None:
    """Pictures in rows of four, each beside its map of attention."""
    from PIL import Image

    figure.set_figheight(2.6 * -(-len(examples) // 4))
    grid = figure.subplots(-(-len(examples) // 4), 8, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    shares = [value for e in examples for value in np.ravel(e["attention"])]
    ends = (min(shares), max(shares)) if shares else (0.0, 1.0)
    for (left, right), example in zip(grid.reshape(-1, 2), examples, strict=False):
        left.imshow(Image.open(io.BytesIO(base64.b64decode(example["picture"]))))
        chance = f"{100 * example['probability']:.0f} %"
        said = f"{example['answer']}, {chance}"
        if example["answer"] != example["label"]:
            said += f"\nbut is {example['label']}"
        left.set_title(said, fontsize=8, loc="left")
        if example["attention"]:
            right.imshow(example["attention"], "inferno", vmin=ends[0], vmax=ends[1])


_CAPTIONS = {
    "confusion": (
        "Confusion matrix",
        "A row is the class of a picture, a column the answer; the number of pictures."
        " What is off the diagonal is wrong.",
    )
}


def _draw(figure: Any, confusion: Any, classes: Sequence[str]) -> bool:
    counts = np.asarray(confusion)
    size = len(counts)
    figure.set_figheight(min(0.85 * figure.get_figwidth(), 2 + 0.42 * size))
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    names = [name if len(name) < 15 else f"{name[:13]}…" for name in classes]
    axes.set_xticks(range(size), names, rotation=90 if size > 4 else 0)
    axes.set_yticks(range(size), names)
    axes.set(xlabel="Answer", ylabel="Class")
    axes.grid(False)
    if size <= 20:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                ink = "white" if shares[i, j] > 0.5 else "black"
                look = {"ha": "center", "va": "center", "color": ink, "fontsize": 8}
                axes.text(j, i, str(count), **look)
    return True


def _pictures(examples: Sequence[Mapping[str, Any]]) -> str:
    """Cards of pictures: the mistakes, then right answers."""
    shares = [value for e in examples for value in np.ravel(e["attention"])]
    ends = (min(shares), max(shares)) if shares else (0.0, 1.0)
    parts = []
    for heading, shown in _sections(examples).items():
        if shown:
            cards = "".join(_card(example, ends) for example in shown)
            parts.append(f'<h2>{heading}</h2><div class="cards">{cards}</div>')
    if shares:
        parts.append(
            '<p class="soft">The second picture of each pair shows which regions attend'
            " to prompts: the share of a patch’s attention, mean over layers and heads,"
            f" from {100 * ends[0]:.0f} % (dark) to {100 * ends[1]:.0f} % (bright).</p>"
        )
    return f"<section>{''.join(parts)}</section>"


def _card(example: Mapping[str, Any], ends: tuple[float, float]) -> str:
    answer, label = escape(example["answer"]), escape(example["label"])
    wrong = f"<br>but is {label}" if example["answer"] != example["label"] else ""
    source = f"data:image/jpeg;base64,{example['picture']}"
    shown = f'<img src="{source}" alt="{label}">'
    if example["attention"]:
        shown += f'<img src="{_map(example["attention"], *ends)}" alt="attention">'
    chance = f"{100 * example['probability']:.0f}&nbsp;%"
    return (
        f'<figure class="card">{shown}<figcaption>Answer {answer}, {chance}{wrong}'
        "</figcaption></figure>"
    )


def _map(shares: Any, least: float, most: float) -> str:
    """A PNG of a map, a pixel a patch; the page enlarges it."""
    from matplotlib import colormaps
    from PIL import Image

    shares = (np.asarray(shares) - least) / ((most - least) or 1)
    colours = colormaps["inferno"](shares, bytes=True)
    with io.BytesIO() as file:
        Image.fromarray(colours[..., :3]).save(file, "PNG")
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
