# SPDX-License-Identifier: Apache-2.0
"""Trains prompts and head over all epochs, so that any interruption changes nothing.

The state of a training is its checkpoint and nothing else: the step number determines
the data order, the random keys and the learning rate. An epoch is one compiled call,
or several where it is long; where calls begin depends on its length alone, so that an
interrupted training computes what an undisturbed one does. Between calls SIGTERM and
the numbers are looked at.
"""

import itertools
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clu.parameter_overview import get_parameter_overview

from vpt_jax import parallel, train
from vpt_jax.files import preemption, states, workdirs
from vpt_jax.run import config as configs
from vpt_jax.weights.checkpoint import flatten

# What SIGTERM waits for at most. On features a step takes microseconds.
_CALL_STEPS = {"cpu": 5}
_CALL_STEPS_ELSEWHERE = 50
_CALL_STEPS_ON_FEATURES = 1000
_SAVE_EVERY_S = 300.0  # a kill loses no more of an epoch that is longer


class Fit(NamedTuple):
    """What a training is called, its recipe, and where its checkpoints lie."""

    name: str
    prefix: str
    config_key: str  # of the learning rate, for error messages
    settings: configs.TrainConfig
    recipe: train.Recipe
    seed: int
    directory: Path
    checkpoint_every: int  # epochs
    diverged: str
    head_rates: tuple[float, float] | None = None  # see `train.make_optimizer`


