# SPDX-License-Identifier: Apache-2.0
"""What happens to one model of a run: start, train, release, evaluate.

A unit is finished when its row lies in `results/`; a training is finished when its
prompts lie in `prompts/`; within a training the newest checkpoint counts. Whatever a
unit builds on (tuned prompts, scores) it reads from the workdir, or makes.
"""

import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clu.parameter_overview import get_parameter_overview

import vpt_jax
from vpt_jax import config as configs
from vpt_jax import parallel, train
from vpt_jax import workdir as files
from vpt_jax.checkpoint import flatten
from vpt_jax.data.augment import normalise
from vpt_jax.data.strips import Strip, view
from vpt_jax.data.tasks import Split, Task
from vpt_jax.prompts import Mask


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
    model: vpt_jax.ViT | vpt_jax.Swin
    backbone: Any
    backbone_info: dict[str, Any]
    images: jax.Array | Strip
    labels: jax.Array
    log: files.Log
    features: jax.Array | None = None  # of the training set without prompts, if known


def run_unit(run: Run, unit: Unit, prefix: str = "") -> dict[str, Any]:
    """The unit's row and seconds; from disk if it is finished."""
    path = run.workdir / "results" / f"{unit.name}.json"
    if files.exists(path):
        result = json.loads(path.read_text(encoding="utf-8"))
        run.log.line(f"{prefix} {unit.name}: done before")
        return result
    trainable, training = trained(run, unit, prefix)
    row = evaluated(run, unit, trainable)
    if training["epochs"] < training["planned_epochs"]:
        row |= {k: training[k] for k in ("epochs", "planned_epochs")}
    result = {"row": row, "seconds": training["seconds"]}
    if files.writes():
        files.write_json(path, result)
    accuracies = "".join(
        f" {split} {100 * row[f'{split}_accuracy']:.2f} %,"
        for split in ("test", "val")
        if row[f"{split}_accuracy"] is not None
    )
    run.log.line(
        f"{prefix} {unit.name}: {sum(row['counts'])} prompts,{accuracies}"
        f" {result['seconds']:.1f} s"
    )
    return result


