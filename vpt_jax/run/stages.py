# SPDX-License-Identifier: Apache-2.0
"""What happens to one model of a run: start, train, release, evaluate.

A unit is finished when its row lies in `results/`, a training when its prompts lie in
`prompts/`. What a unit builds on it reads from the workdir, or makes: what is damaged
there counts as missing.
"""

import functools
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import vpt_jax
from vpt_jax import parallel, train
from vpt_jax.data.strips import Strip, view
from vpt_jax.data.tasks import Split, Task
from vpt_jax.files import durable, workdirs
from vpt_jax.models.inputs import normalise
from vpt_jax.prompts import Mask
from vpt_jax.run import config as configs
from vpt_jax.run import fitting, probe


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
        score = self.score and self.score.replace(":", "-")  # module:function
        parts = [f"seed{self.seed}", self.stage, score, self.scope]
        if self.keep_ratio not in (0.0, 1.0):
            parts.append(f"{100 * self.keep_ratio:g}percent")
        return "-".join(p for p in parts if p)

    @property
    def trains_as(self) -> str:
        """The group of the config that says how it is trained."""
        return "tune" if self.stage == "scratch" else self.stage


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
    log: workdirs.Log
    doubts: tuple[str, ...] = ()  # about the data


def run_unit(run: Run, unit: Unit, prefix: str = "") -> dict[str, Any]:
    """The unit's row and seconds; from disk if it is finished."""
    path = run.workdir / "results" / f"{unit.name}.json"
    result = workdirs.sound_record(path, run.log.line)
    if result and not _rotten(run, unit):
        run.log.line(f"{prefix} {unit.name}: done before")
        return result
    trainable, training = trained(run, unit, prefix)
    row = evaluated(run, unit, trainable)
    kept = ["decay", "losses", "watched"]
    if training["epochs"] < training["planned_epochs"]:
        kept += ["epochs", "planned_epochs"]
    row |= {k: training[k] for k in kept if k in training and training[k] != []}
    result = {"row": row, "seconds": training["seconds"]}
    if workdirs.writes():
        workdirs.write_record(path, result)
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
    path, record_path = _released(run, unit)
    record = workdirs.sound_record(record_path, run.log.line)
    if record and workdirs.exists(path) and not _rotten(run, unit):
        del record["prompts"]
        saved = vpt_jax.load_prompts(path, backbone=run.backbone_info["hash"])
        return {"prompts": saved.prompts, "head": saved.head}, record
    trainable = starting_point(run, unit)
    training = {"seconds": 0.0, "epochs": 0, "planned_epochs": 0}
    if unit.stage != "condense":
        trainable, training = fit(run, unit, trainable, prefix)
    release(run, unit, trainable, training)
    return trainable, training


def release(
    run: Run, unit: Unit, trainable: dict[str, Any], training: dict[str, Any]
) -> None:
    """Writes prompts and head, and the record that their training is finished."""
    if not workdirs.writes():
        return
    path, record_path = _released(run, unit)
    info = run.backbone_info
    # The record first: prompts without one would not be trusted.
    with workdirs.atomic_path(path) as temporary:
        vpt_jax.save_prompts(
            temporary,
            trainable["prompts"],
            trainable["head"],
            model=run.model,
            backbone=info["hash"],
            backbone_name=info["name"],
            normalisation=info["normalisation"],
            class_names=run.task.class_names,
            deep=run.config.prompts.deep,
            resize=run.task.resize,
            source=run.config.backbone.checkpoint,
            load=info["load"],
        )
        prompts = durable.digest(temporary)
        workdirs.write_record(record_path, {**training, "prompts": prompts})


def _released(run: Run, unit: Unit) -> tuple[Path, Path]:
    """Where a unit's prompts lie, and the record of their training."""
    prompts = run.workdir / "prompts" / f"{unit.name}.safetensors"
    return prompts, run.workdir / "checkpoints" / unit.name / "training.json"


