# SPDX-License-Identifier: Apache-2.0
"""What a run's best model answers on pictures that it was not trained on.

For the eyes: which classes it confuses, its most confident mistakes and some right
answers, and which parts of these pictures attend to its prompts. Nothing is chosen by
them.
"""

import base64
import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import vpt_jax
from vpt_jax import parallel, train
from vpt_jax.files import workdirs
from vpt_jax.models.inputs import normalise
from vpt_jax.report import looks as report_looks
from vpt_jax.run.stages import Run, Unit, fixed_of, prefilled, trained

WRONG, RIGHT = 8, 4  # pictures that are shown
MOST_CLASSES = 40  # of a confusion matrix that a person can read
_SIDE = 112  # pixels that a shown picture has at most


def look(run: Run, unit: Unit) -> dict[str, Any]:
    """As `_look`; kept in `looks.json`, so that a finished run computes nothing."""
    path = run.workdir / "looks.json"
    found = workdirs.sound_record(path, run.log.line)
    if not found or found["unit"] != unit.name:
        found = {"unit": unit.name, **_look(run, unit)}
        if workdirs.writes():
            workdirs.write_record(path, found)
            run.log.pictures(report_looks.pictures(found, run.task.class_names))
    return {key: value for key, value in found.items() if key != "unit"}


@parallel.everywhere()
def _look(run: Run, unit: Unit) -> dict[str, Any]:
    """What the report shows of a unit's answers on test, or on val without a test set.

    Returns:
      `split` and `accuracy`; `confusion`, `[classes, classes]` of counts, the rows are
      right; `confused`, pairs of classes and their count; and `examples`, each with its
      `label`, `answer`, `probability`, `picture` (JPEG, base64), and `attention`
      `[g, g]`, the share of a patch's attention that goes to prompts, mean over layers
      and heads, for a ViT with prompts. Empty where there is nothing to answer.
    """
    split = run.task.test or run.task.val
    if not split:
        return {}
    trainable, _ = trained(run, unit)
    ready, fixed = prefilled(run, trainable), fixed_of(run)
    found = train.by_batches(
        lambda batch, *_: train.probabilities(ready, run.backbone, batch, **fixed),
        split.images,
        run.config.eval_batch_size,
    )
    answers, labels = found.argmax(-1), np.asarray(split.labels)
    classes = run.task.class_names
    confusion = np.zeros((len(classes), len(classes)), int)
    np.add.at(confusion, (labels, answers), 1)
    pairs = [
        [classes[i], classes[j], int(confusion[i, j])]
        for i, j in np.argwhere(confusion - np.diag(np.diag(confusion)) > 0)
    ]
    index = _examples(found, answers, labels)
    maps = _attention(run, trainable, split.images[np.sort(index)])
    order = np.argsort(np.argsort(index))  # of a memory map, in order of the file
    return {
        "split": "test" if run.task.test else "val",
        "accuracy": float(np.mean(answers == labels)),
        "confusion": confusion.tolist() if len(classes) <= MOST_CLASSES else [],
        "confused": sorted(pairs, key=lambda pair: -pair[2])[:5],
        "examples": [
            {
                "label": classes[labels[i]],
                "answer": classes[answers[i]],
                "probability": round(float(found[i].max()), 4),
                "picture": _jpeg(split.images[i]),
                "attention": maps[at] if maps else [],
            }
            for at, i in zip(order, index, strict=True)
        ],
    }


def _examples(found: np.ndarray, answers: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The most confident mistakes, then right answers, drawn by a fixed seed."""
    wrong = np.flatnonzero(answers != labels)
    wrong = wrong[np.argsort(-found[wrong].max(-1), kind="stable")][:WRONG]
    right = np.flatnonzero(answers == labels)
    right = np.random.default_rng(0).permutation(right)[:RIGHT]
    return np.concatenate([wrong, right])


def _attention(run: Run, trainable: dict[str, Any], images: np.ndarray) -> list[Any]:
    """Maps `[n][g][g]`; empty for what is no ViT or has no prompts to attend to."""
    prompts = trainable["prompts"]
    deep = run.config.prompts.deep
    plain = isinstance(run.model, vpt_jax.ViT) and deep and len(images)
    if not plain or not sum(vpt_jax.counts(prompts)):
        return []
    pictures = normalise(jnp.asarray(images), run.backbone_info["normalisation"])
    side = run.model.image_size // run.model.patch
    model = run.model.clone(attention="products")  # a fused kernel keeps no weights
    _, out = jax.jit(model.apply)({"params": run.backbone}, pictures, prompts=prompts)
    shares = [
        np.asarray(block["prompt_attention"], np.float32).sum(-1).mean(1)
        for block in out["blocks"]
        # The last layer computes the tokens that are read, and no patches.
        if block["prompt_attention"].shape[2] >= side**2
        and block["prompt_attention"].shape[3]
    ]
    if not shares:
        return []
    mean = np.mean([share[:, -(side**2) :] for share in shares], axis=0)
    return np.round(mean.reshape(-1, side, side), 4).tolist()


def _jpeg(picture: np.ndarray) -> str:
    image = Image.fromarray(np.asarray(picture))
    if image.width > _SIDE:
        image = image.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    with io.BytesIO() as file:
        image.save(file, "JPEG", quality=88)
        return base64.b64encode(file.getvalue()).decode()
