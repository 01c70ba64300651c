# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation of prompts and head: pure functions over pytrees.

Two recipes. The reference's (VPT's released code): SGD with momentum 0.9 and coupled
L2, cosine with linear warm-up set once per epoch, learning rate = base / 256 * batch.
And AdamW, with a rate that moves at every step and is the same for every batch size.
Rates and decay are traced, so a sweep over them compiles once. Reading the code, start
at `train_step`; `train_epoch` is a scan over it, over a set that lies on the device.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vpt_jax import parallel
from vpt_jax.data import strips
from vpt_jax.files.checks import check_labels
from vpt_jax.models.inputs import normalise
from vpt_jax.prompts import (
    Mask,
    apply_head,
    check_choice,
    cross_entropy,
    prompt_dropout,
)

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("epoch", "step")  # how often the learning rate moves

# Losses and right answers of a batch: `classify`, or what a study has in its place.
Losses = Callable[..., tuple[jax.Array, jax.Array]]

# Crops have keys of their own, fold_in(fold_in(key, _CROPS), step): no step, of which
# the key is fold_in(key, step), has this number.
_CROPS = 2**31 - 1


class Recipe(NamedTuple):
    """What is fixed at compile time about a stage."""

    optimizer: str = "sgd"
    dropout: float = 0.1  # of prompt elements
    shared_dropout: bool = False  # one mask per step, not one per example
    deep: bool = True
    normalisation: str = "half"
    train_head: bool = True


class TrainState(NamedTuple):
    """Step number, `{'prompts', 'head'}`, and the optimiser's state for those."""

    step: jax.Array
    trainable: dict[str, Any]
    opt_state: Any


def make_optimizer(
    recipe: Recipe, learning_rate: Any, weight_decay: Any, head_rates: Any = None
) -> optax.GradientTransformation:
    """The optimiser of a stage; rates and decay may be traced.

    SGD: `v = 0.9 v + (g + decay * p)`, `p = p - rate * v` (coupled L2, momentum before
    the rate, as PyTorch). The head's bias does not decay (VPT's `solver/optimizer.py`).
    AdamW: decoupled decay, same exception.

    `head_rates` are what the head's kernel and bias have times the rate, by default 1.

    Raises:
      ValueError: If the recipe's optimiser is unknown.
    """
    check_choice("optimizer", recipe.optimizer, OPTIMIZERS)

    def learn(decay: Any, factor: Any = None) -> optax.GradientTransformation:
        if recipe.optimizer == "adamw":
            steps = (optax.scale_by_adam(), optax.add_decayed_weights(decay))
        else:
            steps = (optax.add_decayed_weights(decay), optax.trace(0.9))
        rate = learning_rate if factor is None else factor * learning_rate
        return optax.chain(*steps, optax.scale(-1.0 * rate))

    kernel = bias = optax.set_to_zero()
    if recipe.train_head:
        of_kernel, of_bias = head_rates or (None, None)
        kernel, bias = learn(weight_decay, of_kernel), learn(0.0, of_bias)
    return optax.multi_transform(
        {"prompts": learn(weight_decay), "kernel": kernel, "bias": bias},
        {"prompts": "prompts", "head": {"kernel": "kernel", "bias": "bias"}},
    )


def init_state(trainable: dict[str, Any], recipe: Recipe) -> TrainState:
    """The state before the first step."""
    opt_state = make_optimizer(recipe, 0.0, 0.0).init(trainable)
    return TrainState(jnp.zeros((), jnp.int32), trainable, opt_state)


def predict(
    trainable: dict[str, Any],
    backbone: Any,
    images: jax.Array,
    *,
    model: Any,
    recipe: Recipe,
    key: jax.Array | None = None,
    prompt_mask: Mask | None = None,
) -> jax.Array:
    """Logits `[b, k]` of uint8 `images [b, s, s, 3]`; dropout if a key is given.

    With `model=None`, `images` are features `[b, d]` already (a linear probe). Prompts
    whose `prompt_mask` is False do not take part, as if they had been removed.
    """
    if model is None:
        return apply_head(trainable["head"], images)
    prompts = trainable["prompts"]
    if key is not None and recipe.dropout:
        size = None if recipe.shared_dropout else images.shape[0]
        prompts = prompt_dropout(key, prompts, recipe.dropout, size)
        if size is not None:
            prompts = parallel.spread(prompts)
    features, _ = model.apply(
        {"params": backbone},
        normalise(images, recipe.normalisation),
        prompts=prompts,
        prompt_mask=prompt_mask,
        deep=recipe.deep,
    )
    return apply_head(trainable["head"], features)


