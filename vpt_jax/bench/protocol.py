# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' protocol: which runs there are, and what is made of their results.

In mode `sweep`, every task's rate and decay are chosen as VPT's are: a training per
pair of a grid, on the smaller training set, judged on the validation set after its last
epoch; then every seed trains with the chosen pair and is tested once. In mode
`published`, the pairs come from the config. In mode `search`, many short trainings and
few longer ones find the rate (successive halving, Jamieson and Talwalkar, AISTATS
2016). All is pure: results in any order, from any machine, give one board.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vpt_jax.bench.benchmark_config import (
    PROBE_DECAY,
    BenchmarkConfig,
    OwnConfig,
    check_groups,
)
from vpt_jax.data.public.vtab import BENCHMARKS
from vpt_jax.files.messages import expect
from vpt_jax.run import config as configs
from vpt_jax.run import parsing

TRIALS = ("linear", "grid")  # kinds of jobs, besides "final"
GRID_SEED = 0  # the reference seeds the last runs only; ours are all reproducible
Results = Mapping[str, Mapping[str, Any]]  # name of a finished job to its result


class Benchmark(NamedTuple):
    """A checked benchmark; `base` lacks what each task fills in.

    `trials` are the runs that need no others' results, by task and kind.
    """

    settings: BenchmarkConfig
    tasks: dict[str, OwnConfig]
    seeds: tuple[int, ...]
    base: dict[str, Any]
    trials: dict[str, dict[str, tuple["Job", ...]]]


class Job(NamedTuple):
    """One run: `name` is also its folder, `kind` one of `TRIALS` or "final"."""

    name: str
    kind: str
    config: configs.Config

    @property
    def task(self) -> str:
        """The task's name."""
        return self.config.task.name


def parse(values: ConfigDict | Mapping[str, Any]) -> Benchmark:
    """Checks a benchmark's config: `benchmark`, `tasks`, and a run's keys.

    In the latter, `prompts.num_prompts`, `tune.base_lr`, `tune.weight_decay` and
    `tune.batch_size` may be None: each task's own, and the reference's batch size.

    Raises:
      ValueError: If a key is wrong, of the benchmark or of any task's runs.
    """
    plain = parsing.plain_dict(values)
    if "benchmark" not in plain:
        raise ValueError("config key config.benchmark is missing; set it.")
    settings = parsing.build(
        BenchmarkConfig, plain.pop("benchmark"), "config.benchmark."
    )
    tasks = plain.pop("tasks", {})
    check_groups(plain, tasks)
    # A ConfigDict sorts by name.
    order = [name for name in BENCHMARKS if name in tasks]
    order += [name for name in tasks if name not in BENCHMARKS]
    own = {n: parsing.build(OwnConfig, tasks[n], f"config.tasks.{n}.") for n in order}
    for key, instead in (("base_lr", "rates"), ("weight_decay", "decays")):
        got = plain.get("tune", {}).get(key)
        right = got is None or settings.mode == "published"
        none = f"None in mode {settings.mode!r}, which chooses of benchmark.{instead}"
        expect(right, f"config.tune.{key}", got, none)
    seeds = tuple(plain.get("seeds", ()))
    configs.check_seeds("config.seeds", seeds)
    return make(settings, own, seeds, plain)


def make(
    settings: BenchmarkConfig,
    own: dict[str, OwnConfig],
    seeds: tuple[int, ...],
    base: dict[str, Any],
) -> Benchmark:
    """The benchmark of checked parts; what cannot work fails now, not after a task."""
    bench = Benchmark(settings, own, seeds, base, {})
    for task in own:
        bench.trials[task] = {kind: _trials(bench, task, kind) for kind in TRIALS}
    planned(bench)
    return bench


