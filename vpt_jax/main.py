# SPDX-License-Identifier: Apache-2.0
r"""Tune, score, condense, fine-tune, evaluate: the whole of Prompt Condensation.

python -m vpt_jax.main --config=configs/demo.py --workdir=out/demo

A run is a list of units (`plan`), each one evaluated model. A unit is finished when its
row lies in `results/`; running the same command again skips finished units and
continues the interrupted one from its newest checkpoint, to the same end bit for bit.
In the workdir: `report.html`, `report.json`, `prompts/` (released prompts with their
head), `results/`, `scores/`, `checkpoints/`, `events/` (TensorBoard), `log.txt`.
"""

import importlib.metadata
import json
import math
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

import vpt_jax
from vpt_jax import config as configs
from vpt_jax import report, train
from vpt_jax import workdir as files
from vpt_jax.checkpoint import read_card
from vpt_jax.condense import DEFAULT_REDUCTION
from vpt_jax.data.augment import normalise
from vpt_jax.data.tasks import Split, Task, load_task

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file.", lock_config=True
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where results are kept; by default out/ and the config's name."
)
TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where an error was raised.")


class Unit(NamedTuple):
    """One evaluated model: `stage` is linear, tune, condense, finetune or scratch."""

    stage: str
    seed: int
    score: str | None = None
    scope: str | None = None
    keep_ratio: float = 1.0

    @property
    def name(self) -> str:
        """Also its file name."""
        parts = [f"seed{self.seed}", self.stage, self.score, self.scope]
        if self.keep_ratio not in (0.0, 1.0):
            parts.append(f"{100 * self.keep_ratio:g}percent")
        return "-".join(p for p in parts if p)


