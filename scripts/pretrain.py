# SPDX-License-Identifier: Apache-2.0
r"""Trains the small demo backbone from scratch.

python -m scripts.pretrain --config=configs/pretrain_demo.py --workdir=out/pretrain \
    --config.data=cifar10_jpeg.zip

AdamW, cosine, crop and flip, label smoothing, the picture side growing in stages. With
`--config.teacher=FILE` (DINOv2-S/14) the backbone learns to predict the teacher's
features of every picture, and labels train the head alone. Saves a checkpoint per epoch
and continues from the newest one; at the end it writes `backbone.safetensors` (float16)
and `model_card.json` into the workdir.
"""

import contextlib
import functools
import io
import json
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import FrozenConfigDict

from vpt_jax.files import cli, durable, preemption, states, workdirs
from vpt_jax.models.inputs import normalise
from vpt_jax.models.posemb import resize_pos_embedding
from vpt_jax.models.vit import ViT
from vpt_jax.prompts import apply_head, init_head
from vpt_jax.weights.checkpoint import load_backbone, save_backbone
from vpt_jax.weights.release import backbone_hash


class State(NamedTuple):
    """Step number, parameters `{'backbone', 'head'}` and the optimiser's state."""

    step: jax.Array
    params: Any
    opt_state: Any


def resize(images: jax.Array, side: int) -> jax.Array:
    """Bilinear resize of `[b, h, w, 3]` to `side`, antialiased when shrinking."""
    if images.shape[1:3] == (side, side):
        return images
    shape = (images.shape[0], side, side, images.shape[3])
    out = jax.image.resize(images.astype(jnp.float32), shape, "bilinear")
    return jnp.round(out).astype(images.dtype)


def crop_and_flip(key: jax.Array, images: jax.Array, pad: int) -> jax.Array:
    """Random shift by up to `pad` pixels (zeros outside), random horizontal flip."""
    b, h, w, c = images.shape
    shift_key, flip_key = jax.random.split(key)
    shifts = jax.random.randint(shift_key, (b, 2), 0, 2 * pad + 1)
    flips = jax.random.bernoulli(flip_key, 0.5, (b,))
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

    def one(image: jax.Array, shift: jax.Array, flip: jax.Array) -> jax.Array:
        image = jax.lax.dynamic_slice(image, (shift[0], shift[1], 0), (h, w, c))
        return jnp.where(flip, image[:, ::-1], image)

    return jax.vmap(one)(padded, shifts, flips)