def fit(
    job: Fit,
    trainable: dict[str, Any],
    backbone: Any,
    images: Any,
    labels: jax.Array,
    log: workdirs.Log,
    *,
    model: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains, from the newest sound checkpoint if there is one.

    Returns:
      Prompts and head of the last epoch, or of the last one in which all was finite
      (`diverged`); and `seconds`, `epochs` that they saw, `planned_epochs`, and the
      `losses` of the first epoch and the last.

    Raises:
      FloatingPointError: If training diverges and `diverged` is "error".
      Preempted: If SIGTERM came; a checkpoint has been saved.
    """
    settings, num = job.settings, len(labels)
    steps = math.ceil(num / settings.batch_size)
    calls = call_lengths(steps, on_features=model is None)
    ends = list(itertools.accumulate(calls))
    rates = rates_of(settings, num)
    saved = {
        "state": train.init_state(trainable, job.recipe),
        # Of the last whole epoch: the result, if the next one diverges.
        "kept": trainable,
        # Of the epoch so far: seconds, loss, right answers.
        "sums": np.zeros(3),
        # Mean losses of the first whole epoch and of the last.
        "losses": np.full(2, np.nan),
        "seconds": np.zeros(()),
    }
    if newest := states.restore_newest(job.directory, saved, log.line):
        number, saved = newest
        where = f"epoch {number // steps}"
        if number % steps:
            where += f", step {number % steps} of {steps}"
        log.line(f"{job.prefix} {job.name}: continuing after {where}")
    overview = get_parameter_overview(flatten(trainable), include_stats=False)
    log.note(f"{job.name} trains\n{overview}")
    state = parallel.held(saved["state"])
    kept, sums = on_host(saved["kept"]), np.array(saved["sums"])
    losses = np.array(saved["losses"])
    seconds, key = float(saved["seconds"]), jax.random.key(job.seed)
    weight_decay, step = jnp.float32(settings.weight_decay), int(state.step)
    head_rates = job.head_rates and tuple(map(jnp.float32, job.head_rates))
    last_saved, saved_at = step, time.perf_counter()

    def save() -> None:
        nonlocal last_saved, saved_at
        if step != last_saved:
            content = {"state": state, "kept": kept, "sums": sums, "losses": losses}
            content["seconds"] = np.asarray(seconds)
            states.save_checkpoint(job.directory / str(step), content)
            states.remove_checkpoints(job.directory)
            last_saved, saved_at = step, time.perf_counter()

    with preemption.deferred():
        while step < settings.epochs * steps:
            epoch, at = divmod(step, steps)
            order, mask = train.epoch_order(job.seed, epoch, num, settings.batch_size)
            stop = next(end for end in ends if end > at)
            start = time.perf_counter()
            state, metrics = train.train_epoch(
                state,
                backbone,
                images,
                labels,
                order[at:stop],
                mask[at:stop],
                rates[epoch, at:stop],
                weight_decay,
                key,
                head_rates=head_rates,
                model=model,
                recipe=job.recipe,
            )
            found = {name: float(value) for name, value in metrics.items()}
            now = on_host(state)
            elapsed = time.perf_counter() - start
            seconds += elapsed
            finite = int(found["finite_steps"])
            if finite < stop - at or not is_finite((now.trainable, now.opt_state)):
                # Without a loss that says so, the update of the last step did it.
                bad = min(at + finite, stop - 1)
                rate = float(rates[epoch, bad])
                text = _divergence(job, steps, epoch, bad, rate, found)
                if job.diverged == "error":
                    raise FloatingPointError(
                        f"{text}; lower {job.config_key} ({settings.base_lr})."
                        f" {_last_good(job.directory)}"
                    )
                log.line(f"{job.prefix} {text}; ended with epoch {epoch}")
                break
            real = int(mask[at:stop].sum())
            parts = elapsed, found["loss"] * real, found["accuracy"] * real
            sums = sums + np.array(parts)
            step += stop - at
            if stop == steps:
                kept = now.trainable
                shown = {"loss": sums[1] / num, "accuracy": sums[2] / num}
                shown["seconds"] = sums[0]
                sums = np.zeros(3)
                losses[int(epoch > 0) :] = shown["loss"]
                log.epoch(job.name, epoch + 1, settings.epochs, num, shown, job.prefix)
            due = stop == steps and (epoch + 1) % job.checkpoint_every == 0
            # All processes save, or none: process 0 looks at the clock and for SIGTERM.
            late = parallel.agreed(time.perf_counter() - saved_at > _SAVE_EVERY_S)
            stopping = parallel.agreed(preemption.requested())
            if due or late or stopping or step == settings.epochs * steps:
                save()
            if stopping:
                log.line(f"{job.prefix} {job.name}: SIGTERM, saved after step {step}")
                raise preemption.Preempted
    training = {
        "seconds": round(seconds, 3),
        "epochs": step // steps,
        "planned_epochs": settings.epochs,
        "losses": [round(float(x), 6) for x in losses if math.isfinite(x)],
    }
    return jax.tree.map(jnp.asarray, kept), training


def rates_of(settings: configs.TrainConfig, num: int) -> np.ndarray:
    """Learning rates `[epochs, steps]` of a stage on `num` pictures."""
    return train.learning_rates(
        train.scaled_lr(settings.base_lr, settings.batch_size, settings.optimizer),
        settings.epochs,
        settings.warmup_epochs,
        math.ceil(num / settings.batch_size),
        per=settings.schedule,
    )


def call_lengths(steps: int, *, on_features: bool = False) -> list[int]:
    """How many steps each compiled call of an epoch has: few lengths compile rarely."""
    most = _CALL_STEPS.get(jax.default_backend(), _CALL_STEPS_ELSEWHERE)
    if on_features:
        most = _CALL_STEPS_ON_FEATURES
    most = min(most, steps)
    # Another length is another compilation, which costs a CPU more than calls do.
    least = 1 if jax.default_backend() == "cpu" else most // 2 + 1
    for length in range(most, least - 1, -1):
        if steps % length == 0:
            return [length] * (steps // length)
    return [len(part) for part in np.array_split(range(steps), -(-steps // most))]


def _divergence(
    job: Fit,
    steps: int,
    epoch: int,
    bad: int,
    rate: float,
    found: dict[str, float],
) -> str:
    what = "loss" if not math.isfinite(found["loss"]) else "the update"
    return (
        f"{job.name}: {what} is not finite at step {epoch * steps + bad + 1} (epoch"
        f" {epoch + 1}, step {bad + 1} of {steps}) at learning rate {rate:g}"
    )


def _last_good(directory: Path) -> str:
    newest = states.newest_checkpoint(directory)
    if newest is None:
        return "No checkpoint had been saved."
    return f"The last good checkpoint is {newest[1]}, after step {newest[0]}."


def on_host(tree: Any) -> Any:
    """A copy of a tree of arrays in NumPy: the arrays may be donated after."""
    return jax.tree.map(np.array, tree)


def is_finite(tree: Any) -> bool:
    """Whether no number in a tree of NumPy arrays is infinite or NaN."""
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))
