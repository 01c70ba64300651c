# SPDX-License-Identifier: Apache-2.0
"""A dense task for prompted ViTs: a class for every pixel, by a linear head on patches.

The features are all patch tokens after the last block and the final norm, the head is
the usual `{kernel, bias}`, applied to every patch, and its logits are resized
bilinearly to the picture ("linear" of Strudel et al., Segmenter, arXiv 2105.05633).
Everything else is the library's: `DensePatches` looks like a model to `importance`, and
the optimiser, rates and order of pictures are those of `vpt_jax.train`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vpt_jax
from studies.masked import train_in_memory
from vpt_jax import parallel, train
from vpt_jax.models.inputs import normalise
from vpt_jax.models.layers import LayerNorm
from vpt_jax.prompts import Mask
from vpt_jax.run.config import TrainConfig

Data = tuple[Any, Any]  # images (or features) and labels, of all examples


@dataclasses.dataclass(frozen=True)
class DensePatches:
    """A ViT whose features are its patches' tokens, `[b * patches, d]`.

    `apply` takes what the ViT's takes, so that this stands for a model in `importance`.
    """

    model: vpt_jax.ViT

    def apply(
        self, variables: dict[str, Any], images: jax.Array, **kwargs: Any
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Features and the model's named intermediates."""
        model: Any = self.model
        _, out = model.apply(variables, images, **kwargs)
        # Shallow prompts leave the class token in; patches always come last.
        num = (model.image_size // model.patch) ** 2
        tokens = out["blocks"][-1]["tokens"][:, -num:]
        norm = LayerNorm(model.dtype, model.param_dtype, model.epsilon)
        params = variables["params"]["Transformer"]["encoder_norm"]
        x = jnp.asarray(norm.apply({"params": params}, tokens))
        return x.reshape(-1, model.width), out


def dense_patches(model: Any) -> DensePatches:
    """The dense view of a model.

    Raises:
      ValueError: If it is not a ViT, whose last block keeps every patch's token.
    """
    if not isinstance(model, vpt_jax.ViT):
        raise ValueError(
            f"got {type(model).__name__}; the dense task reads the patch tokens of a"
            " ViT: Swin has merged its patches by then. Pass a config whose backbone"
            " is a ViT, such as configs/demo.py."
        )
    # With this read-out the last block computes the patches, not the class token.
    return DensePatches(model.clone(readout="mean"))


def pixel_logits(logits: jax.Array, num: int, side: int) -> jax.Array:
    """Logits of patches `[num * patches, k]` as `[num, side, side, k]`, bilinear."""
    grid = math.isqrt(logits.shape[0] // num)
    by_place = logits.reshape(num, grid, grid, -1)
    return jax.image.resize(by_place, (num, side, side, logits.shape[1]), "bilinear")


def pixel_losses(logits: jax.Array, batch: dict[str, Any]) -> jax.Array:
    """Softmax cross entropy `[b]`, the mean over pixels, of `logits [b * patches, k]`.

    `batch["label"]` is `[b, s, s]`. A `loss_fn` of `importance`.
    """
    label = batch["label"]
    log_p = jax.nn.log_softmax(pixel_logits(logits, label.shape[0], label.shape[1]))
    picked = jnp.take_along_axis(log_p, label[..., None], axis=-1)[..., 0]
    return -picked.mean(axis=(1, 2))


def patch_logits(
    trainable: dict[str, Any],
    backbone: Any,
    images: jax.Array,
    prompt_mask: Mask | None,
    key: jax.Array | None,
    *,
    patches: DensePatches | None,
    recipe: train.Recipe,
) -> jax.Array:
    """Logits `[b * patches, k]` of uint8 `images [b, s, s, 3]`; dropout with a key.

    Without a model, `images` are features `[b, patches, d]` already (a linear probe).
    """
    if patches is None:
        images = images.reshape(-1, images.shape[-1])
    static = {"model": patches, "recipe": recipe, "prompt_mask": prompt_mask}
    return train.predict(trainable, backbone, images, key=key, **static)


def losses_of(
    trainable: dict[str, Any],
    backbone: Any,
    batch: dict[str, jax.Array],
    key: jax.Array,
    prompt_mask: Mask | None,
    *,
    model: DensePatches | None,
    recipe: train.Recipe,
) -> tuple[jax.Array, jax.Array]:
    """What `train.classify` is for a class per picture; no answer counts as right."""
    given = trainable, backbone, batch["image"], prompt_mask, key
    logits = patch_logits(*given, patches=model, recipe=recipe)
    losses = pixel_losses(logits, batch)
    return losses, jnp.zeros_like(losses)


@parallel.everywhere()
def fit(
    trainable: dict[str, Any],
    backbone: Any,
    data: Data,
    settings: TrainConfig,
    seed: int,
    prompt_mask: Mask | None,
    *,
    patches: DensePatches | None,
    recipe: train.Recipe,
) -> dict[str, Any]:
    """Prompts and head after `settings.epochs`; order and dropout follow `seed`.

    Prompts that `prompt_mask` takes out get no gradient: what is trained is the
    condensed model, in the shapes of the whole one, compiled once for all selections.

    Raises:
      FloatingPointError: If the loss is not finite.
    """
    given = trainable, backbone, *jax.tree.map(jnp.asarray, data), settings, seed
    mask_of = prompt_mask and (lambda epoch, trainable: prompt_mask)
    static = {"model": patches, "recipe": recipe, "losses_of": losses_of}
    found, _ = train_in_memory(*given, mask_of=mask_of, **static)
    return found


@functools.partial(jax.jit, static_argnames=("side", "patches", "recipe"))
def predict(
    trainable: dict[str, Any],
    backbone: Any,
    images: jax.Array,
    prompt_mask: Mask | None,
    *,
    side: int,
    patches: DensePatches | None,
    recipe: train.Recipe,
) -> jax.Array:
    """The likeliest class of every pixel, int32 `[b, side, side]`."""
    images = parallel.spread(images)
    given = trainable, backbone, images, prompt_mask, None
    logits = patch_logits(*given, patches=patches, recipe=recipe)
    return pixel_logits(logits, len(images), side).argmax(-1).astype(jnp.int32)


@parallel.everywhere()
def confusion(
    trainable: dict[str, Any],
    backbone: Any,
    data: Data,
    batch_size: int,
    prompt_mask: Mask | None,
    *,
    patches: DensePatches | None,
    recipe: train.Recipe,
) -> np.ndarray:
    """How many pixels of each class (rows) get which answer: int64 `[k, k]`."""
    k = trainable["head"]["bias"].shape[0]
    total = np.zeros((k, k), np.int64)
    for start in range(0, len(data[1]), batch_size):
        images, labels = (x[start : start + batch_size] for x in data)
        batch = parallel.pad_batch({"image": images, "label": labels}, batch_size)
        given = trainable, backbone, batch["image"], prompt_mask
        static = {"patches": patches, "recipe": recipe}
        found = predict(*given, side=labels.shape[1], **static)
        pairs = k * np.asarray(labels) + np.asarray(found)[: len(labels)]
        total += np.bincount(pairs.ravel(), minlength=k * k).reshape(k, k)
    return total


def metrics(confusion: np.ndarray) -> dict[str, float]:
    """Per-pixel `accuracy` and mean intersection over union `iou`, in per cent.

    Intersection and union are of all pictures together, and a class without a pixel in
    truth and answers does not count (as Pascal VOC and ADE20K are evaluated).

    Args:
      confusion: `[k, k]`, rows are the truth; at least one pixel.
    """
    right = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - right
    iou = right[union > 0] / union[union > 0]
    accuracy = right.sum() / confusion.sum()
    return {"accuracy": 100 * float(accuracy), "iou": 100 * float(iou.mean())}


def features(
    backbone: Any,
    images: np.ndarray,
    batch_size: int,
    *,
    patches: DensePatches,
    normalisation: str,
) -> np.ndarray:
    """Features without prompts, `[n, patches, d]`, for a linear probe."""
    num, found = len(images), []
    for start in range(0, num, batch_size):
        # The last batch is padded, so that nothing compiles again.
        index = np.minimum(np.arange(start, start + batch_size), num - 1)
        static = {"patches": patches, "normalisation": normalisation}
        found.append(np.asarray(_features(backbone, images[index], **static)))
    return np.concatenate(found)[:num]


@functools.partial(jax.jit, static_argnames=("patches", "normalisation"))
def _features(
    backbone: Any, images: jax.Array, *, patches: DensePatches, normalisation: str
) -> jax.Array:
    images = normalise(images, normalisation)
    found, _ = patches.apply({"params": backbone}, images)
    return found.reshape(len(images), -1, found.shape[-1])
