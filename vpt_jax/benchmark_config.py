# SPDX-License-Identifier: Apache-2.0
"""What a benchmark's config has beside a run's, checked; see `protocol.py`."""

import dataclasses
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

from vpt_jax import config as configs
from vpt_jax.messages import shown
from vpt_jax.prompts import check_choice

MODES = ("sweep", "published")
# A task's name is a folder's too.
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,99}", re.ASCII)
# Keys of `tune` that may be None, and what they are otherwise.
_OWN = {"base_lr": (int, float), "weight_decay": (int, float), "batch_size": (int,)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Which rates and decays are tried, and what follows.

    `rates` are base rates (times batch / 256). `num_prompts` are numbers of prompts per
    layer to try too; empty: each task's own. Fine-tuning has `finetune_rate` times the
    rate of the task. `final_splits` is what the last runs train and report on.
    """

    name: str
    mode: str
    rates: tuple[float, ...]
    decays: tuple[float, ...]
    num_prompts: tuple[int, ...] = ()
    finetune_rate: float = 0.1
    final_splits: str = "final"

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        check_choice("final_splits", self.final_splits, ("final", "all"))
        configs.positive(finetune_rate=self.finetune_rate)
        for rate in self.rates:
            configs.positive(rates=rate)
        if self.mode == "published" and self.num_prompts:
            raise ValueError(
                f"num_prompts is {self.num_prompts} in mode 'published', which tries"
                " none; set prompts.num_prompts, or mode 'sweep'."
            )
        if self.mode == "sweep" and not (self.rates and self.decays):
            raise ValueError("rates or decays are empty; mode 'sweep' needs both.")
        for decay in self.decays:
            if not 0 <= decay < math.inf:
                raise ValueError(f"decays has {decay}; each must be >= 0 and finite.")
        if self.num_prompts and not min(self.num_prompts) > 0:
            raise ValueError(
                f"num_prompts is {shown(self.num_prompts)}; each must be"
                " greater than 0."
            )
        for name in ("rates", "decays", "num_prompts"):
            values = getattr(self, name)
            # As the runs' folders are called: two that print alike would be one run.
            if len({f"{value:g}" for value in values}) != len(values):
                raise ValueError(
                    f"{name} is {shown(values)}; a value is there twice (to six"
                    " digits); expected each once."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnConfig:
    """What a task has of its own: prompts per layer, rate and decay, and their source.

    `how` is `published` where rate and decay were, else `default`.
    """

    num_prompts: int | tuple[int, ...]
    base_lr: float
    weight_decay: float
    how: str = "default"

    def __post_init__(self) -> None:
        check_choice("how", self.how, ("published", "default"))
        configs.check_prompts(self.num_prompts)


def check_groups(plain: Mapping[str, Any], tasks: Any) -> None:
    """Raises ValueError for what `configs.parse` cannot tell, as tasks fill it in."""
    for name, kind in configs.GROUPS.items():
        configs.check_keys(kind, plain.get(name, {}), f"config.{name}.")
    if not isinstance(tasks, Mapping):
        got = shown(tasks)
        raise ValueError(f"config.tasks is {got}; expected a group of keys.")
    if not tasks:
        raise ValueError("config.tasks is empty; expected at least one task.")
    for name in tasks:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"config.tasks has {shown(name)}; expected names of letters,"
                " digits, '_', '.' and '-'."
            )
    for name, kind in (("seeds", int), ("baselines", str)):
        got = plain.get(name, ())
        if not isinstance(got, tuple | list) or not all(type(x) is kind for x in got):
            raise ValueError(
                f"config.{name} is {shown(got)}; expected tuple[{kind.__name__}, ...]."
            )
    tune = plain.get("tune", {})
    for key, kinds in _OWN.items():
        value = tune.get(key)
        if value is None:
            continue
        if type(value) not in kinds or not 0 <= value <= sys.float_info.max:
            raise ValueError(
                f"config.tune.{key} is {shown(value)}; expected"
                f" {kinds[-1].__name__} from 0, or None for each task's own."
            )
    if plain.get("prompts", {}).get("num_prompts") is not None:
        configs.build(configs.PromptConfig, plain["prompts"], "config.prompts.")