def choices(bench: Benchmark, task: str) -> list[dict[str, Any]]:
    """The values that are tried for a task: the order breaks exact ties.

    The reference takes the strictly smaller rate on a tie. We go on where it leaves
    the order to the file system: fewer prompts, smaller rate, smaller decay.
    """
    settings, own, base = bench.settings, bench.tasks[task], bench.base
    fixed = base.get("prompts", {}).get("num_prompts")
    counts = sorted(settings.num_prompts)
    counts = counts or [own.num_prompts if fixed is None else fixed]
    tune = base.get("tune", {})
    rates, decays = sorted(settings.rates), sorted(settings.decays)
    if settings.mode == "published":
        given = tune.get("base_lr"), tune.get("weight_decay")
        rates = [own.base_lr if given[0] is None else given[0]]
        decays = [own.weight_decay if given[1] is None else given[1]]
    starts = [{"head_init": start} for start in settings.head_inits] or [{}]
    found = []
    for count, rate, decay, start in itertools.product(counts, rates, decays, starts):
        values = {"num_prompts": count, "base_lr": rate, "weight_decay": decay}
        most = count if isinstance(count, int) else max(count)
        size = tune.get("batch_size")
        if size is None:  # the reference's
            size = 64 if most >= 100 else 128
        found.append({**values, "batch_size": size, **start})
    return found


def jobs(bench: Benchmark, results: Results) -> Iterator[Job]:
    """All runs that can be named now, task by task; the last ones need a grid's end."""
    for task in bench.tasks:
        trials = [job for kind in TRIALS for job in _named(bench, task, kind, results)]
        yield from trials
        # Mode `search`: the last rung is known; it may have results or not.
        rung = list(rungs(bench, task, results))
        ended = len(rung) == len(bench.settings.shares)
        if ended and all(job.name in results for job in trials):
            best, probe = (chosen(bench, task, k, results) for k in ("grid", "linear"))
            yield from _final(bench, task, best, probe)


def single(bench: Benchmark, task: str, best: Mapping[str, Any]) -> configs.Config:
    """The config of one run of all seeds with values of `choices`.

    It stops where training diverges, if its config says so.
    """
    splits = bench.base.get("task", {}).get("splits") or bench.settings.final_splits
    config = _config(bench, task, best, best, splits, bench.seeds)
    return dataclasses.replace(config, diverged=bench.base.get("diverged", "error"))


def planned(bench: Benchmark) -> list[Job]:
    """All runs there will be; the configs of last ones are not final before a grid."""
    found = []
    for task in bench.tasks:
        first = choices(bench, task)[0]
        for kind in TRIALS:
            found += bench.trials[task][kind]
        if bench.settings.mode == "search":
            rung = rungs(bench, task, {}, all_of=True)
            found += {job.name: job for jobs in rung for job in jobs}.values()
        found += _final(bench, task, first, first)
    return found


def chosen(bench: Benchmark, task: str, kind: str, results: Results) -> dict[str, Any]:
    """As `choices`, the best of a task, with `how` it was found and its `val_accuracy`.

    The highest validation accuracy after the last epoch, of a run that diverged after
    its last finite one. See `choices` for ties.
    """
    tried = choices(bench, task)
    if kind == "linear" and bench.settings.mode == "search":
        return _chosen_probe(bench, task, results)
    if not _named(bench, task, kind, {}):
        how = bench.tasks[task].how if kind == "grid" else "default"
        tune = bench.base.get("tune", {})
        if tune.get("base_lr") is not None or tune.get("weight_decay") is not None:
            how = "given"
        return {**tried[0], "how": how, "val_accuracy": None}
    rows = grid(bench, task, kind, results)
    if bench.settings.mode == "search":  # of the longest trials
        longest = rows[-1]["planned_epochs"]
        rows = [row for row in rows if row["planned_epochs"] == longest]
    # max keeps the first of equals, and choices are in the order of preference. A run
    # that was never finite has learnt nothing: the reference skips it.
    best = max(rows, key=lambda row: (row["epochs"] > 0, row["val_accuracy"]))
    return {key: best[key] for key in tried[0]} | {
        "how": bench.settings.mode,
        "val_accuracy": best["val_accuracy"],
    }


