# SPDX-License-Identifier: Apache-2.0
"""What a benchmark's config has beside a run's, checked; see `protocol.py`.

`vpt` is what the configs of VTAB-1k, FGVC and Swin share: VPT's protocol.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

from vpt_jax.files.messages import did_you_mean, expect
from vpt_jax.prompts import check_choice
from vpt_jax.run import config as configs
from vpt_jax.run import parsing

PROBE_DECAY = 0.01  # of a regularised probe that has no val to choose it on
MODES = ("sweep", "published", "search")
# A task's name is a folder's too.
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,99}", re.ASCII)
# Keys of `tune` that may be None, and what they are otherwise.
_OWN = {"base_lr": (int, float), "weight_decay": (int, float), "batch_size": (int,)}
# Keys of a run that the protocol fills in.
_FILLED = {"task": ("name", "splits"), "linear": tuple(_OWN), "finetune": tuple(_OWN)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Which rates and decays are tried, and what follows.

    `rates` are base rates (times batch / 256). `num_prompts` are numbers of prompts per
    layer to try too; empty: each task's own. Fine-tuning has `finetune_rate` times the
    rate of the task. `final_splits` is what the last runs train and report on.
    In mode `search`, `shares` are the lengths of the trials as shares of a whole
    training: all rates at the first, with a head from each of `head_inits`; at the next
    the better half of the rates of each.
    """

    name: str
    mode: str
    rates: tuple[float, ...]
    decays: tuple[float, ...]
    num_prompts: tuple[int, ...] = ()
    finetune_rate: float = 0.1
    final_splits: str = "final"
    shares: tuple[float, ...] = ()
    head_inits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        check_choice("final_splits", self.final_splits, ("final", "all"))
        configs.positive(finetune_rate=self.finetune_rate)
        for init in self.head_inits:
            check_choice("head_inits", init, configs.HEAD_INITS)
        published, searched = self.mode == "published", self.mode == "search"
        some, none = (f"{n} in mode {self.mode!r}" for n in ("at least one", "none"))
        if searched:
            none = some
        for name, right, expected in (
            ("rates", self.rates or published, some),
            ("decays", self.decays or published, some),
            ("shares", bool(self.shares) == searched, none),
            ("head_inits", bool(self.head_inits) == searched, none),
            ("num_prompts", not (published and self.num_prompts), none),
            (
                "rates",
                all(0 < x < math.inf for x in self.rates),
                "each above 0, finite",
            ),
            ("decays", all(0 <= x < math.inf for x in self.decays), "each 0 to finite"),
            ("num_prompts", all(n > 0 for n in self.num_prompts), "each 1 or more"),
            ("shares", all(0 < s <= 1 for s in self.shares), "each in (0, 1]"),
            *((n, _once(getattr(self, n)), "each value once") for n in _TRIED),
        ):
            expect(right, name, getattr(self, name), expected)


# As the runs' folders are called: two that print alike would be one run.
_TRIED = ("rates", "decays", "num_prompts", "head_inits")