def classify(
    trainable: dict[str, Any],
    backbone: Any,
    batch: dict[str, jax.Array],
    key: jax.Array,
    prompt_mask: Mask | None,
    *,
    model: Any,
    recipe: Recipe,
) -> tuple[jax.Array, jax.Array]:
    """Cross entropy `[b]` of a batch, and which answers are right, float32 `[b]`."""
    static = {"model": model, "recipe": recipe}
    given = trainable, backbone, batch["image"]
    logits = predict(*given, key=key, prompt_mask=prompt_mask, **static)
    right = logits.argmax(-1) == batch["label"]
    return cross_entropy(logits, batch), right.astype(jnp.float32)


def train_step(
    state: TrainState,
    backbone: Any,
    batch: dict[str, jax.Array],
    learning_rate: jax.Array,
    weight_decay: jax.Array,
    key: jax.Array,
    prompt_mask: Mask | None = None,
    head_rates: tuple[jax.Array, jax.Array] | None = None,
    *,
    model: Any,
    recipe: Recipe,
    losses_of: Losses = classify,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step.

    Args:
      state: Before the step.
      backbone: Frozen parameters; not differentiated.
      batch: `image [b, s, s, 3]` uint8, `label [b]`, `mask [b]` (False: padding). A
        label that is no class makes the loss and all that is trained NaN.
      learning_rate: Of this step.
      weight_decay: Coupled L2 (SGD) or decoupled (AdamW).
      key: Of the run; the step's own key is `fold_in(key, step)`, so that a restart
        draws the same numbers.
      prompt_mask: Train the network without the prompts whose mask is False: shapes,
        and so the compiled program, are the same for every selection. Those prompts
        get no gradient; `condense` removes them afterwards.
      head_rates: Of the head's kernel and bias, times the rate; see `make_optimizer`.
      model: Static.
      recipe: Static.
      losses_of: Static; what `classify` is: losses and right answers of a batch.

    Returns:
      The state after it, and sums over the real examples: `loss`, `correct`, `count`.
    """

    def loss_fn(trainable: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        step_key = jax.random.fold_in(key, state.step)
        given = trainable, backbone, batch, step_key, prompt_mask
        losses, right = losses_of(*given, model=model, recipe=recipe)
        mask = batch["mask"].astype(jnp.float32)
        loss, count = (losses * mask).sum(), mask.sum()
        sums = {"loss": loss, "correct": (right * mask).sum(), "count": count}
        # The mean over the real examples of a partial last batch, as the reference.
        return loss / count, sums

    grads, sums = jax.grad(loss_fn, has_aux=True)(state.trainable)
    optimizer = make_optimizer(recipe, learning_rate, weight_decay, head_rates)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    trainable = jax.tree.map(jnp.add, state.trainable, updates)
    return TrainState(state.step + 1, trainable, opt_state), sums


@functools.partial(
    jax.jit, static_argnames=("model", "recipe", "losses_of"), donate_argnums=0
)
def train_epoch(
    state: TrainState,
    backbone: Any,
    images: jax.Array | strips.Strip,
    labels: jax.Array,
    order: jax.Array,
    mask: jax.Array,
    learning_rates: jax.Array,
    weight_decay: jax.Array,
    key: jax.Array,
    prompt_mask: Mask | None = None,
    head_rates: tuple[jax.Array, jax.Array] | None = None,
    *,
    model: Any,
    recipe: Recipe,
    losses_of: Losses = classify,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One epoch on the device: `train_step`, whose arguments it takes, many times.

    `state` is donated. `images` are the resident set, uint8 `[n, s, s, 3]`, or a strip
    of it, of which every step sees other crops (`strips.take`); `labels` int32 `[n]`.
    `order` holds indices `[steps, b]`, see `epoch_order`, and `mask` is False where
    they are padding; under the mesh of `parallel.everywhere` each device computes its
    part of a batch. `learning_rates` are `[steps]`.

    Returns:
      The state, mean `loss` and `accuracy` over the epoch's examples, and
      `finite_steps`: how many steps came before the first whose loss is not finite.
    """

    def step(state: TrainState, xs: tuple) -> tuple[TrainState, dict[str, jax.Array]]:
        index, real, rate = xs
        crop_key = jax.random.fold_in(jax.random.fold_in(key, _CROPS), state.step)
        image = strips.take(images, index, crop_key)
        batch = {"image": image, "label": labels[index], "mask": real}
        state, batch = parallel.whole(state), parallel.spread(batch)
        rates = rate, weight_decay, key, prompt_mask, head_rates
        static = {"model": model, "recipe": recipe, "losses_of": losses_of}
        return train_step(state, backbone, batch, *rates, **static)

    # Random numbers are drawn in order, so more examples behind change none of them.
    padding = (0, 0), (0, parallel.round_up(order.shape[1]) - order.shape[1])
    order, mask = jnp.pad(order, padding), jnp.pad(mask, padding)
    state, sums = jax.lax.scan(step, state, (order, mask, learning_rates))
    state = parallel.whole(state)
    total = {name: value.sum() for name, value in sums.items()}
    count = total.pop("count")
    return state, {
        "loss": total["loss"] / count,
        "accuracy": total["correct"] / count,
        "finite_steps": jnp.isfinite(sums["loss"]).astype(jnp.int32).cumprod().sum(),
    }


def epoch_order(
    seed: int, epoch: int, num: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """A seeded permutation in batches; the last one padded.

    Returns:
      Indices `[ceil(num / batch_size), batch_size]` int32, and the mask of real ones.
    """
    steps = math.ceil(num / batch_size)
    mask = np.arange(steps * batch_size) < num
    order = np.zeros(len(mask), np.int32)
    order[:num] = np.random.default_rng((seed, epoch)).permutation(num)
    return order.reshape(steps, -1), mask.reshape(steps, -1)


def scaled_lr(base_lr: float, batch_size: int, optimizer: str = "sgd") -> float:
    """The rate of a step.

    SGD: the reference's linear rule, `base / 256 * batch`. AdamW's steps do not depend
    on the size of the gradient, and so not on the batch: `base` itself.
    """
    return base_lr if optimizer == "adamw" else base_lr / 256 * batch_size


def learning_rates(
    lr: float,
    epochs: int,
    warmup_epochs: float | int,
    steps: int,
    *,
    per: str = "epoch",
) -> np.ndarray:
    """Linear warm-up from 0, then cosine to 0.

    `per="epoch"` holds the rate during an epoch, as the reference does (its first epoch
    has rate 0 and its last is not quite 0); `per="step"` moves at every step.

    Returns:
      float32 `[epochs, steps]`.

    Raises:
      ValueError: If `per` is unknown or the warm-up is not shorter than the training.
    """
    check_choice("schedule", per, SCHEDULES)
    if not 0 <= warmup_epochs < epochs:
        raise ValueError(
            f"warmup_epochs is {warmup_epochs} of {epochs} epochs; expected 0 <= it <"
            " epochs."
        )
    t = np.arange(epochs)[:, None] + np.zeros(steps)
    if per == "step":
        # The middle of the step: no step is wasted on a rate of exactly 0.
        t = t + (np.arange(steps) + 0.5) / steps
    progress = (t - warmup_epochs) / (epochs - warmup_epochs)
    cosine = 0.5 * (1 + np.cos(np.pi * np.clip(progress, 0, 1)))
    factor = np.where(t < warmup_epochs, t / (warmup_epochs or 1), cosine)
    return (lr * factor).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("model", "recipe"))
def eval_step(
    trainable: dict[str, Any],
    backbone: Any,
    images: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    prompt_mask: Mask | None = None,
    *,
    model: Any,
    recipe: Recipe,
) -> jax.Array:
    """Which answers of a batch are right, bool `[b]`; padding never is.

    `trainable["prompts"]` may be what `prefill` made of them.
    """
    given = trainable, backbone, parallel.spread(images)
    logits = predict(*given, model=model, recipe=recipe, prompt_mask=prompt_mask)
    return parallel.whole((logits.argmax(-1) == labels) & mask)


def evaluate(
    trainable: dict[str, Any],
    backbone: Any,
    images: Any,
    labels: np.ndarray,
    **settings: Any,
) -> float:
    """Accuracy in [0, 1]: the mean of `answers`, whose arguments it takes."""
    right = answers(trainable, backbone, images, labels, **settings)
    return int(right.sum()) / len(labels)


def answers(
    trainable: dict[str, Any],
    backbone: Any,
    images: Any,
    labels: np.ndarray,
    *,
    model: Any,
    recipe: Recipe,
    batch_size: int,
    prompt_mask: Mask | None = None,
) -> np.ndarray:
    """Which pictures are classified right, bool `[n]`; the last batch is padded.

    `images` may be a memory map that is larger than memory, see `strips.batches`.

    Raises:
      ValueError: If labels are not one class of the head for each picture.
    """
    check_labels(labels, trainable["head"]["bias"].shape[-1], strips.count(images))

    def step(batch: Any, index: np.ndarray, mask: np.ndarray) -> Any:
        given = trainable, backbone, batch, labels[index], mask, prompt_mask
        return eval_step(*given, model=model, recipe=recipe)

    return by_batches(step, images, batch_size)


def by_batches(step: Callable[..., jax.Array], images: Any, size: int) -> np.ndarray:
    """What `step(batch, index, mask)` says of all pictures, see `strips.batches`."""
    found = (step(*batch) for batch in strips.batches(images, size))
    return np.concatenate(list(parallel.one_late(found)))[: strips.count(images)]


@functools.partial(jax.jit, static_argnames=("model", "recipe"))
def probabilities(
    trainable: dict[str, Any],
    backbone: Any,
    images: jax.Array,
    *,
    model: Any,
    recipe: Recipe,
) -> jax.Array:
    """Of each class, float `[b, k]`: the softmax of `predict`."""
    images = parallel.spread(images)
    logits = predict(trainable, backbone, images, model=model, recipe=recipe)
    return parallel.whole(jax.nn.softmax(logits))
