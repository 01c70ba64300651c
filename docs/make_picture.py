# SPDX-License-Identifier: Apache-2.0
"""README's picture, from docs/real.json and README's table of times.

python docs/make_picture.py        # writes docs/first_picture.svg

docs/real.json is written by `python benchmarks/real.py --table --json=docs/real.json`.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from vpt_jax.report.figures import STYLE

HERE = Path(__file__).parent
SETS = {
    "S/14, sign_digits": ("hands, 10 classes", "#0072B2", "o"),
    "S/14, rsscn7": ("scenes, 7", "#E69F00", "s"),
    "S/14, caltech101": ("Caltech-101", "#009E73", "^"),
    "S/14, cifar100": ("CIFAR-100", "#CC79A7", "D"),
}
MODELS = "Linear probe", "PC global 10 %", "PC global 30 %", "All prompts (100 %)"
# README's table (benchmarks/prompt_cost.py): seconds a picture by prompts a layer.
PROMPTS = (0, 100, 200)
TIMES = {
    "training, prompts as tokens": ((0.147, 0.702, 1.248), "#D55E00", "--"),
    "training, here": ((0.143, 0.358, 0.398), "#0072B2", "--"),
    "inference, prompts as tokens": ((0.163, 0.233, 0.336), "#D55E00", "-"),
    "inference, here": ((0.142, 0.146, 0.158), "#0072B2", "-"),
}


def draw(figure: Figure) -> None:
    """Accuracy against prompts kept, and what a prompt costs."""
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    found = json.loads((HERE / "real.json").read_text(encoding="utf-8"))
    for name, (label, colour, marker) in SETS.items():
        values = [np.array(found[name][model]) for model in MODELS]
        mean = [v.mean() for v in values]
        error = [v.std(ddof=1) / np.sqrt(len(v)) if len(v) > 1 else 0 for v in values]
        left.errorbar(
            range(4), mean, error, color=colour, marker=marker, label=label, capsize=2
        )
    names = "linear\nprobe", "12\n(10 %)", "36\n(30 %)", "120\n(all)"
    left.set_xticks(range(4), names)
    left.set_xlabel("prompts kept, of 12 layers x 10")
    left.set_ylabel("test accuracy, %")
    left.set_ylim(0, 100)
    left.set_title("Few prompts do: DINOv2-S/14, 800 pictures", fontsize=10)
    left.legend(fontsize=8, loc="lower right", ncols=2)
    for label, (seconds, colour, style) in TIMES.items():
        right.plot(PROMPTS, seconds, style, color=colour, marker="o", label=label)
    right.set_xticks(PROMPTS)
    right.set_xlabel("prompts a layer, ViT-B/16")
    right.set_ylabel("seconds a picture, 2 CPU cores")
    right.set_ylim(0, None)
    right.set_title("A prompt is a key and a value, not a token", fontsize=10)
    right.legend(fontsize=8, handlelength=3.5)


def main() -> None:
    """Writes the picture: letters as shapes, which look the same everywhere."""
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "path"}):
        figure = Figure((9.2, 3.6), layout="constrained")
        draw(figure)
        figure.savefig(HERE / "first_picture.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