def _rotten(run: Run, unit: Unit) -> bool:
    """Whether released prompts are not those of their record; they are moved aside."""
    path, record_path = _released(run, unit)
    if not (workdirs.exists(path) and workdirs.exists(record_path)):
        return False  # a finished run may have been tidied up
    record = workdirs.sound_record(record_path, run.log.line)
    if not record:
        return False
    rotten = workdirs.writes() and durable.digest(path) != record["prompts"]
    if not parallel.agreed(rotten):
        return False
    workdirs.set_aside(path, run.log.line)
    return True


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
    init = settings.init if unit.stage != "linear" else "reference"
    prompts = vpt_jax.init_prompts(
        prompt_key,
        run.model,
        settings.num_prompts,
        deep=settings.deep,
        init=init,
        tokens=tokens_of(run) if init in ("tokens", "kmeans") else None,
    )
    if unit.stage == "linear":
        prompts = tuple(p[:0] for p in prompts)
    if unit.stage == "scratch":
        # The same share of every layer, as VPT with fewer prompts would have.
        even = tuple(jnp.zeros(n) for n in vpt_jax.counts(prompts))
        mask = vpt_jax.keep_mask(even, keep_ratio=unit.keep_ratio, scope="layer")
        prompts = vpt_jax.condense(prompts, mask)
    if unit.stage != "linear" and settings.head_init == "probe":
        found, _ = trained(run, Unit("linear", unit.seed, keep_ratio=0.0))
        return {"prompts": prompts, "head": found["head"]}
    init = "zeros" if settings.head_init == "zeros" else "reference"
    num = len(run.task.class_names)
    head = vpt_jax.init_head(head_key, run.model.width, num, init=init)
    return {"prompts": prompts, "head": head}


def scores_of(run: Run, seed: int, score: str) -> tuple[jax.Array, ...]:
    """Importance of the tuned prompts over the training set; kept in `scores/`."""
    path = run.workdir / "scores" / f"seed{seed}-{score.replace(':', '-')}.json"
    if record := workdirs.sound_record(path, run.log.line):
        return tuple(jnp.asarray(s, jnp.float32) for s in record["layers"])
    tuned, _ = trained(run, Unit("tune", seed))
    start = time.perf_counter()
    key = jax.random.fold_in(jax.random.key(seed), 1)
    scores = score_over(run, tuned, score, key=key)
    scores = jax.tree.map(jnp.asarray, fitting.on_host(scores))  # on one device
    seconds = time.perf_counter() - start
    if workdirs.writes():
        layers = [np.asarray(s).tolist() for s in scores]
        workdirs.write_record(path, {"score": score, "seed": seed, "layers": layers})
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
        score=configs.find_score(score),
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
    """Trains a unit, from its newest checkpoint if there is one; see `fitting.fit`."""
    settings: configs.TrainConfig = getattr(run.config, unit.trains_as)
    model, images = run.model, run.images
    if settings.optimizer == "lbfgs":
        return fit_linear(run, trainable, settings.weight_decay)
    if unit.stage == "linear":  # frozen features never change: computed once
        model, images = None, features_of(run)
    job = fitting.Fit(
        name=unit.name,
        prefix=prefix,
        config_key=f"config.{unit.trains_as}.base_lr",
        settings=settings,
        recipe=make_recipe(run, settings, unit.stage),
        seed=unit.seed,
        directory=run.workdir / "checkpoints" / unit.name,
        checkpoint_every=run.config.checkpoint_every,
        diverged=run.config.diverged,
        head_rates=head_rates_of(run, settings),
    )
    watch = None
    if run.config.task.splits == "all" and run.task.val and unit.stage != "linear":
        watch = functools.partial(accuracy_on_some, run, run.task.val)
    given = trainable, run.backbone, images, run.labels, run.log
    return fitting.fit(job, *given, model=model, watch=watch)


def head_rates_of(
    run: Run, settings: configs.TrainConfig
) -> tuple[float, float] | None:
    """Rates of the head's kernel and bias over the prompts', see `TrainConfig`.

    AdamW's steps have one size: the kernel's is divided by the features' deviation.
    """
    if not settings.head_lr:
        return None
    share = settings.head_lr / settings.base_lr
    return share / probe.feature_scale(np.asarray(features_of(run))), share


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