def _once(values: Sequence[Any]) -> bool:
    printed = {x if isinstance(x, str) else f"{x:g}" for x in values}
    return len(printed) == len(values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How a run finds its rate, if `tune.base_lr` is None; see `search.py`.

    `rates` are tried, with a head from each of `head_inits`, for the first of `shares`
    of a whole training, and the better half of each start's for the next. The rate of
    fine-tuning is `finetune_rate` times the chosen one.
    """

    rates: tuple[float, ...] = (0.01, 0.03)
    head_inits: tuple[str, ...] = ("zeros", "probe")
    shares: tuple[float, ...] = (0.17, 0.65)
    finetune_rate: float = 1.0

    def settings(self, decay: float) -> BenchmarkConfig:
        """The benchmark of one task that the search is."""
        return BenchmarkConfig(
            name="search",
            mode="search",
            rates=self.rates,
            decays=(decay,),
            finetune_rate=self.finetune_rate,
            final_splits="all",
            shares=self.shares,
            head_inits=self.head_inits,
        )

    def __post_init__(self) -> None:
        self.settings(0.0)  # checks


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


def complete(values: ConfigDict) -> None:
    """As `parsing.complete`, for the config of a run or of a benchmark."""
    if "benchmark" not in values:
        parsing.complete(values)
        tune: Any = values.tune
        if isinstance(tune, ConfigDict) and tune.base_lr is None:
            values.search = values.get("search", ConfigDict())
        found: Any = values.get("search")
        if isinstance(found, ConfigDict):
            parsing.complete(found, SearchConfig)
        return
    if "diverged" not in values:  # as in VPT's sweeps
        values.diverged = "last_finite"
    filled: list[tuple[ConfigDict, str]] = []
    for name in ("benchmark", *parsing.GROUPS):
        values[name] = values.get(name, ConfigDict())
        group: Any = values[name]
        if not isinstance(group, ConfigDict):  # `parse` says what it is
            continue
        # None, whatever the default of a run is: each task's own.
        for key in {"prompts": ("num_prompts",), "tune": _OWN}.get(name, ()):
            if key not in group:
                group[key] = config_dict.placeholder(_OWN.get(key, (object,))[-1])
        filled += [(group, key) for key in _FILLED.get(name, ()) if key not in group]
    if isinstance(values.benchmark, ConfigDict):
        parsing.complete(values.benchmark, BenchmarkConfig)
    parsing.complete(values)
    for group, key in filled:
        del group[key]
    tasks = values.get("tasks")
    for own in tasks.values() if isinstance(tasks, ConfigDict) else ():
        if isinstance(own, ConfigDict):
            parsing.complete(own, OwnConfig)


def words(
    arg: str, tasks: Sequence[str], known: Sequence[str]
) -> tuple[list[str], set[str]]:
    """Names of tasks, and other words, of a config file's argument `task=NAME,smoke`.

    Raises:
      ValueError: For what is not among `tasks` or `known`; names the nearest.
    """
    names: list[str] = []
    found: set[str] = set()
    for word in filter(None, arg.split(",")):
        key, _, value = word.partition("=")
        if word in known:
            found.add(word)
        elif key == "task" and value in tasks:
            names.append(value)
        else:
            near = did_you_mean(word, [*known, *(f"task={name}" for name in tasks)])
            raise ValueError(
                f"unknown argument {word!r}; {near}use task=NAME, {', '.join(known)};"
                f" tasks are {', '.join(tasks)}."
            )
    return names, found


def vpt(name: str, mode: str, tasks: Mapping[str, Mapping[str, Any]]) -> ConfigDict:
    """VPT's protocol, which the configs of VTAB-1k, FGVC and Swin share.

    A grid of base rates (times batch_size / 256) and decays, 100 epochs of SGD, five
    seeds with the best pair; in mode published the pairs come from the `tasks`.
    """
    c: Any = ConfigDict()
    c.benchmark = ConfigDict(
        {
            "name": name,
            "mode": mode,
            "rates": (50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05),
            "decays": (0.01, 0.001, 0.0001, 0.0),
        }
    )
    c.tasks = ConfigDict({task: dict(own) for task, own in tasks.items()})
    complete(c)
    c.seeds = (42, 44, 82, 100, 800)
    c.backbone.update(variant="B/16", image_size=224)
    sgd = {"optimizer": "sgd", "schedule": "epoch"}
    c.tune.update(sgd, epochs=100, warmup_epochs=10)
    c.linear.update(sgd, epochs=100, warmup_epochs=10)
    # Prompts that are tuned already need fewer epochs, and `finetune_rate` of the rate.
    c.finetune.update(sgd, epochs=20, warmup_epochs=0, head=False)
    c.condense.update(keep_ratios=(0.5, 0.3, 0.2, 0.1), scopes=("global",))
    c.eval_batch_size = 64
    return c


def recipe(c: Any) -> None:
    """Sets the recipe that finds its rate by itself; docs/real.md has what it is worth.

    AdamW with a rate per step, the same for every batch size; the head from zeros, with
    a rate of its own for features at unit scale; a regularised linear probe. Lengths
    and rate of a run are left open, see `search.py`; a benchmark's stay its own.
    """
    adam = {"optimizer": "adamw", "schedule": "step", "head_lr": 0.003}
    c.prompts.update(head_init="zeros", dropout=0.0)  # the start is searched too
    c.tune.update(adam, batch_size=32)
    c.finetune.update(adam, head=True, warmup_epochs=0)
    c.linear.update(optimizer="lbfgs", epochs=1, warmup_epochs=0)
    if "benchmark" in c:
        found = SearchConfig()
        c.benchmark.update(mode="search", rates=found.rates, decays=(0.0,))
        c.benchmark.update(shares=found.shares, head_inits=found.head_inits)
        c.benchmark.finetune_rate = found.finetune_rate
        return
    c.tune.weight_decay = 0.0
    c.finetune.update(batch_size=32, weight_decay=0.0)
    # Of the probe only the decay is used, and that where there is no val to choose it.
    c.linear.update(batch_size=32, base_lr=1.0, weight_decay=PROBE_DECAY)
    complete(c)


def shorten(c: Any, *, image_size: int) -> None:
    """A trial of the whole way: the package's small backbone, two of everything."""
    if c.benchmark.mode == "sweep":
        c.benchmark.update(rates=(2.5, 0.5), decays=(1e-4, 0.0))
    c.seeds = (42, 44)
    c.backbone.update(variant="demo/4", image_size=image_size)
    c.prompts.num_prompts = 2
    c.tune.update(epochs=2, warmup_epochs=1)
    c.linear.update(epochs=2, warmup_epochs=1)
    c.finetune.update(epochs=1, warmup_epochs=0)
    c.condense.keep_ratios = (0.3,)
    c.checkpoint_every = 1


def check_groups(plain: Mapping[str, Any], tasks: Any) -> None:
    """Raises ValueError for what `parsing.parse` cannot tell, as tasks fill it in."""
    for name, kind in parsing.GROUPS.items():
        group = plain.get(name, {})
        parsing.check_keys(kind, group, f"config.{name}.")
        for key in _FILLED.get(name, ()):
            got, filled = group.get(key), "None, which tasks and the grid fill in"
            expect(got is None, f"config.{name}.{key}", got, filled)
    right = isinstance(tasks, Mapping) and tasks
    expect(right, "config.tasks", tasks, "a group of keys, with at least one task")
    for name in tasks:
        right = isinstance(name, str) and _NAME.fullmatch(name)
        letters = "names of letters, digits, '_', '.' and '-'"
        expect(right, "config.tasks", name, letters)
    for name, kind in (("seeds", int), ("baselines", str)):
        got = plain.get(name, ())
        right = isinstance(got, tuple | list) and all(type(x) is kind for x in got)
        expect(right, f"config.{name}", got, f"tuple[{kind.__name__}, ...]")
    for key, kinds in _OWN.items():
        got = plain.get("tune", {}).get(key)
        right = type(got) in kinds and 0 <= got <= sys.float_info.max
        own = f"{kinds[-1].__name__} from 0, or None for each task's own"
        expect(got is None or right, f"config.tune.{key}", got, own)
    if plain.get("prompts", {}).get("num_prompts") is not None:
        parsing.build(configs.PromptConfig, plain["prompts"], "config.prompts.")