def trained(
    run: Run, unit: Unit, prefix: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Prompts and head of a unit, and of their training: seconds, epochs, planned ones.

    Released prompts are float32 and read back exactly, so they are the record of a
    finished training.
    """
    path = run.workdir / "prompts" / f"{unit.name}.safetensors"
    training_path = run.workdir / "checkpoints" / unit.name / "training.json"
    if files.exists(path):
        saved = vpt_jax.load_prompts(path, backbone=run.backbone_info["hash"])
        training = {"seconds": 0.0, "epochs": 0, "planned_epochs": 0}
        if files.exists(training_path):  # not where nothing was trained
            training = json.loads(training_path.read_text(encoding="utf-8"))
        return {"prompts": saved.prompts, "head": saved.head}, training
    trainable = starting_point(run, unit)
    training = {"seconds": 0.0, "epochs": 0, "planned_epochs": 0}
    if unit.stage != "condense":
        trainable, training = fit(run, unit, trainable, prefix)
        trainable = jax.tree.map(jnp.asarray, on_host(trainable))  # on one device
        if files.writes():
            files.write_json(training_path, training)
    release(run, unit, trainable)
    return trainable, training


def release(run: Run, unit: Unit, trainable: dict[str, Any]) -> None:
    """Writes a unit's prompts and head: its training is finished."""
    if files.writes():
        vpt_jax.save_prompts(
            run.workdir / "prompts" / f"{unit.name}.safetensors",
            trainable["prompts"],
            trainable["head"],
            model=run.model,
            backbone=run.backbone_info["hash"],
            backbone_name=run.backbone_info["name"],
            normalisation=run.backbone_info["normalisation"],
            class_names=run.task.class_names,
            deep=run.config.prompts.deep,
        )


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
    if files.exists(path):
        layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
        return tuple(jnp.asarray(s, jnp.float32) for s in layers)
    tuned, _ = trained(run, Unit("tune", seed))
    start = time.perf_counter()
    key = jax.random.fold_in(jax.random.key(seed), 1)
    scores = score_over(run, tuned, score, key=key)
    scores = jax.tree.map(jnp.asarray, on_host(scores))  # on one device
    seconds = time.perf_counter() - start
    if files.writes():
        layers = [np.asarray(s).tolist() for s in scores]
        files.write_json(path, {"score": score, "seed": seed, "layers": layers})
    run.log.line(f"seed{seed}-score-{score}: {seconds:.1f} s")
    return scores


@parallel.everywhere()
def score_over(
    run: Run,
    trainable: dict[str, Any],
    score: str,
    *,
    key: jax.Array | None = None,
    prompt_mask: Mask | None = None,
) -> tuple[jax.Array, ...]:
    """Importance over the run's training set, see `vpt_jax.importance`."""
    settings, num = run.config.score, len(run.labels)
    steps = math.ceil(num / settings.batch_size)

    def batches():
        for start in range(0, num, settings.batch_size):
            part = slice(start, start + settings.batch_size)
            image = view(run.images, jnp.arange(num)[part])
            image = normalise(image, run.backbone_info["normalisation"])
            yield {"image": image, "label": run.labels[part]}

    return vpt_jax.importance(
        run.model,
        run.backbone,
        trainable,
        batches(),
        score=score,
        reduction=(settings.reduction or None) if score == settings.score else None,
        deep=run.config.prompts.deep,
        prompt_mask=prompt_mask,
        key=key,
        progress=lambda done: run.log.progress(f"score {score}: {done}/{steps}"),
    )


@parallel.everywhere()
def fit(
    run: Run, unit: Unit, trainable: dict[str, Any], prefix: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains a unit, from its newest checkpoint if there is one.

    Returns:
      Prompts and head of the last epoch, or of the last one in which all was finite
      (`config.diverged`); and `seconds`, `epochs` that they saw, `planned_epochs`.

    Raises:
      FloatingPointError: If training diverges and `config.diverged` is "error".
    """
    stage = {"scratch": "tune"}.get(unit.stage, unit.stage)
    settings: configs.TrainConfig = getattr(run.config, stage)
    recipe = make_recipe(run, settings, unit.stage)
    model, images = run.model, run.images
    if unit.stage == "linear":  # frozen features never change: computed once
        known = run.features
        model, images = None, features_of(run) if known is None else known
    num = len(run.labels)
    rates = rates_of(settings, num)
    directory = run.workdir / "checkpoints" / unit.name
    saved = {"state": train.init_state(trainable, recipe), "seconds": np.zeros(())}
    first = 0
    if newest := files.newest_checkpoint(directory):
        first, path = newest
        saved = files.restore_checkpoint(path, saved)
        run.log.line(f"{prefix} {unit.name}: continuing after epoch {first}")
    overview = get_parameter_overview(flatten(trainable), include_stats=False)
    run.log.note(f"{unit.name} trains\n{overview}")
    state = parallel.held(saved["state"])
    seconds, key = float(saved["seconds"]), jax.random.key(unit.seed)
    # Copies: the state is donated, and its last finite values may be the result.
    kept, done = on_host(state.trainable), first
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
        now = on_host(state.trainable)
        if not (math.isfinite(metrics["loss"]) and is_finite(now)):
            text = (
                f"{unit.name}: loss is {metrics['loss']} after epoch {epoch + 1} at"
                f" rate {rates[epoch].max():g}"
            )
            if run.config.diverged == "error":
                raise FloatingPointError(
                    f"{text}; lower config.{stage}.base_lr ({settings.base_lr})."
                    f" Earlier checkpoints are in {directory}."
                )
            run.log.line(f"{prefix} {text}; ended with epoch {epoch}")
            break
        kept, done = now, epoch + 1
        run.log.epoch(unit.name, epoch + 1, settings.epochs, num, metrics, prefix)
        last = epoch + 1 == settings.epochs
        if last or (epoch + 1) % run.config.checkpoint_every == 0:
            saved = {"state": state, "seconds": np.asarray(seconds)}
            files.save_checkpoint(directory / str(epoch + 1), saved)
            files.remove_checkpoints(directory, keep=1)
    training = {
        "seconds": round(seconds, 3),
        "epochs": done,
        "planned_epochs": settings.epochs,
    }
    return jax.tree.map(jnp.asarray, kept), training


def rates_of(settings: configs.TrainConfig, num: int) -> np.ndarray:
    """Learning rates `[epochs, steps]` of a stage on `num` pictures."""
    return train.learning_rates(
        train.scaled_lr(settings.base_lr, settings.batch_size),
        settings.epochs,
        settings.warmup_epochs,
        math.ceil(num / settings.batch_size),
        per=settings.schedule,
    )


def on_host(tree: Any) -> Any:
    """A copy of a tree of arrays in NumPy."""
    return jax.tree.map(np.array, tree)


def is_finite(tree: Any) -> bool:
    """Whether no number in a tree of NumPy arrays is infinite or NaN."""
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


def make_recipe(run: Run, settings: configs.TrainConfig, stage: str) -> train.Recipe:
    """What is fixed at compile time; only fine-tuning may freeze the head."""
    return train.Recipe(
        optimizer=settings.optimizer,
        dropout=run.config.prompts.dropout,
        shared_dropout=run.config.prompts.dropout_shared,
        deep=run.config.prompts.deep,
        normalisation=run.backbone_info["normalisation"],
        train_head=settings.head or stage != "finetune",
    )


@parallel.everywhere()
def features_of(run: Run) -> jax.Array:
    """Features of the training set without prompts, `[n, d]`.

    Where training draws random crops, those of the centres alone: a linear probe sees
    one view of each picture, and no flips.
    """
    found = train.extract_features(
        run.backbone,
        run.images,
        model=run.model,
        normalisation=run.backbone_info["normalisation"],
        batch_size=run.config.eval_batch_size,
    )
    return jnp.asarray(found[: len(run.labels)])  # many devices hold padding behind


@parallel.everywhere()
def evaluated(run: Run, unit: Unit, trainable: dict[str, Any]) -> dict[str, Any]:
    """The unit's row of the report."""
    deep, counts = run.config.prompts.deep, vpt_jax.counts(trainable["prompts"])
    recipe = train.Recipe(deep=deep, normalisation=run.backbone_info["normalisation"])
    ready = trainable
    if deep:
        kv = vpt_jax.prefill(run.model, run.backbone, trainable["prompts"])
        ready = {**trainable, "prompts": kv}
    size = run.config.eval_batch_size

    def accuracy(split: Split | None) -> float | None:
        if split is None:
            return None
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
        "latency_ms": run.task.test and latency(run, ready, run.task.test, recipe),
        "tuned_params": sum(x.size for x in tuned),
        "seed": unit.seed,
    }


def latency(
    run: Run, ready: dict[str, Any], split: Split, recipe: train.Recipe
) -> float:
    """Milliseconds per picture of the compiled forward pass, median of 9 batches."""
    size = parallel.round_up(run.config.eval_batch_size)
    index = np.arange(size) % len(split.labels)
    # On the devices before the clock starts: the model is timed, not the copy.
    batch = tuple(
        parallel.feed(x) if parallel.parts() > 1 else jax.device_put(x)
        for x in (split.images[index], split.labels[index], np.ones(size, bool))
    )
    times = []
    for _ in range(10):
        start = time.perf_counter()
        train.eval_step(
            ready, run.backbone, *batch, model=run.model, recipe=recipe
        ).block_until_ready()
        times.append(time.perf_counter() - start)
    return round(float(np.median(times[1:])) / size * 1000, 5)
