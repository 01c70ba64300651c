# SPDX-License-Identifier: Apache-2.0
"""The rate of one run, which a benchmark of its task alone finds.

A rate that is None is chosen on the validation set by `protocol.rungs`: the trials are
jobs under `WORKDIR/runs`, so an interrupted search goes on. Lengths that are None are
chosen for the number of pictures.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vpt_jax.bench import jobs, protocol
from vpt_jax.bench.benchmark_config import OwnConfig, SearchConfig
from vpt_jax.files import workdirs
from vpt_jax.files.messages import expect
from vpt_jax.run import config as configs
from vpt_jax.run import experiment, parsing

STEPS = 300  # of AdamW: fewer are too few for a handful of pictures
EPOCHS = (12, 100)  # at least and at most


_STAGES = ("tune", "finetune")
Values = ConfigDict | Mapping[str, Any]


def wanted(values: Values) -> bool:
    """Whether a config leaves a rate or a length open."""
    plain, keys = parsing.plain_dict(values), ("base_lr", "epochs", "warmup_epochs")
    groups = [g for n in _STAGES if isinstance(g := plain.get(n), Mapping)]
    return any(group.get(key, 0) is None for group in groups for key in keys)


def choose(
    values: Values, workdir: Path
) -> tuple[configs.Config, dict[str, Any] | None]:
    """The config of a run with what was left open in it, and its `summary` if searched.

    Raises:
      ValueError: If the config or the workdir cannot work.
    """
    plain = parsing.plain_dict(values)
    settings = parsing.build(SearchConfig, plain.pop("search", {}), "config.search.")
    if not wanted(plain):
        return parsing.parse(plain), None
    fill_lengths(plain)
    rate = plain["tune"].get("base_lr")
    if rate is not None:
        if plain["finetune"].get("base_lr") is None:
            plain["finetune"]["base_lr"] = settings.finetune_rate * rate
        return parsing.parse(plain), None
    bench = benchmark_of(settings, plain)
    (task,) = bench.tasks
    check_same(bench, task, workdir)
    results = perform_trials(bench, workdir)
    found = summary(bench, task, results)
    print(found["sentence"], flush=True)
    return protocol.single(bench, task, found["chosen"]), found


def print_status(values: Values, workdir: Path) -> None:
    """Prints the units of a run, and which of them are done; touches nothing."""
    plain = parsing.plain_dict(values)
    plain.pop("search", None)
    searched = wanted(plain)
    if searched:
        print("first, trials that choose the rate on val")
        for name in _STAGES:  # which units there are does not depend on it
            some = {"base_lr": 1.0, "epochs": 1, "warmup_epochs": 0}
            plain[name] |= {k: v for k, v in some.items() if plain[name].get(k) is None}
    config = parsing.parse(plain)
    if not searched:
        experiment.check_same_config(config, workdir)
    done = 0
    for unit in (units := experiment.plan(config)):
        there = (workdir / "results" / f"{unit.name}.json").exists()
        done += there
        print(f"{'done' if there else 'left'}  {unit.name}")
    print(f"{done} of {len(units)} done in {workdir}")


def fill_lengths(plain: dict[str, Any]) -> None:
    """Epochs that are None: what `STEPS` need, within `EPOCHS`; half to fine-tune."""
    for name, kind in parsing.GROUPS.items():
        parsing.check_keys(kind, plain.setdefault(name, {}), f"config.{name}.")
    tune, finetune = plain["tune"], plain["finetune"]
    if tune.get("epochs") is None:
        backbone = parsing.build(
            configs.BackboneConfig, plain["backbone"], "config.backbone."
        )
        task = parsing.build(configs.TaskConfig, plain["task"], "config.task.")
        num = jobs.num_train(backbone, task)
        size = tune.get("batch_size")
        right = isinstance(size, int) and size > 0
        expect(right, "config.tune.batch_size", size, "int from 1")
        steps = math.ceil(num / size)
        tune["epochs"] = min(max(math.ceil(STEPS / steps), EPOCHS[0]), EPOCHS[1])
    if tune.get("warmup_epochs") is None:
        tune["warmup_epochs"] = tune["epochs"] / 10
    if finetune.get("epochs") is None:
        finetune["epochs"] = max(1, tune["epochs"] // 2)


def benchmark_of(settings: SearchConfig, plain: dict[str, Any]) -> protocol.Benchmark:
    """The benchmark of one task that a run's config describes."""
    decay = plain["tune"].pop("weight_decay", None) or 0.0
    own = OwnConfig(
        num_prompts=plain["prompts"]["num_prompts"],
        base_lr=settings.rates[0],
        weight_decay=decay,
    )
    name = plain["task"]["name"]
    seeds = tuple(plain.get("seeds", (0,)))
    return protocol.make(settings.settings(decay), {name: own}, seeds, plain)


def perform_trials(bench: protocol.Benchmark, workdir: Path) -> dict[str, Any]:
    """Results of all trials; those that are done are read."""
    results: dict[str, Any] = {}
    total = sum(job.kind == "grid" for job in protocol.planned(bench))

    def left() -> list[protocol.Job]:
        named = protocol.jobs(bench, results)
        return [j for j in named if j.kind != "final" and j.name not in results]

    while ready := left():
        for job in ready:
            prefix = f"search [{len(results) + 1}/{total}]"
            results[job.name] = jobs.perform(job, workdir, prefix)
            row, tune = results[job.name]["rows"][0], job.config.tune
            if workdirs.writes():
                print(
                    f"{prefix} rate {tune.base_lr:g}, head from"
                    f" {job.config.prompts.head_init}, {tune.epochs} epochs: val"
                    f" {100 * row['val_accuracy']:.1f} %",
                    flush=True,
                )
    return results


def summary(
    bench: protocol.Benchmark, task: str, results: Mapping[str, Any]
) -> dict[str, Any]:
    """What the report says of a search: its trials, its choice, its price."""
    best = protocol.chosen(bench, task, "grid", results)
    trials = protocol.grid(bench, task, "grid", results)
    whole = protocol.single(bench, task, best).tune.epochs
    cost = sum(row["planned_epochs"] for row in trials) / whole
    return {
        "trials": trials,
        "chosen": best,
        "cost": round(cost, 3),
        "sentence": (
            f"Rate {best['base_lr']:g} and a head from {best['head_init']} were chosen"
            f" on val by {len(trials)} short trainings, {cost:.2g} times the pictures"
            " of a whole one."
        ),
    }


def check_same(bench: protocol.Benchmark, task: str, workdir: Path) -> None:
    """Raises ValueError if the workdir is another's, whatever a search may choose."""
    found = [protocol.single(bench, task, x) for x in protocol.choices(bench, task)]
    near = min(found, key=lambda config: len(experiment.changed_keys(config, workdir)))
    experiment.check_same_config(near, workdir)
