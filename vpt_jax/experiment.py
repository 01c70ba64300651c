# SPDX-License-Identifier: Apache-2.0
"""One run on one task: load, go through its units, report.

A run is a list of units (`plan`), each one evaluated model. A unit is finished when its
row lies in `results/`; running the same config again skips finished units and continues
the interrupted one from its newest checkpoint, to the same end bit for bit.
"""

import contextlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import vpt_jax
from vpt_jax import config as configs
from vpt_jax import parallel, report
from vpt_jax import workdir as files
from vpt_jax.checkpoint import told_apart
from vpt_jax.condense import DEFAULT_REDUCTION
from vpt_jax.data import doubts, strips
from vpt_jax.data.tasks import Task, load_task
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
    if config.task.splits == "select":
        raise ValueError(
            "config.task.splits is 'select', which leaves the test set out: for trials"
            " of a benchmark; use 'all', or 'final' to train on val too."
        )
    check_same_config(config, workdir)
    model = load_model(config.backbone)
    pictures = load_pictures(config.task, model.model.image_size)
    with started(config, workdir, model, pictures) as shared:
        rows, seconds = run_units(shared, plan(config))
        content = make_report(shared, rows, seconds, command)
    if files.writes():
        report.write(content, workdir)
    return content


def run_units(
    shared: Run, units: Sequence[Unit], prefix: str = ""
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The units' rows, and the seconds of training per stage."""
    rows, seconds = [], {}
    for number, unit in enumerate(units, start=1):
        result = run_unit(shared, unit, f"{prefix}[{number}/{len(units)}]")
        rows.append(result["row"])
        seconds[unit.stage] = seconds.get(unit.stage, 0.0) + result["seconds"]
    return rows, seconds


class Model(NamedTuple):
    """A backbone as loaded, and what reports say of it."""

    model: vpt_jax.ViT | vpt_jax.Swin
    backbone: Any
    info: dict[str, Any]


class Pictures(NamedTuple):
    """A task, and its training set on the device."""

    task: Task
    images: Any
    labels: jax.Array
    doubts: tuple[str, ...] = ()  # about the data, see `doubts.py`


def load_model(settings: configs.BackboneConfig) -> Model:
    """Loads the backbone; ValueError if it, or how to feed it, is not known."""
    variant, checkpoint = told_apart(settings.variant, settings.checkpoint)
    model, backbone = vpt_jax.load_backbone(
        variant or checkpoint,
        checkpoint if variant else "",
        image_size=settings.image_size,
        readout=settings.readout,
        norm=settings.norm,
        resize=settings.resize,
        num_heads=settings.num_heads,
        activation=settings.activation,
        epsilon=settings.epsilon,
        skip=settings.skip,
        dtype=jnp.dtype(settings.dtype),
    )
    choices = {"remat": settings.remat, "attention": settings.attention}
    if isinstance(model, vpt_jax.ViT):
        model = model.clone(remat=settings.remat, attention=settings.attention)
    elif choices != {"remat": "none", "attention": "products"}:
        raise ValueError(
            f"config.backbone has {choices}, which only a ViT has; leave both out for"
            " a Swin."
        )
    card = vpt_jax.read_card(checkpoint)
    normalisation = settings.normalisation or card.get("normalisation")
    if not normalisation:
        raise ValueError(
            f"how pictures are normalised for {checkpoint} is not known; set"
            " --config.backbone.normalisation=half (Google's ViT), imagenet (most"
            " PyTorch models) or none. docs/backbones.md lists the files that we know."
        )
    info = {
        "name": Path(checkpoint).name or "demo",
        "variant": model.variant or f"{model.width} x {model.depth}",
        "hash": vpt_jax.backbone_hash(backbone),
        "parameters": sum(x.size for x in jax.tree.leaves(backbone)),
        "normalisation": normalisation,
        "readout": model.readout,
    }
    backbone = parallel.put_whole(backbone, parallel.all_devices())
    return Model(model, backbone, info)


def load_pictures(settings: configs.TaskConfig, image_size: int) -> Pictures:
    """Loads the task and puts its training set on the devices, a part on each."""
    task = load_task(
        settings.name,
        image_size=image_size,
        data_dir=settings.data_dir,
        resize=settings.resize,
        skip_broken=settings.skip_broken,
        splits=settings.splits,
    )
    mesh, seen = parallel.all_devices(), task
    if isinstance(task.train.images, strips.Strip):  # looked at on the device
        images = jax.tree.map(jnp.asarray, task.train.images)
        seen = task._replace(train=task.train._replace(images=images))
    return Pictures(
        task,
        strips.put(task.train.images, mesh),
        parallel.put_whole(task.train.labels, mesh),
        tuple(doubts.doubts(seen)),
    )


@contextlib.contextmanager
def started(
    config: configs.Config,
    workdir: Path,
    model: Model,
    pictures: Pictures,
    *,
    echo: bool = True,
) -> Iterator[Run]:
    """What the units of a run share; the workdir is its from here on.

    Raises:
      ValueError: If the workdir holds another config or another process works there,
        or the counts do not fit the model: before anything is written.
    """
    check_same_config(config, workdir)
    vpt_jax.init_prompts(
        jax.random.key(0),
        model.model,
        config.prompts.num_prompts,
        deep=config.prompts.deep,
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(files.locked(workdir / ".lock"))
        own = (workdir / name for name in ("prompts", "results", "scores"))
        files.remove_leftovers(workdir, *own, *workdir.glob("checkpoints/*"))
        if files.writes():
            files.write_json(workdir / "config.json", configs.to_dict(config))
        log = files.Log(workdir / "log.txt", workdir / "events", echo=echo)
        stack.enter_context(contextlib.closing(log))
        task, info = pictures.task, model.info
        parts = [("train", task.train), ("val", task.val), ("test", task.test)]
        sizes = [f"{len(split.labels)} {name}" for name, split in parts if split]
        log.line(
            f"{task.name}: {', '.join(sizes)}, {len(task.class_names)} classes;"
            f" {info['name']} {info['variant']}, {info['parameters']:,} parameters;"
            f" {jax.device_count()} x {jax.devices()[0].device_kind}"
        )
        for doubt in pictures.doubts:
            log.line(f"warning: {task.name}: {doubt}")
        yield Run(
            config,
            workdir,
            task,
            model.model,
            model.backbone,
            info,
            pictures.images,
            pictures.labels,
            log,
        )


def check_same_config(config: configs.Config, workdir: Path) -> None:
    """A workdir belongs to one config; a second one must not mix with it."""
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        found = dict(json.loads(path.read_bytes()))
    except (TypeError, ValueError) as error:
        raise files.Damaged(
            f"{path} is damaged ({error}), so that the config of what lies there is not"
            " known; expected the JSON of a run. Pass another --workdir, or delete the"
            " file if this is that run's config. Nothing was touched."
        ) from error
    changed = configs.differences(found, configs.to_dict(config))
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
    return {
        "task": task.name,
        "data": {
            "train": len(task.train.labels),
            "val": len(task.val.labels) if task.val else 0,
            "test": len(task.test.labels) if task.test else 0,
            "classes": len(task.class_names),
            "image_size": run.model.image_size,
        },
        "backbone": run.backbone_info,
        "config": configs.to_dict(config),
        "versions": versions(),
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


def versions() -> dict[str, str]:
    """What a result depends on besides its config."""
    return {
        "vpt_jax": vpt_jax.__version__,
        "jax": jax.__version__,
        "flax": importlib.metadata.version("flax"),
        "optax": importlib.metadata.version("optax"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
