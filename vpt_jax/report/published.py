# SPDX-License-Identifier: Apache-2.0
"""What others published on VTAB-1k and FGVC, and how they averaged it.

All are ViT-B/16 supervised on ImageNet-21k. VPT and its baselines are known per task,
later methods by headlines: two averages of VTAB-1k are in use, about 2.5 points apart,
so a headline is compared with ours only where its average is known.
"""

from typing import NamedTuple

from vpt_jax.data.public.vtab import BENCHMARKS

VTAB = tuple(row.name for row in BENCHMARKS.values() if row.group != "fgvc")
FGVC = tuple(row.name for row in BENCHMARKS.values() if row.group == "fgvc")
WHOLE = {"vtab": VTAB, "fgvc": FGVC}
DEPTH = 12  # layers of ViT-B/16

METHODS = {
    "full": "Full fine-tuning (VPT)",
    "linear": "Linear probe (VPT)",
    "shallow": "VPT-Shallow",
    "deep": "VPT-Deep",
}
SOURCE = "VPT, ECCV 2022, as V-PETL Bench lists it"
PER_TASK = "per task, averaged here"


class Mean(NamedTuple):
    """A published average in %, and what it is the mean of."""

    value: float
    convention: str  # in words
    average: str  # the column that it is comparable with; '' if that is not known


class Headline(NamedTuple):
    """A method of which only averages are known."""

    name: str
    source: str
    vtab: Mean
    fgvc: Mean | None = None
    tuned_percent: float | None = None  # on VTAB-1k


_UNKNOWN = "which average is not stated by our source"
_CODE = "as its get_results.ipynb computes it"
_FIVE = "mean over 5 tasks"

HEADLINES = (
    Headline(
        "E2VPT",
        "ICCV 2023; wizwand.com",
        Mean(73.94, "mean over 3 groups, second-hand", "mean_groups"),
        Mean(89.22, _FIVE, "mean_tasks"),
        tuned_percent=0.32,
    ),
    Headline(
        "Adapter+ (no prompts)",
        "CVPR 2024; sciencestack.ai, visinf/adapter_plus",
        Mean(77.6, f"mean over 3 groups, {_CODE}", "mean_groups"),
        Mean(90.7, f"{_FIVE}, {_CODE}", "mean_tasks"),
    ),
    Headline(
        "VFPT",
        "NeurIPS 2024; abstract of arXiv 2411.01327",
        Mean(73.20, _UNKNOWN, ""),
        tuned_percent=0.57,
    ),
    Headline(
        "DA-VPT",
        "CVPR 2025; wizwand.com",
        Mean(76.14, _UNKNOWN, ""),
        Mean(91.94, f"{_FIVE}; the variant DA-VPT+", "mean_tasks"),
    ),
    Headline(
        "PRO-VPT",
        "ICCV 2025; sciencestack.ai",
        Mean(78.0, f"{_UNKNOWN}; 1.6 above its own run of VPT-Deep", ""),
        Mean(91.7, f"{_FIVE}; 2.0 above its own run of VPT-Deep", "mean_tasks"),
    ),
    Headline(
        "VAPT",
        "ICLR 2026; abstract of arXiv 2501.18936",
        Mean(72.91, "stated as 7.34 above full fine-tuning, if that is 65.57", ""),
        Mean(89.58, "stated as 1.04 above full fine-tuning, if that is 88.54", ""),
    ),
)
