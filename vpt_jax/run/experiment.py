# SPDX-License-Identifier: Apache-2.0
"""One run on one task: load, go through its units, report.

A run is a list of units (`plan`), each one evaluated model. A unit is finished when its
row lies in `results/`; running the same config again skips finished units and continues
the interrupted one from its newest checkpoint, to the same end bit for bit.
"""

import contextlib
import dataclasses
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
from vpt_jax import parallel
from vpt_jax.data import doubts, strips
from vpt_jax.data.tasks import Split, Task, load_task
from vpt_jax.files import workdirs
from vpt_jax.files.messages import expect
from vpt_jax.models.scores import DEFAULT_REDUCTION
from vpt_jax.report import cautions
from vpt_jax.report import document as report
from vpt_jax.run import config as configs
from vpt_jax.run import looks, parsing
from vpt_jax.run.stages import Run, Unit, run_unit, scores_of
from vpt_jax.weights.published import told_apart
from vpt_jax.weights.release import is_address


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


def run(
    config: configs.Config,
    workdir: Path,
    command: str = "",
    search: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Runs all units that are not finished and writes the report, which it returns.

    `command` started it; `search` found its rate, see `search.summary`.
    """
    if config.task.splits == "select":
        raise ValueError(
            "config.task.splits is 'select', for trials of a benchmark; expected 'all',"
            " or 'final' to train on val too."
        )
    check_same_config(config, workdir)
    model = load_model(config.backbone)
    pictures = load_pictures(config.task, model.model.image_size)
    with started(config, workdir, model, pictures) as shared:
        rows, seconds = run_units(shared, plan(config))
        unit = write_best(shared, rows)
        content = make_report(shared, rows, seconds, command)
        content["looks"] = looks.look(shared, unit)
        if search:
            content["search"] = search
        for caution in cautions.of(content):
            shared.log.line(f"warning: {caution}")
    if workdirs.writes():
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


def best(rows: Sequence[dict[str, Any]]) -> tuple[int, str]:
    """Which of a run's models to use, and why: chosen on val, never on test.

    Of equal ones, the one with fewest prompts, which is the fastest; then the first.
    """
    judged = [row for row in rows if row["val_accuracy"] is not None]
    if not judged:
        tuned = [i for i, row in enumerate(rows) if row["stage"] == "tune"]
        return (tuned or [0])[0], "all prompts, first seed: no validation set"
    top = max(row["val_accuracy"] for row in judged)
    equal = [i for i, row in enumerate(rows) if row["val_accuracy"] == top]
    number = min(equal, key=lambda i: sum(rows[i]["counts"]))
    why = f"the highest accuracy on val of {len(judged)} models, {100 * top:.2f} %"
    if len(equal) > 1:
        why += f"; of {len(equal)} equal ones that with the fewest prompts"
    return number, why


def write_best(run: Run, rows: Sequence[dict[str, Any]]) -> Unit:
    """The best unit of a run, which `best.json` says, and why it is.

    Also where the backbone lies on this machine, which the file itself does not say.
    """
    number, why = best(rows)
    row, checkpoint = rows[number], run.config.backbone.checkpoint
    unit = Unit(*(row[k] for k in ("stage", "seed", "score", "scope", "keep_ratio")))
    if not workdirs.writes():
        return unit
    if checkpoint and not is_address(checkpoint):
        checkpoint = str(Path(checkpoint).expanduser().absolute())
    content = {
        "prompts": f"prompts/{unit.name}.safetensors",
        "why": why,
        "val_accuracy": row["val_accuracy"],
        "test_accuracy": row["test_accuracy"],
        "num_prompts": sum(row["counts"]),
        "backbone": checkpoint,
    }
    workdirs.write_json(run.workdir / "best.json", content)
    run.log.line(f"best: {unit.name}, {why}")
    return unit


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
    names = ("readout", "norm", "resize", "num_heads", "activation", "epsilon")
    load: dict[str, Any] = {name: getattr(settings, name) for name in names}
    load["skip"] = list(settings.skip)
    mesh, split = parallel.share(settings.share), settings.share > 1
    right = not split or jax.process_count() == 1
    one = f"1 with {jax.process_count()} processes: the devices of one share it"
    expect(right, "backbone.share", settings.share, one)
    model, backbone = vpt_jax.load_backbone(
        variant or checkpoint,
        checkpoint if variant else "",
        image_size=settings.image_size,
        dtype=jnp.dtype(settings.dtype),
        mesh=mesh if split else None,
        **load,
    )
    model = model.clone(remat=settings.remat)
    if isinstance(model, vpt_jax.ViT):
        model = model.clone(attention=settings.attention)
    else:
        plain = settings.attention == "products"
        name = "config.backbone.attention"
        expect(plain, name, settings.attention, "'products' for a Swin")
    card = vpt_jax.read_card(checkpoint)
    normalisation = settings.normalisation or card.get("normalisation")
    if not normalisation:
        raise ValueError(
            f"how pictures are normalised for {checkpoint} is not known; set"
            " --config.backbone.normalisation=half (Google's ViT), imagenet (most of"
            " PyTorch's) or none, see docs/backbones.md."
        )
    # On the hub the folder has the name, the file is called model.safetensors.
    hub = checkpoint.startswith("hf://")
    # As they turned out: what is known of a file by its name, another name hides.
    if isinstance(model, vpt_jax.ViT):
        load = {name: getattr(model, name, value) for name, value in load.items()}
    load["resize"] = load["resize"] or card.get("resize", "corner_aligned")
    info = {
        "name": Path(checkpoint).parts[2 if hub else -1] if checkpoint else "demo",
        "variant": model.variant or f"{model.width} x {model.depth}",
        "hash": vpt_jax.backbone_hash(backbone),
        "parameters": sum(x.size for x in jax.tree.leaves(backbone)),
        "normalisation": normalisation,
        "readout": model.readout,
        "load": load | {"dtype": settings.dtype},
    }
    backbone = backbone if split else parallel.put_whole(backbone, mesh)
    return Model(model, backbone, info)


def load_pictures(settings: configs.TaskConfig, image_size: int) -> Pictures:
    """Loads the task and puts its training set on the devices, a part on each."""
    task = load_task(image_size=image_size, **dataclasses.asdict(settings))
    mesh, said = parallel.all_devices(), task.doubts
    if said is None:
        train = task.train
        if isinstance(train.images, strips.Strip):  # looked at on the device
            train = train._replace(images=jax.tree.map(jnp.asarray, train.images))
        said = doubts.doubts({**_splits(task), "train": train})
    return Pictures(
        task,
        strips.put(task.train.images, mesh),
        parallel.put_whole(task.train.labels, mesh),
        tuple(said),
    )


def _splits(task: Task) -> dict[str, Split | None]:
    return {"train": task.train, "val": task.val, "test": task.test}


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
        stack.enter_context(workdirs.locked(workdir / ".lock"))
        own = (workdir / name for name in ("prompts", "results", "scores"))
        workdirs.remove_leftovers(workdir, *own, *workdir.glob("checkpoints/*"))
        if workdirs.writes():
            workdirs.write_json(workdir / "config.json", parsing.to_dict(config))
        log = workdirs.Log(workdir / "log.txt", workdir / "events", echo=echo)
        stack.enter_context(contextlib.closing(log))
        task, info = pictures.task, model.info
        parts = _splits(task).items()
        sizes = [f"{len(split.labels)} {name}" for name, split in parts if split]
        log.line(
            f"{task.name}: {', '.join(sizes)}, {len(task.class_names)} classes;"
            f" {info['name']} {info['variant']}, {info['parameters']:,} parameters;"
            f" {jax.device_count()} x {jax.devices()[0].device_kind}"
        )
        for doubt in pictures.doubts:
            log.line(f"warning: {task.name}: {doubt}")
        yield Run(
            config=config,
            workdir=workdir,
            task=task,
            model=model.model,
            backbone=model.backbone,
            backbone_info=info,
            images=pictures.images,
            labels=pictures.labels,
            log=log,
            doubts=pictures.doubts,
        )


def changed_keys(config: configs.Config, workdir: Path) -> list[str]:
    """In which keys a workdir's run has another config; none where there is no run."""
    path = workdir / "config.json"
    if not path.exists():
        return []
    try:
        found = dict(json.loads(path.read_bytes()))
    except (TypeError, ValueError) as error:
        raise workdirs.Damaged(
            f"{path} is damaged ({error}); expected the JSON of a run's config. Pass"
            " another --workdir, or delete the file if this is that run's config."
        ) from error
    return parsing.differences(found, parsing.to_dict(config))


def check_same_config(config: configs.Config, workdir: Path) -> None:
    """A workdir belongs to one config; a second one must not mix with it."""
    if changed := changed_keys(config, workdir):
        raise ValueError(
            f"{workdir} holds a run of another config ({'; '.join(changed)}); pass"
            " another --workdir, or the same config to continue it."
        )


def make_report(
    run: Run, rows: list[dict[str, Any]], seconds: dict[str, float], command: str
) -> dict[str, Any]:
    """The content of report.json."""
    config, task = run.config, run.task
    score, seed = config.score.score, config.seeds[0]
    own = "mean" if ":" in score else DEFAULT_REDUCTION.get(score, "")
    scores, splits = scores_of(run, seed, score), _splits(task)
    return {
        "task": task.name,
        "data": {
            **{k: len(split.labels) if split else 0 for k, split in splits.items()},
            "classes": len(task.class_names),
            "image_size": run.model.image_size,
        },
        "backbone": run.backbone_info,
        "config": parsing.to_dict(config),
        "versions": versions(),
        "command": command,
        "latency_batch": config.eval_batch_size,
        "seconds": {stage: round(value, 2) for stage, value in seconds.items()},
        "importance": {
            "score": score,
            "reduction": config.score.reduction or own,
            "seed": seed,
            "layers": [np.asarray(s).tolist() for s in scores],
        },
        "classes": list(task.class_names),
        "doubts": list(run.doubts),
        "rows": rows,
    }


def versions() -> dict[str, str]:
    """What a result depends on besides its config."""
    names = ("jax", "flax", "optax", "numpy")
    return {
        "vpt_jax": vpt_jax.__version__,
        **{name: importlib.metadata.version(name) for name in names},
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