def grid(
    bench: Benchmark, task: str, kind: str, results: Results
) -> list[dict[str, Any]]:
    """What was tried for a task, each with its validation accuracy and epochs."""
    found = []
    for job in _named(bench, task, kind, results):
        if job.name not in results:
            continue
        row = results[job.name]["rows"][0]
        stage = getattr(job.config, "tune" if kind == "grid" else "linear")
        start = {"head_init": job.config.prompts.head_init}
        values = {
            "num_prompts": job.config.prompts.num_prompts,
            "base_lr": stage.base_lr,
            "weight_decay": stage.weight_decay,
            "batch_size": stage.batch_size,
            "val_accuracy": row["val_accuracy"],
            "epochs": row.get("epochs", stage.epochs),
            "planned_epochs": stage.epochs,
        }
        found.append(start | values if bench.settings.mode == "search" else values)
    return found


def board(bench: Benchmark, results: Results) -> dict[str, dict[str, Any]]:
    """What a leaderboard shows of every task; see `leaderboard.py`."""
    shown = {}
    for task in bench.tasks:
        own = bench._replace(tasks={task: bench.tasks[task]})
        final = [job for job in jobs(own, results) if job.kind == "final"]
        rows = [r for job in final for r in results.get(job.name, {}).get("rows", ())]
        missing = sum(job.name not in results for job in planned(own))
        known = BENCHMARKS.get(task)
        shown[task] = {
            "group": known.group if known else "other",
            "classes": known.classes if known else None,
            "chosen": chosen(bench, task, "grid", results) if final else None,
            "chosen_linear": chosen(bench, task, "linear", results) if final else None,
            "grid": grid(bench, task, "grid", results),
            "rows": [
                {k: v for k, v in r.items() if not k.startswith("latency_")}
                for r in rows
            ],
            "missing": missing,
        }
    return shown


def rungs(
    bench: Benchmark, task: str, results: Results, *, all_of: bool = False
) -> Iterator[list[Job]]:
    """The trials of mode `search`, shortest first; a rung when the one before ended.

    Each next rung has the better half of every start of the head, by validation
    accuracy; of equals, the smaller rate. Starts are not played against each other in
    short trainings: a head from the probe leads there and is often overtaken. With
    `all_of`, rungs that are not known yet too, as if the smallest were best.
    """
    left = choices(bench, task)
    for share in bench.settings.shares:
        rung = [_short(bench, task, choice, share) for choice in left]
        yield rung
        known = all(job.name in results for job in rung)
        if not known and not all_of:
            return
        order = list(range(len(left)))
        if known:
            order.sort(key=lambda i: -results[rung[i].name]["rows"][0]["val_accuracy"])
        kept = []
        for start in bench.settings.head_inits:
            own = [i for i in order if left[i]["head_init"] == start]
            kept += own[: math.ceil(len(own) / 2)]
        left = [left[i] for i in sorted(kept)]


def _short(bench: Benchmark, task: str, choice: Mapping[str, Any], share: float) -> Job:
    """A trial of a share of the epochs, warm-up and fall of the rate included."""
    config = _config(bench, task, choice, choice, "select", (GRID_SEED,))
    tune = config.tune
    epochs = max(1, int(share * tune.epochs + 1e-9))
    warmup = tune.warmup_epochs * epochs / tune.epochs
    tune = dataclasses.replace(tune, epochs=epochs, warmup_epochs=warmup)
    name = f"{task}/search-{epochs}epochs-lr{choice['base_lr']:g}"
    name += f"-{choice['head_init']}"
    if len(bench.settings.decays) > 1:
        name += f"-wd{choice['weight_decay']:g}"
    return Job(name, "grid", dataclasses.replace(config, tune=tune))


def _chosen_probe(bench: Benchmark, task: str, results: Results) -> dict[str, Any]:
    """The regularised probe's decay, which it chose itself; the rate is unused."""
    first = choices(bench, task)[0]
    for job in bench.trials[task]["linear"]:
        if job.name in results:
            row = results[job.name]["rows"][0]
            how = {"how": "search", "val_accuracy": row["val_accuracy"]}
            return {**first, "weight_decay": row["decay"], **how}
    return {**first, "how": "default", "val_accuracy": None}


