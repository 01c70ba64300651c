# SPDX-License-Identifier: Apache-2.0
"""Trains prompts and head over all epochs, so that any interruption changes nothing.

The state of a training is its checkpoint: the step number determines the data order,
the random keys and the learning rate. An epoch is one compiled call, or several where
it is long; where calls begin depends on its length alone.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clu.parameter_overview import get_parameter_overview

from vpt_jax import parallel, train
from vpt_jax.files import preemption, states, workdirs
from vpt_jax.prompts import Mask
from vpt_jax.run import config as configs
from vpt_jax.weights.release import flatten

# The mask of an epoch: `(epoch, {'prompts', 'head'} so far) -> mask`.
MaskOf = Callable[[int, dict[str, Any]], Mask]

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


class Call(NamedTuple):
    """One compiled call of a training: which steps of an epoch, and what they left."""

    epoch: int
    start: int
    stop: int
    rates: np.ndarray  # of the epoch, `[steps]`
    mask: Mask | None  # under which it trained
    state: train.TrainState  # donated to the next call
    metrics: dict[str, float]
    num: int  # examples
    seconds: float

    @property
    def whole(self) -> bool:
        """Whether the epoch ends with it."""
        return self.stop == len(self.rates)


def calls(
    state: train.TrainState,
    backbone: Any,
    images: Any,
    labels: jax.Array,
    settings: configs.TrainConfig,
    seed: int,
    *,
    head_rates: tuple[float, float] | None = None,
    mask_of: MaskOf | None = None,
    **static: Any,
) -> Iterator[Call]:
    """The training loop: from the state's step to the last, call by call.

    `state` is donated; `seed` is of the order and the random keys; `head_rates` are as
    in `train.make_optimizer`; `images` and `static` (`model`, `recipe`, `losses_of`) as
    in `train.train_epoch`.
    """
    num, step = len(labels), int(state.step)
    rates = rates_of(settings, num)
    epochs, steps = rates.shape
    lengths = call_lengths(steps, on_features=static["model"] is None)
    ends = list(itertools.accumulate(lengths))
    key, decay = jax.random.key(seed), jnp.float32(settings.weight_decay)
    factors = head_rates and tuple(map(jnp.float32, head_rates))
    mask = None
    while step < epochs * steps:
        epoch, at = divmod(step, steps)
        if mask_of and (at == 0 or mask is None):
            mask = mask_of(epoch, state.trainable)
        order, real = train.epoch_order(seed, epoch, num, settings.batch_size)
        stop = next(end for end in ends if end > at)
        steps_now = (x[at:stop] for x in (order, real, rates[epoch]))
        begin = time.perf_counter()
        given = backbone, images, labels, *steps_now, decay, key, mask, factors
        state, metrics = train.train_epoch(state, *given, **static)
        found = {name: float(value) for name, value in metrics.items()}
        seconds, seen = time.perf_counter() - begin, int(real[at:stop].sum())
        yield Call(epoch, at, stop, rates[epoch], mask, state, found, seen, seconds)
        step += stop - at


def fit(
    job: Fit,
    trainable: dict[str, Any],
    backbone: Any,
    images: Any,
    labels: jax.Array,
    log: workdirs.Log,
    *,
    model: Any,
    watch: Callable[[dict[str, Any]], float] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains, from the newest sound checkpoint if there is one.

    `trainable` is the start; `model` is None where `images` are features; `watch` says
    the accuracy on val of `{'prompts', 'head'}` and is asked ten times, evenly.

    Returns:
      Prompts and head of the last epoch, or of the last one in which all was finite
      (`diverged`); and `seconds`, `epochs` that they saw, `planned_epochs`, the mean
      `losses` of every epoch, and `watched`, pairs of an epoch and its accuracy on val.

    Raises:
      FloatingPointError: If training diverges and `diverged` is "error".
      Preempted: If SIGTERM came; a checkpoint has been saved.
    """
    settings, num = job.settings, len(labels)
    steps = math.ceil(num / settings.batch_size)
    saved = _newest(job, trainable, steps, log)
    overview = get_parameter_overview(flatten(trainable), include_stats=False)
    log.note(f"{job.name} trains\n{overview}")
    state = parallel.held(saved["state"])
    kept, losses = on_host(saved["kept"]), np.array(saved["losses"])
    watched = np.array(saved["watched"])
    sums, seconds = np.array(saved["sums"]), float(saved["seconds"])
    step, saved_at = int(state.step), time.perf_counter()
    given = state, backbone, images, labels, settings, job.seed
    static = {"head_rates": job.head_rates, "model": model, "recipe": job.recipe}
    loop = calls(*given, **static)
    with preemption.deferred():
        for call in loop:
            now = on_host(call.state)
            seconds += call.seconds
            if text := _divergence(job, call, now):
                if job.diverged == "error":
                    raise FloatingPointError(f"{text[0]}; {text[1]}")
                log.line(f"{job.prefix} {text[0]}; ended with epoch {call.epoch}")
                break
            means = [call.num * call.metrics[name] for name in ("loss", "accuracy")]
            sums += np.array([call.seconds, *means])
            step += call.stop - call.start
            if call.whole:
                kept, shown = now.trainable, {"seconds": sums[0]}
                shown |= {"loss": sums[1] / num, "accuracy": sums[2] / num}
                shown["rate"] = float(call.rates[-1])
                sums, losses[call.epoch] = np.zeros(3), shown["loss"]
                epoch = call.epoch + 1, settings.epochs
                if watch and is_watched(*epoch):
                    watched[call.epoch] = shown["val_accuracy"] = watch(kept)
                log.epoch(job.name, *epoch, num, shown, job.prefix)
            else:
                at = f"epoch {call.epoch + 1}/{settings.epochs}, step {call.stop}"
                log.progress(f"{job.prefix} {job.name}: {at} of {steps}")
            last = step == settings.epochs * steps
            due = last or (call.whole and (call.epoch + 1) % job.checkpoint_every == 0)
            # All processes save, or none: process 0 looks at the clock and for SIGTERM.
            late = parallel.agreed(time.perf_counter() - saved_at > _SAVE_EVERY_S)
            stopping = parallel.agreed(preemption.requested())
            if due or late or stopping:
                content = {"state": call.state, "kept": kept, "sums": sums}
                content |= {"losses": losses, "watched": watched}
                content["seconds"] = np.asarray(seconds)
                states.save_checkpoint(job.directory / str(step), content)
                states.remove_checkpoints(job.directory)
                saved_at = time.perf_counter()
            if stopping:
                log.line(f"{job.prefix} {job.name}: SIGTERM, saved after step {step}")
                raise preemption.Preempted
    training = {"seconds": round(seconds, 3), "epochs": step // steps}
    training |= {"planned_epochs": settings.epochs}
    return jax.tree.map(jnp.asarray, kept), training | _curves(losses, watched)


def _curves(losses: np.ndarray, watched: np.ndarray) -> dict[str, list[Any]]:
    """What is known of every epoch, without those that were not trained or watched."""
    pairs = enumerate(watched.tolist(), 1)
    return {
        "losses": [round(x, 6) for x in losses.tolist() if math.isfinite(x)],
        "watched": [[e, round(x, 6)] for e, x in pairs if math.isfinite(x)],
    }


def _newest(
    job: Fit, trainable: dict[str, Any], steps: int, log: workdirs.Log
) -> dict[str, Any]:
    """What the newest sound checkpoint holds, or the start."""
    saved = {
        "state": train.init_state(trainable, job.recipe),
        # Of the last whole epoch: the result, if the next one diverges.
        "kept": trainable,
        # Of the epoch so far: seconds, loss, right answers.
        "sums": np.zeros(3),
        # Of every epoch, if it is over: mean loss, and accuracy on val if it was asked.
        "losses": np.full(job.settings.epochs, np.nan),
        "watched": np.full(job.settings.epochs, np.nan),
        "seconds": np.zeros(()),
    }
    if newest := states.restore_newest(job.directory, saved, log.line):
        number, saved = newest
        where = f"epoch {number // steps}"
        if number % steps:
            where += f", step {number % steps} of {steps}"
        log.line(f"{job.prefix} {job.name}: continuing after {where}")
    return saved


def is_watched(epoch: int, epochs: int) -> bool:
    """Whether the accuracy on val is asked after an epoch, counted from 1."""
    return epoch == epochs or epoch % math.ceil(epochs / 10) == 0


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


def _divergence(job: Fit, call: Call, now: train.TrainState) -> tuple[str, str] | None:
    """Where a call ceased to be finite, and what to do; None if it did not."""
    finite, loss = int(call.metrics["finite_steps"]), call.metrics["loss"]
    if finite == call.stop - call.start and is_finite((now.trainable, now.opt_state)):
        return None
    # Without a loss that says so, the update of the last step did it.
    bad, steps = min(call.start + finite, call.stop - 1), len(call.rates)
    what = "the update" if math.isfinite(loss) else "loss"
    text = (
        f"{job.name}: {what} is not finite at step {call.epoch * steps + bad + 1}"
        f" (epoch {call.epoch + 1}, step {bad + 1} of {steps}) at learning rate"
        f" {call.rates[bad]:g}"
    )
    newest = states.newest_checkpoint(job.directory)
    good = "No checkpoint had been saved."
    if newest:
        good = f"The last good checkpoint is {newest[1]}, after step {newest[0]}."
    return text, f"lower {job.config_key} ({job.settings.base_lr}). {good}"


def on_host(tree: Any) -> Any:
    """A copy of a tree of arrays in NumPy: the arrays may be donated after."""
    return jax.tree.map(np.array, tree)


def is_finite(tree: Any) -> bool:
    """Whether no number in a tree of NumPy arrays is infinite or NaN."""
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))
