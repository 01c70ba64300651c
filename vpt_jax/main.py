# SPDX-License-Identifier: Apache-2.0
r"""Tune, score, condense, fine-tune, evaluate: the whole of Prompt Condensation.

python -m vpt_jax.main --config=configs/demo.py --workdir=out/demo

A run is a list of units (`plan`), each one evaluated model. A unit is finished when its
row lies in `results/`; running the same command again skips finished units and
continues the interrupted one from its newest checkpoint, to the same end bit for bit.
In the workdir: `report.html`, `report.json`, `prompts/` (released prompts with their
head), `results/`, `scores/`, `checkpoints/`, `events/` (TensorBoard), `log.txt`.
"""

import contextlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import vpt_jax
from vpt_jax import cli, report
from vpt_jax import config as configs
from vpt_jax import workdir as files
from vpt_jax.condense import DEFAULT_REDUCTION
from vpt_jax.data.tasks import load_task
from vpt_jax.stages import Run, Unit, run_unit, scores_of


def plan(config: configs.Config) -> list[Unit]:
    """All units, in an order in which each finds what it builds on."""
    score = config.score.score
    units = []
    for seed in config.seeds:
        if "linear" in config.baselines:
            units.append(Unit("linear", seed, keep_ratio=0.0))
        units.append(Unit("tune", seed))
        for ratio in config.condense.keep_ratios:
            for scope in config.condense.scopes:
                if scope == "global":  # what fine-tuning buys is shown once
                    units.append(Unit("condense", seed, score, scope, ratio))
                units.append(Unit("finetune", seed, score, scope, ratio))
            if "random" in config.baselines and score != "random":
                units.append(Unit("finetune", seed, "random", "global", ratio))
            if "scratch" in config.baselines:
                units.append(Unit("scratch", seed, keep_ratio=ratio))
    return units


def run(config: configs.Config, workdir: Path, command: str = "") -> dict[str, Any]:
    """Runs all units that are not finished and writes the report."""
    shared = prepare(config, workdir)
    units = plan(config)
    rows, seconds = [], {}
    with contextlib.closing(shared.log):
        for number, unit in enumerate(units, start=1):
            result = run_unit(shared, unit, f"[{number}/{len(units)}]")
            rows.append(result["row"])
            seconds[unit.stage] = seconds.get(unit.stage, 0.0) + result["seconds"]
        content = make_report(shared, rows, seconds, command)
    if files.writes():
        report.write(content, workdir)
    return content


def prepare(config: configs.Config, workdir: Path) -> Run:
    """Loads and checks everything; raises ValueError before anything is written."""
    check_same_config(config, workdir)
    settings = config.backbone
    model, backbone = vpt_jax.load_backbone(
        settings.variant,
        settings.checkpoint,
        image_size=settings.image_size,
        readout=settings.readout,
        norm=settings.norm,
        resize=settings.resize,
        skip=settings.skip,
        dtype=jnp.dtype(settings.dtype),
    )
    card = vpt_jax.read_card(settings.checkpoint)
    normalisation = settings.normalisation or card.get("normalisation")
    if not normalisation:
        raise ValueError(
            f"how pictures are normalised for {settings.checkpoint} is not known; set"
            " --config.backbone.normalisation=half (Google's ViT), imagenet (most"
            " PyTorch models) or none. docs/backbones.md lists the files that we know."
        )
    info = {
        "name": Path(settings.checkpoint).name or "demo",
        "variant": settings.variant,
        "hash": vpt_jax.backbone_hash(backbone),
        "parameters": sum(x.size for x in jax.tree.leaves(backbone)),
        "normalisation": normalisation,
        "readout": model.readout,
    }
    # Fails here, not after hours, if counts do not fit the model.
    vpt_jax.init_prompts(
        jax.random.key(0), model, config.prompts.num_prompts, deep=config.prompts.deep
    )
    task = load_task(
        config.task.name,
        image_size=model.image_size,
        data_dir=config.task.data_dir,
        resize=config.task.resize,
        skip_broken=config.task.skip_broken,
    )
    if files.writes():
        files.write_json(workdir / "config.json", configs.to_dict(config))
    log = files.Log(workdir / "log.txt", workdir / "events")
    log.line(
        f"{task.name}: {len(task.train.labels)} train, {len(task.val.labels)} val,"
        f" {len(task.test.labels)} test, {len(task.class_names)} classes;"
        f" {info['name']} {settings.variant}, {info['parameters']:,} parameters;"
        f" {jax.device_count()} x {jax.devices()[0].device_kind}"
    )
    images, labels = jnp.asarray(task.train.images), jnp.asarray(task.train.labels)
    return Run(config, workdir, task, model, backbone, info, images, labels, log)


def check_same_config(config: configs.Config, workdir: Path) -> None:
    """A workdir belongs to one config; a second one must not mix with it."""
    path = workdir / "config.json"
    if not path.exists():
        return
    changed = configs.differences(
        json.loads(path.read_text(encoding="utf-8")), configs.to_dict(config)
    )
    if changed:
        raise ValueError(
            f"{workdir} holds a run of another config ({'; '.join(changed)}); pass"
            " another --workdir, or the same config to continue it. Nothing was"
            " touched."
        )


def make_report(
    run: Run, rows: list[dict[str, Any]], seconds: dict[str, float], command: str
) -> dict[str, Any]:
    """The content of report.json."""
    config, task = run.config, run.task
    score, seed = config.score.score, config.seeds[0]
    scores = scores_of(run, seed, score)
    device = jax.devices()[0]
    return {
        "task": task.name,
        "data": {
            "train": len(task.train.labels),
            "val": len(task.val.labels),
            "test": len(task.test.labels),
            "classes": len(task.class_names),
            "image_size": run.model.image_size,
        },
        "backbone": run.backbone_info,
        "config": configs.to_dict(config),
        "versions": {
            "vpt_jax": vpt_jax.__version__,
            "jax": jax.__version__,
            "flax": importlib.metadata.version("flax"),
            "optax": importlib.metadata.version("optax"),
            "numpy": np.__version__,
            "python": platform.python_version(),
            "device": f"{jax.device_count()} x {device.device_kind}",
        },
        "command": command,
        "latency_batch": config.eval_batch_size,
        "seconds": {stage: round(value, 2) for stage, value in seconds.items()},
        "importance": {
            "score": score,
            "reduction": config.score.reduction or DEFAULT_REDUCTION.get(score, ""),
            "seed": seed,
            "layers": [np.asarray(s).tolist() for s in scores],
        },
        "rows": rows,
    }


def main(values: ConfigDict, workdir: Path, command: str) -> None:
    """Runs, prints the table and where the report lies."""
    content = run(configs.parse(values), workdir, command)
    report.print_table(content)
    print(f"report: {workdir / 'report.html'}")


if __name__ == "__main__":
    cli.start(main)