def _named(bench: Benchmark, task: str, kind: str, results: Results) -> tuple[Job, ...]:
    """The trials of a kind that can be named now."""
    if kind == "grid" and bench.settings.mode == "search":
        found = rungs(bench, task, results)
        # Of very few epochs the next rung is as long as the one before: its trials.
        return tuple({job.name: job for rung in found for job in rung}.values())
    return bench.trials[task][kind]


def _trials(bench: Benchmark, task: str, kind: str) -> tuple[Job, ...]:
    """The runs among which rate and decay of the prompts, or of the probe, are chosen.

    They never see the test set. The linear probe has a grid of its own, as published.
    In mode `search` it chooses its decay itself, here only where the last runs have no
    val to do so; the trials of the prompts are `rungs`.
    """
    mode, probe = bench.settings.mode, kind == "linear"
    unwanted = probe and "linear" not in bench.base.get("baselines", ())
    if mode == "published" or unwanted:
        return ()
    tried = choices(bench, task)
    if mode == "search":
        asked = probe and bench.settings.final_splits != "all"
        tried = tried[:1] if asked else []
    found = {}
    for choice in tried:
        name = f"{task}/{kind}"
        if not probe:
            counts = choice["num_prompts"]
            counts = [counts] if isinstance(counts, int) else counts
            name += f"-{'+'.join(map(str, counts))}prompts"
        if mode != "search":
            name += f"-lr{choice['base_lr']:g}-wd{choice['weight_decay']:g}"
        config = _config(bench, task, choice, choice, "select", (GRID_SEED,))
        # The probe has no prompts: other counts would be the same run again.
        found.setdefault(name, Job(name, kind, config))
    return tuple(found.values())


def _final(
    bench: Benchmark, task: str, best: Mapping[str, Any], linear: Mapping[str, Any]
) -> list[Job]:
    found = []
    for seed in bench.seeds:
        splits = bench.settings.final_splits
        config = _config(bench, task, best, linear, splits, (seed,))
        found.append(Job(f"{task}/final-seed{seed}", "final", config))
    return found


def _config(
    bench: Benchmark,
    task: str,
    best: Mapping[str, Any],
    linear: Mapping[str, Any],
    splits: str,
    seeds: tuple[int, ...],
) -> configs.Config:
    """A run's config: the base with a task, its prompts, rates and decays filled in."""
    base = bench.base
    values = dict(base)
    values["task"] = {**base.get("task", {}), "name": task, "splits": splits}
    values["prompts"] = {**base.get("prompts", {}), "num_prompts": best["num_prompts"]}
    values["tune"] = _stage(base, "tune", best)
    values["linear"] = _stage(base, "linear", linear)
    less = bench.settings.finetune_rate
    values["finetune"] = _stage(base, "finetune", best, less)
    if bench.settings.mode == "search":
        values["prompts"]["head_init"] = best["head_init"]
        for name in ("linear", "finetune"):  # what a config gives stands
            values[name] |= {k: v for k, v in base[name].items() if v is not None}
        found = linear.get("how") == "search" and splits == "final"
        if found or not values["linear"]["weight_decay"]:
            decay = linear["weight_decay"] if found else PROBE_DECAY
            values["linear"]["weight_decay"] = decay
    values |= {"seeds": seeds, "diverged": base.get("diverged", "last_finite")}
    if splits == "select":
        values["condense"] = {**base.get("condense", {}), "keep_ratios": ()}
        values["baselines"] = ()
    return parsing.parse(values)


def _stage(
    base: Mapping[str, Any], name: str, best: Mapping[str, Any], factor: float = 1.0
) -> dict[str, Any]:
    """A stage's values with the chosen rate, times a factor, decay and batch size."""
    filled = {
        "base_lr": factor * best["base_lr"],
        "weight_decay": best["weight_decay"],
        "batch_size": best["batch_size"],
    }
    return {k: v for k, v in base.get(name, {}).items() if v is not None} | filled