def fit_linear(
    run: Run, trainable: dict[str, Any], decay: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The regularised linear probe; its decay is chosen on val where there is one."""
    start, val = time.perf_counter(), run.task.val
    features, labels = np.asarray(features_of(run)), np.asarray(run.labels)
    decays = probe.DECAYS if val else (decay,)
    probes = probe.fit_probes(
        features, labels[: len(features)], len(run.task.class_names), decays
    )
    if val:
        best = probe.best_probe(probes, _features(run, val.images), val.labels)
    else:
        best = next(probes)
    head = {k: jnp.asarray(v, jnp.float32) for k, v in best.head.items()}
    seconds = round(time.perf_counter() - start, 3)
    training = {"seconds": seconds, "epochs": 0, "planned_epochs": 0}
    return {**trainable, "head": head}, {**training, "decay": best.decay}


_KNOWN: list[Any] = []  # pictures, backbone, and their features: of one training set


def features_of(run: Run) -> jax.Array:
    """Features of the training set without prompts, `[n, d]`; kept until another's.

    Where training draws random crops, those of the centres alone.
    """
    if not _KNOWN or _KNOWN[0] is not run.images or _KNOWN[1] is not run.backbone:
        found = _features(run, run.images)[: len(run.labels)]  # padding lies behind
        _KNOWN[:] = run.images, run.backbone, jnp.asarray(found)
    return _KNOWN[2]


@parallel.everywhere()
def _features(run: Run, images: Any) -> np.ndarray:
    return probe.extract_features(
        run.backbone,
        images,
        model=run.model,
        normalisation=run.backbone_info["normalisation"],
        batch_size=run.config.eval_batch_size,
    )


@parallel.everywhere()
def tokens_of(run: Run) -> tuple[np.ndarray, ...]:
    """Tokens that enter each block on 64 training pictures, the same for all seeds."""
    num = len(run.labels)
    index = np.random.default_rng(0).permutation(num)[:64]
    image = view(run.images, jnp.asarray(index))
    image = normalise(image, run.backbone_info["normalisation"])
    return vpt_jax.block_tokens(run.model, run.backbone, image)


def fixed_of(run: Run) -> dict[str, Any]:
    """The keywords of `train.predict`: nothing is dropped."""
    deep, rule = run.config.prompts.deep, run.backbone_info["normalisation"]
    return {"model": run.model, "recipe": train.Recipe(deep=deep, normalisation=rule)}


def prefilled(run: Run, trainable: dict[str, Any]) -> dict[str, Any]:
    """Prompts and head as `train.predict` is fastest with."""
    if not run.config.prompts.deep:
        return trainable
    # Their keys and values do not depend on the picture.
    kv = vpt_jax.prefill(run.model, run.backbone, trainable["prompts"])
    return {**trainable, "prompts": kv}


def accuracy_on(run: Run, ready: dict[str, Any], split: Split) -> float:
    """Share of right answers of what `prefilled` returns."""
    given, size = (ready, run.backbone, *split), run.config.eval_batch_size
    return train.evaluate(*given, **fixed_of(run), batch_size=size)


def accuracy_on_some(run: Run, split: Split, trainable: dict[str, Any]) -> float:
    """Of at most 256 pictures, evenly: what a curve needs, at little cost."""
    num = len(split.labels)
    index = np.arange(0, num, math.ceil(num / 256))
    some = Split(split.images[index], split.labels[index])
    return accuracy_on(run, prefilled(run, jax.tree.map(jnp.asarray, trainable)), some)


@parallel.everywhere()
def evaluated(run: Run, unit: Unit, trainable: dict[str, Any]) -> dict[str, Any]:
    """The unit's row of the report."""
    deep, counts = run.config.prompts.deep, vpt_jax.counts(trainable["prompts"])
    ready, test = prefilled(run, trainable), run.task.test
    middle, spread = latency(run, ready, test) if test else (None, None)
    return {
        "stage": unit.stage,
        "score": unit.score,
        "scope": unit.scope,
        "keep_ratio": unit.keep_ratio,
        "counts": list(counts),
        "val_accuracy": run.task.val and accuracy_on(run, ready, run.task.val),
        "test_accuracy": test and accuracy_on(run, ready, test),
        "macs": vpt_jax.macs(run.model, counts, deep=deep),
        "macs_reference": vpt_jax.macs(
            run.model, counts, deep=deep, formulation="tokens"
        ),
        "latency_ms": middle,
        "latency_spread": spread,
        "tuned_params": sum(x.size for x in jax.tree.leaves(trainable)),
        "seed": unit.seed,
    }


def latency(run: Run, ready: dict[str, Any], split: Split) -> tuple[float, float]:
    """Milliseconds per picture of the compiled forward pass: the median of 9 batches.

    And half of their interquartile range.
    """
    size = parallel.round_up(run.config.eval_batch_size)
    index = np.arange(size) % len(split.labels)
    # On the devices before the clock starts: the model is timed, not the copy.
    put = parallel.feed if parallel.parts() > 1 else jax.device_put
    images, labels = split.images[index], split.labels[index]
    batch = tuple(map(put, (images, labels, np.ones(size, bool))))
    fixed, times = fixed_of(run), []
    for _ in range(10):
        start = time.perf_counter()
        train.eval_step(ready, run.backbone, *batch, **fixed).block_until_ready()
        times.append(time.perf_counter() - start)
    low, middle, high = np.quantile(times[1:], (0.25, 0.5, 0.75)) / size * 1000
    return round(float(middle), 5), round(float(high - low) / 2, 5)