class Run(NamedTuple):
    """What every unit of a run shares."""

    config: configs.Config
    workdir: Path
    task: Task
    model: vpt_jax.ViT
    backbone: Any
    backbone_info: dict[str, Any]
    images: jax.Array
    labels: jax.Array
    log: files.Log


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
    for number, unit in enumerate(units, start=1):
        result = run_unit(shared, unit, f"[{number}/{len(units)}]")
        rows.append(result["row"])
        seconds[unit.stage] = seconds.get(unit.stage, 0.0) + result["seconds"]
    content = make_report(shared, rows, seconds, command)
    shared.log.close()
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
        resize=settings.resize,
        dtype=jnp.dtype(settings.dtype),
    )
    card = read_card(settings.checkpoint)
    normalisation = settings.normalisation or card.get("normalisation", "half")
    info = {
        "name": Path(settings.checkpoint).name or "demo",
        "variant": settings.variant,
        "hash": vpt_jax.backbone_hash(backbone),
        "parameters": sum(x.size for x in jax.tree.leaves(backbone)),
        "normalisation": normalisation,
    }
    # Fails here, not after hours, if counts do not fit the model.
    vpt_jax.init_prompts(
        jax.random.key(0), model, config.prompts.num_prompts, deep=config.prompts.deep
    )
    task = load_task(
        config.task.name, image_size=model.image_size, data_dir=config.task.data_dir
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


def run_unit(run: Run, unit: Unit, prefix: str = "") -> dict[str, Any]:
    """The unit's row and seconds; from disk if it is finished."""
    path = run.workdir / "results" / f"{unit.name}.json"
    if path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
        run.log.line(f"{prefix} {unit.name}: done before")
        return result
    trainable, seconds = trained(run, unit, prefix)
    row = evaluated(run, unit, trainable)
    result = {"row": row, "seconds": round(seconds, 3)}
    if files.writes():
        files.write_json(path, result)
    run.log.line(
        f"{prefix} {unit.name}: {sum(row['counts'])} prompts, test"
        f" {100 * row['test_accuracy']:.2f} %, val {100 * row['val_accuracy']:.2f} %,"
        f" {seconds:.1f} s"
    )
    return result


def trained(run: Run, unit: Unit, prefix: str = "") -> tuple[dict[str, Any], float]:
    """Prompts and head of a unit, and the seconds their training took.

    Released prompts are float32 and read back exactly, so they are the record of a
    finished training.
    """
    path = run.workdir / "prompts" / f"{unit.name}.safetensors"
    if path.exists():
        saved = vpt_jax.load_prompts(path, backbone=run.backbone_info["hash"])
        return {"prompts": saved.prompts, "head": saved.head}, 0.0
    trainable, seconds = starting_point(run, unit), 0.0
    if unit.stage != "condense":
        trainable, seconds = fit(run, unit, trainable, prefix)
    if files.writes():
        vpt_jax.save_prompts(
            path,
            trainable["prompts"],
            trainable["head"],
            model=run.model,
            backbone=run.backbone_info["hash"],
            backbone_name=run.backbone_info["name"],
            normalisation=run.backbone_info["normalisation"],
            class_names=run.task.class_names,
            deep=run.config.prompts.deep,
        )
    return trainable, seconds


def starting_point(run: Run, unit: Unit) -> dict[str, Any]:
    """Prompts and head before the unit's training."""
    settings = run.config.prompts
    if unit.stage in ("condense", "finetune"):
        assert unit.score and unit.scope  # as plan makes them
        tuned, _ = trained(run, Unit("tune", unit.seed))
        scores = scores_of(run, unit.seed, unit.score)
        mask = vpt_jax.keep_mask(scores, keep_ratio=unit.keep_ratio, scope=unit.scope)
        return {**tuned, "prompts": vpt_jax.condense(tuned["prompts"], mask)}
    prompt_key, head_key = jax.random.split(jax.random.key(unit.seed))
    prompts = vpt_jax.init_prompts(
        prompt_key, run.model, settings.num_prompts, deep=settings.deep
    )
    if unit.stage == "linear":
        prompts = tuple(p[:0] for p in prompts)
    if unit.stage == "scratch":
        # The same share of every layer, as VPT with fewer prompts would have.
        even = tuple(jnp.zeros(n) for n in vpt_jax.counts(prompts))
        mask = vpt_jax.keep_mask(even, keep_ratio=unit.keep_ratio, scope="layer")
        prompts = vpt_jax.condense(prompts, mask)
    head = vpt_jax.init_head(head_key, run.model.width, len(run.task.class_names))
    return {"prompts": prompts, "head": head}


def scores_of(run: Run, seed: int, score: str) -> tuple[jax.Array, ...]:
    """Importance of the tuned prompts over the training set; kept in `scores/`."""
    path = run.workdir / "scores" / f"seed{seed}-{score}.json"
    if path.exists():
        layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
        return tuple(jnp.asarray(s, jnp.float32) for s in layers)
    tuned, _ = trained(run, Unit("tune", seed))
    settings, num = run.config.score, len(run.labels)
    steps = math.ceil(num / settings.batch_size)

    def batches():
        for start in range(0, num, settings.batch_size):
            part = slice(start, start + settings.batch_size)
            image = normalise(run.images[part], run.backbone_info["normalisation"])
            yield {"image": image, "label": run.labels[part]}

    start = time.perf_counter()
    scores = vpt_jax.importance(
        run.model,
        run.backbone,
        tuned,
        batches(),
        score=score,
        reduction=(settings.reduction or None) if score == settings.score else None,
        deep=run.config.prompts.deep,
        key=jax.random.fold_in(jax.random.key(seed), 1),
        progress=lambda done: run.log.progress(f"score {score}: {done}/{steps}"),
    )
    seconds = time.perf_counter() - start
    if files.writes():
        layers = [np.asarray(s).tolist() for s in scores]
        files.write_json(path, {"score": score, "seed": seed, "layers": layers})
    run.log.line(f"seed{seed}-score-{score}: {seconds:.1f} s")
    return scores


def fit(
    run: Run, unit: Unit, trainable: dict[str, Any], prefix: str
) -> tuple[dict[str, Any], float]:
    """Trains a unit, from its newest checkpoint if there is one; with its seconds."""
    stage = {"scratch": "tune"}.get(unit.stage, unit.stage)
    settings: configs.TrainConfig = getattr(run.config, stage)
    recipe = make_recipe(run, settings, unit.stage)
    model, images = run.model, run.images
    if unit.stage == "linear":  # frozen features never change: computed once
        model, images = None, features_of(run)
    num = len(run.labels)
    steps = math.ceil(num / settings.batch_size)
    rates = train.learning_rates(
        train.scaled_lr(settings.base_lr, settings.batch_size),
        settings.epochs,
        settings.warmup_epochs,
        steps,
        per=settings.schedule,
    )
    directory = run.workdir / "checkpoints" / unit.name
    saved = {"state": train.init_state(trainable, recipe), "seconds": np.zeros(())}
    first = 0
    if newest := files.newest_checkpoint(directory):
        first, path = newest
        saved = files.restore_checkpoint(path, saved)
        run.log.line(f"{prefix} {unit.name}: continuing after epoch {first}")
    state = jax.tree.map(jnp.asarray, saved["state"])
    seconds, key = float(saved["seconds"]), jax.random.key(unit.seed)
    for epoch in range(first, settings.epochs):
        start = time.perf_counter()
        order, mask = train.epoch_order(unit.seed, epoch, num, settings.batch_size)
        state, metrics = train.train_epoch(
            state,
            run.backbone,
            images,
            run.labels,
            order,
            mask,
            rates[epoch],
            jnp.float32(settings.weight_decay),
            key,
            model=model,
            recipe=recipe,
        )
        metrics = {name: float(value) for name, value in metrics.items()}
        metrics["seconds"] = time.perf_counter() - start
        seconds += metrics["seconds"]
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"{unit.name}: loss is {metrics['loss']} in epoch {epoch + 1} at rate"
                f" {rates[epoch].max():g}; lower config.{stage}.base_lr"
                f" ({settings.base_lr}). Earlier checkpoints are in {directory}."
            )
        run.log.epoch(unit.name, epoch + 1, settings.epochs, num, metrics, prefix)
        last = epoch + 1 == settings.epochs
        if last or (epoch + 1) % run.config.checkpoint_every == 0:
            saved = {"state": state, "seconds": np.asarray(seconds)}
            files.save_checkpoint(directory / str(epoch + 1), saved)
            files.remove_checkpoints(directory, keep=1)
    return state.trainable, seconds