def read_zip(path: str | Path, split: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Pictures `[n, h, w, 3]` uint8, labels `[n]` and class names of one split."""
    from PIL import Image

    if not Path(path).is_file():
        raise ValueError(
            f"no such file: {path}; pass --config.data=ZIP, a zip of"
            " train/<class>/*.jpg and test/<class>/*.jpg."
        )
    with zipfile.ZipFile(path) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith(f"{split}/"))
        names = [n for n in names if n.lower().endswith((".jpg", ".jpeg", ".png"))]
        if not names:
            raise ValueError(f"{path} holds no pictures {split}/<class>/*.jpg.")
        classes = sorted({n.split("/")[1] for n in names})
        images = [
            np.asarray(Image.open(io.BytesIO(archive.read(n))).convert("RGB"))
            for n in names
        ]
    labels = np.array([classes.index(n.split("/")[1]) for n in names], np.int32)
    return np.stack(images), labels, classes


def teacher_features(
    config: Any, images: np.ndarray, path: Path, log: workdirs.Log
) -> np.ndarray:
    """Features of the teacher, `[n, d]` float16, each of mean 0 and deviation 1.

    They are computed once and kept at `path`: minutes.
    """
    if path.is_file():
        return np.load(path)
    model, params = load_backbone(
        config.teacher_variant,
        config.teacher,
        image_size=config.teacher_side,
        resize="bicubic",  # DINOv2's rule for its position table
    )

    @jax.jit
    def apply(params: Any, images: jax.Array) -> jax.Array:
        batch = normalise(resize(images, config.teacher_side), "imagenet")
        return model.apply({"params": params}, batch)[0]

    parts = []
    for i in range(0, len(images), 100):
        parts.append(apply(params, images[i : i + 100]))
        log.progress(f"teacher: {i}/{len(images)} pictures")
    found = np.concatenate(parts)
    found = ((found - found.mean(0)) / found.std(0)).astype(np.float16)
    with durable.atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, found)
    return found


def optimiser(config: Any, steps_per_epoch: int) -> optax.GradientTransformation:
    """AdamW, warm-up and cosine, clipped gradients; vectors do not decay."""
    epochs = sum(n for _, n in config.stages)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        config.warmup_epochs * steps_per_epoch,
        epochs * steps_per_epoch,
    )
    one = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )
    if not config.teacher:
        return one
    # Apart, or the head's gradient would shorten the backbone's.
    own = {"backbone": "backbone", "teacher": "backbone", "head": "head"}
    return optax.partition({"backbone": one, "head": one}, own)


@functools.partial(jax.jit, static_argnames=("model", "tx", "config"), donate_argnums=0)
def train_steps(
    state: State,
    images: jax.Array,
    labels: jax.Array,
    targets: jax.Array | None,
    order: jax.Array,
    *,
    model: ViT,
    tx: optax.GradientTransformation,
    config: Any,
) -> tuple[State, jax.Array]:
    """Runs `order.shape[0]` steps on batches `order [steps, b]`; mean loss.

    `targets [n, d]` are a teacher's features of the pictures, if there is one.
    """

    def step(state: State, index: jax.Array) -> tuple[State, jax.Array]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        batch = crop_and_flip(key, images[index], config.crop_pad)
        batch = normalise(resize(batch, model.image_size), config.normalisation)

        def loss_fn(params: Any) -> jax.Array:
            features, _ = model.apply({"params": params["backbone"]}, batch)
            distance = 0.0
            if targets is not None:
                error = apply_head(params["teacher"], features) - targets[index]
                distance = jnp.square(error).mean()
                features = jax.lax.stop_gradient(features)
            logits = apply_head(params["head"], features)
            target = optax.smooth_labels(
                jax.nn.one_hot(labels[index], logits.shape[-1]), config.label_smoothing
            )
            return distance + optax.softmax_cross_entropy(logits, target).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(state.step + 1, params, opt_state), loss

    state, losses = jax.lax.scan(step, state, order)
    return state, losses.mean()


@functools.partial(jax.jit, static_argnames=("model", "normalisation"))
def count_correct(
    params: Any, images: jax.Array, labels: jax.Array, *, model: ViT, normalisation: str
) -> jax.Array:
    """Number of right answers in one batch."""
    batch = normalise(resize(images, model.image_size), normalisation)
    features, _ = model.apply({"params": params["backbone"]}, batch)
    return (apply_head(params["head"], features).argmax(-1) == labels).sum()


def accuracy(params: Any, data: tuple, model: ViT, normalisation: str) -> float:
    """Share of right answers; the last batch may be smaller (one more compilation)."""
    images, labels = data[:2]
    right = 0
    for i in range(0, len(labels), 500):
        part = slice(i, i + 500)
        right += int(
            count_correct(
                params,
                images[part],
                labels[part],
                model=model,
                normalisation=normalisation,
            )
        )
    return right / len(labels)


def resized_state(state: State, grid: int) -> State:
    """The state with every position table (moments too) resized to `grid`."""

    def leaf(path: Any, x: jax.Array) -> jax.Array:
        if "pos_embedding" not in jax.tree_util.keystr(path):
            return x
        return resize_pos_embedding(x, grid)

    return jax.tree_util.tree_map_with_path(leaf, state)


def run(config: Any, workdir: Path) -> dict[str, Any]:
    """Trains, or continues, and writes the weights with their model card."""
    train, test = read_zip(config.data, "train"), read_zip(config.data, "test")
    log = workdirs.Log(workdir / "log.txt", workdir / "events")
    classes = train[2]
    per_epoch = len(train[1]) // config.batch_size
    tx = optimiser(config, per_epoch)
    static = FrozenConfigDict(config)  # hashable: a static argument of jit
    sides = [side for side, epochs in config.stages for _ in range(epochs)]
    models = {s: ViT(config.variant, image_size=s) for s in sides}
    keys = jax.random.split(jax.random.key(config.seed))
    targets = None
    if config.teacher:
        targets = teacher_features(config, train[0], workdir / "teacher.npy", log)

    def fresh(side: int) -> State:
        model = models[side]
        backbone = model.init(keys[0], jnp.zeros((1, side, side, 3)))["params"]
        init = "zeros" if config.teacher else "reference"
        params = {
            "backbone": backbone,
            "head": init_head(keys[1], model.width, len(classes), init=init),
        }
        if targets is not None:
            params["teacher"] = init_head(
                keys[1], model.width, targets.shape[1], init=init
            )
        return State(jnp.zeros((), jnp.int32), params, tx.init(params))

    done, state = 0, jax.jit(fresh, static_argnums=0)(sides[0])
    folder = workdir / "checkpoints"
    while newest := states.newest_checkpoint(folder):
        done, path = newest
        like = jax.eval_shape(functools.partial(fresh, sides[done - 1]))
        try:
            state = jax.tree.map(jnp.asarray, states.restore_checkpoint(path, like))
        except workdirs.Damaged:
            workdirs.set_aside(path, log.line)
            done = 0
            continue
        log.line(f"continuing after epoch {done} of {len(sides)}")
        break
    images, labels = jnp.asarray(train[0]), jnp.asarray(train[1])
    with contextlib.closing(log):
        for epoch in range(done, len(sides)):
            model, start = models[sides[epoch]], time.perf_counter()
            state = resized_state(state, model.image_size // model.patch)
            order = np.random.default_rng((config.seed, epoch)).permutation(len(labels))
            order = order[: per_epoch * config.batch_size].reshape(per_epoch, -1)
            name, losses = f"epoch {epoch + 1}/{len(sides)}, {model.image_size} px", []
            for first in range(0, per_epoch, config.steps_per_call):
                part = order[first : first + config.steps_per_call]
                state, loss = train_steps(
                    state,
                    images,
                    labels,
                    targets,
                    part,
                    model=model,
                    tx=tx,
                    config=static,
                )
                losses.append(float(loss))
                if not np.isfinite(losses[-1]):
                    raise FloatingPointError(
                        f"{name}: loss is {loss} before step {int(state.step)}; lower"
                        f" config.learning_rate ({config.learning_rate}). Earlier"
                        f" checkpoints are in {folder}."
                    )
                done_share = (first + len(part)) / per_epoch
                rate = order.size * done_share / (time.perf_counter() - start)
                text = f"{name}: loss {losses[-1]:.3f}, {rate:.0f} images/s"
                log.progress(f"{text}, {100 * done_share:.0f} %")
            # SIGTERM in an epoch ends it at once: its start is the last good state.
            with preemption.deferred():
                states.save_checkpoint(folder / str(epoch + 1), state)
                states.remove_checkpoints(folder)
            seconds = time.perf_counter() - start
            log.line(f"{name}: mean loss {np.mean(losses):.3f}, {seconds:.0f} s")
        return export(config, workdir, state, models[sides[-1]], test, log)


def export(
    config: Any, workdir: Path, state: State, model: ViT, test: tuple, log: workdirs.Log
) -> dict[str, Any]:
    """Writes float16 weights and a card with the accuracy of those very weights."""
    half = jax.tree.map(lambda x: np.asarray(x, np.float16), state.params["backbone"])
    params = {
        "backbone": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), half),
        "head": state.params["head"],
    }
    card = {
        "variant": config.variant,
        "image_size": model.image_size,
        "normalisation": config.normalisation,
        "data": "CIFAR-10 (JPEG copy): 50,000 training pictures",
        "classes": test[2],
        # As JSON has it; where the zip lay is nobody's business.
        "recipe": json.loads(config.to_json())
        | {name: Path(config[name]).name for name in ("data", "teacher")},
        "test_accuracy": accuracy(params, test, model, config.normalisation),
        "parameters": sum(x.size for x in jax.tree.leaves(half)),
        "hash": backbone_hash(params["backbone"]),
    }
    save_backbone(workdir / "backbone.safetensors", half, card)
    workdirs.write_json(workdir / "model_card.json", card)
    log.line(f"test accuracy of the float16 weights: {card['test_accuracy']:.4f}")
    return card


def main(config: Any, workdir: Path, command: str) -> None:
    """Trains and says where the weights lie."""
    cli.alone("pretraining")
    with workdirs.locked(workdir / ".lock"):
        card = run(config, workdir)
    print(f"test accuracy {100 * card['test_accuracy']:.2f} % ({command})")
    print(f"weights: {workdir / 'backbone.safetensors'}")


if __name__ == "__main__":
    cli.start(main)