def make_recipe(run: Run, settings: configs.TrainConfig, stage: str) -> train.Recipe:
    """What is fixed at compile time; only fine-tuning may freeze the head."""
    return train.Recipe(
        optimizer=settings.optimizer,
        dropout=run.config.prompts.dropout,
        deep=run.config.prompts.deep,
        normalisation=run.backbone_info["normalisation"],
        train_head=settings.head or stage != "finetune",
    )


def features_of(run: Run) -> jax.Array:
    """Features of the training set without prompts, `[n, d]`."""
    return jnp.asarray(
        train.extract_features(
            run.backbone,
            run.task.train.images,
            model=run.model,
            normalisation=run.backbone_info["normalisation"],
            batch_size=run.config.eval_batch_size,
        )
    )


def evaluated(run: Run, unit: Unit, trainable: dict[str, Any]) -> dict[str, Any]:
    """The unit's row of the report."""
    deep, counts = run.config.prompts.deep, vpt_jax.counts(trainable["prompts"])
    recipe = train.Recipe(deep=deep, normalisation=run.backbone_info["normalisation"])
    ready = trainable
    if deep:
        kv = vpt_jax.prefill(run.model, run.backbone, trainable["prompts"])
        ready = {**trainable, "prompts": kv}
    size = run.config.eval_batch_size

    def accuracy(split: Split) -> float:
        return train.evaluate(
            ready,
            run.backbone,
            split.images,
            split.labels,
            model=run.model,
            recipe=recipe,
            batch_size=size,
        )

    tuned = jax.tree.leaves(trainable)
    return {
        "stage": unit.stage,
        "score": unit.score,
        "scope": unit.scope,
        "keep_ratio": unit.keep_ratio,
        "counts": list(counts),
        "val_accuracy": accuracy(run.task.val),
        "test_accuracy": accuracy(run.task.test),
        "macs": vpt_jax.macs(run.model, counts, deep=deep),
        "macs_reference": vpt_jax.macs(
            run.model, counts, deep=deep, formulation="tokens"
        ),
        "latency_ms": latency(run, ready, recipe),
        "tuned_params": sum(x.size for x in tuned),
        "seed": unit.seed,
    }


def latency(run: Run, ready: dict[str, Any], recipe: train.Recipe) -> float:
    """Milliseconds per picture of the compiled forward pass, median of 9 batches."""
    size = run.config.eval_batch_size
    index = np.arange(size) % len(run.task.test.labels)
    # On the device before the clock starts: the model is timed, not the copy.
    batch = jax.device_put(
        (run.task.test.images[index], run.task.test.labels[index], np.ones(size, bool))
    )
    times = []
    for _ in range(10):
        start = time.perf_counter()
        train.eval_step(
            ready, run.backbone, *batch, model=run.model, recipe=recipe
        ).block_until_ready()
        times.append(time.perf_counter() - start)
    return round(float(np.median(times[1:])) / size * 1000, 5)


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


def default_workdir(filename: str) -> str:
    """`configs/demo.py:digits,seeds=5` -> `out/demo-digits-seeds5`."""
    path, _, arg = filename.partition(":")
    words = [Path(path).stem, *arg.replace("=", "").split(",")]
    return "/".join(("out", "-".join(w for w in words if w)))


def parse_flags(argv: list[str]) -> list[str]:
    """absl's own parsing, but a config key or value that is wrong is one line."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if "--traceback" in argv:
            raise
        text = " ".join(str(error.args[0] if error.args else error).split())
        fail(f"cannot read --config: {text}")


def fail(error: Any) -> NoReturn:
    """Prints one line and exits with 2, as command lines do for bad input."""
    print(f"error: {error} (--traceback shows where)", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str]) -> None:
    """Reads the flags, runs, prints the table and where the report lies."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file otherwise
    filename = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = Path(WORKDIR.value or default_workdir(filename))
    command = shlex.join(["python", "-m", "vpt_jax.main", *sys.argv[1:]])
    try:
        content = run(configs.parse(CONFIG.value), workdir, command)
    except (ValueError, FloatingPointError) as error:
        if TRACEBACK.value:
            raise
        fail(error)
    report.print_table(content)
    print(f"report: {workdir / 'report.html'}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
