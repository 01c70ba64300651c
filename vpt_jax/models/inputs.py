# SPDX-License-Identifier: Apache-2.0
"""What a model is given: normalised pictures, prompts, masks and gates."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from vpt_jax.files.checks import (
    check_backbone,
    check_layers,
    check_model,
    check_shallow,
    is_array,
    said,
)
from vpt_jax.models.attention import wide
from vpt_jax.models.layers import KeyValue, batched
from vpt_jax.prompts import check_choice

FORMULATIONS = ("kv", "tokens")
MAX_NORMALISED = 50  # of pictures: with the means and deviations below 3
NORMALISATIONS = {
    # name: (mean, std) per channel of pictures scaled to [0, 1]
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # Google's ViT checkpoints
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # VPT's pipeline
    "clip": (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def normalise(images: jax.Array, name: str) -> jax.Array:
    """Pictures as a backbone expects them: `(x / 255 - mean) / std`.

    Args:
      images: uint8 `[b, h, w, 3]`, colours 0 ... 255.
      name: `"half"` (mean and std 0.5: Google's ViTs, the demo), `"imagenet"` (its mean
        and std: most others), `"clip"` (CLIP's) or `"none"` (0 ... 1). What a file was
        trained with, if that is known: `vpt_jax.read_card(path)["normalisation"]`.

    Returns:
      float32 `[b, h, w, 3]`.

    Raises:
      ValueError: If `name` is not one of these, or the pictures are not as above.

    Example:
      >>> float(normalise(jnp.full((1, 8, 8, 3), 255, jnp.uint8), "half").max())
      1.0
    """
    check_choice("normalisation", name, tuple(NORMALISATIONS))
    shape: tuple[int, ...] = tuple(images.shape) if is_array(images) else ()
    if len(shape) != 4 or shape[3] != 3 or images.dtype != jnp.uint8:
        raise ValueError(
            f"images are {said(images)}; expected uint8 [b, h, w, 3]. Of floats in 0"
            " ... 1 take (255 * x).round().astype('uint8'); what is normalised goes to"
            " the model as it is."
        )
    mean, std = (
        jnp.asarray(v, jnp.float32).reshape(1, 1, 1, 3) for v in NORMALISATIONS[name]
    )
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def check_images(images: Any, side: int) -> None:
    """Raises ValueError unless the pictures are normalised floats `[b, s, s, 3]`."""
    shape: tuple[int, ...] = tuple(images.shape) if is_array(images) else ()
    if len(shape) != 4 or shape[1:] != (side, side, 3):
        remedy = (
            "resize them, or build the model with image_size= (load_backbone resizes"
            " the position table)"
        )
        if not is_array(images):
            remedy = "pass one array of all pictures"
        elif shape == (side, side, 3):
            remedy = "of one picture pass images[None]"
        elif shape[1:2] == (3,):
            remedy = "put the channels last: images.transpose(0, 2, 3, 1)"
        elif len(shape) == 4 and shape[3] != 3:
            remedy = "make them RGB: three channels"
        raise ValueError(
            f"images have shape {shape if is_array(images) else said(images)} but the"
            f" model expects [b, {side}, {side}, 3]; {remedy}."
        )
    check_normalised(images)


def check_normalised(images: Any, *, wait: bool = True) -> None:
    """Raises ValueError if pictures are colours, 0 ... 255, as integers or as floats.

    Floats are looked at where they have values: not inside `jax.jit`; those of a device
    only with `wait`, for all that was sent to it before is waited for too.
    """
    if not is_array(images):
        return
    colours, large = not jnp.issubdtype(images.dtype, jnp.floating), ""
    if not colours and images.size and _has_values(images, wait):
        # In NumPy: what `jax.jit` closes over has values, and JAX would trace them.
        values = np.asarray(images)
        colours, most = values.min() >= 0, float(values.max())
        colours = bool(colours and most > MAX_NORMALISED)
        large = f" with values up to {most:g}" if colours else ""
    if colours:
        raise ValueError(
            f"images are {said(images)}{large}; expected floats, normalised as the"
            " backbone was trained: vpt_jax.normalise(images, 'half'), or another name"
            " that vpt_jax.read_card(path)['normalisation'] gives."
        )


def _has_values(images: Any, wait: bool) -> bool:
    if isinstance(images, np.ndarray):
        return True
    concrete = isinstance(images, jax.Array) and not isinstance(images, Tracer)
    return wait and concrete and images.is_fully_addressable


class Inputs(NamedTuple):
    """Checked arguments of a forward pass, one entry per layer."""

    prompts: list[Any]  # None where a layer has none
    # Of the prompts' keys, [b or 1, n_i]; or [b, h, q, n_i], by head and query.
    weights: list[jax.Array | None]
    deep: bool
    formulation: str


def prepare(
    prompts: Sequence[Any] | None,
    mask: Sequence[jax.Array] | None,
    gate: Sequence[jax.Array] | None,
    *,
    widths: tuple[int, ...],
    deep: bool,
    formulation: str,
    dtype: Any,
    batch: Any = None,
) -> Inputs:
    """Checks the arguments that every model of this package takes; else ValueError.

    Shallow prompts always run as tokens; a model without prompts as the plain network.
    `batch` is the number of pictures, where it is known already.
    """
    check_choice("formulation", formulation, FORMULATIONS)
    depth = len(widths)
    if prompts is None:
        if mask is not None or gate is not None:
            raise ValueError("prompt_mask and prompt_gate need prompts; got None.")
        return Inputs([None] * depth, [None] * depth, True, "kv")
    num = check_prompts(prompts, widths, batch)
    weights = key_weights(mask, gate, num, batch)
    prefilled = any(isinstance(p, KeyValue) for p in prompts)
    if not deep:
        if weights[0] is not None and weights[0].ndim == 4:
            raise ValueError(
                f"prompt_gate has shape {weights[0].shape}, by head and query, with"
                " deep=False; shallow prompts act in every layer, pass [b, n_0]."
            )
        check_shallow(num)
        weights, formulation = [weights[0]] * depth, "tokens"
    if prefilled and formulation == "tokens":
        raise ValueError(
            "prefilled keys and values only exist in the 'kv' formulation of deep"
            " prompts; pass the prompts themselves."
        )
    cast = [p if isinstance(p, KeyValue) else p.astype(dtype) for p in prompts]
    if formulation == "kv":  # a layer without prompts is the plain block
        cast = [p if n else None for p, n in zip(cast, num, strict=True)]
    return Inputs(cast, weights, deep, formulation)


def given_to(
    model: Any,
    images: jax.Array,
    prompts: Sequence[Any] | None,
    mask: Sequence[jax.Array] | None,
    gate: Sequence[jax.Array] | None,
    deep: bool,
    formulation: str,
) -> Inputs:
    """`prepare` for a model of this package, whose pictures are checked too."""
    check_images(images, model.image_size)
    return prepare(
        prompts,
        mask,
        gate,
        widths=model.widths,
        deep=deep,
        formulation=formulation,
        dtype=model.dtype,
        batch=images.shape[0],
    )


def check_prompts(
    prompts: Any, widths: tuple[int, ...], batch: Any = None
) -> tuple[int, ...]:
    """The counts, or ValueError unless there is one array of its width per layer.

    One set per example must be as many as the `batch`, or one for all.
    """
    arrays = prompts
    if isinstance(prompts, tuple | list):  # a `KeyValue` stands for its layer
        arrays = [p.key if isinstance(p, KeyValue) else p for p in prompts]
        arrays = prompts if hasattr(prompts, "_fields") else arrays
    check_layers("prompts", arrays, 0, 1, 2, 3, 4, shape="[n_i, d]")
    if len(prompts) != len(widths):
        raise ValueError(
            f"prompts have {len(prompts)} layers but the model has depth {len(widths)};"
            f" pass one array per layer (an empty [0, {widths[0]}] array for none)."
        )
    num = []
    for i, (p, array, width) in enumerate(zip(prompts, arrays, widths, strict=True)):
        shape, own = tuple(array.shape), 4 if isinstance(p, KeyValue) else 3
        fits = len(shape) in (own - 1, own)
        if not fits or shape[-1] * (shape[-3] if own == 4 else 1) != width:
            raise ValueError(
                f"prompts[{i}] has shape {shape} but that layer has width {width};"
                f" expected [n, {width}] (or [b, n, {width}]). Were these prompts made"
                " for another backbone?"
            )
        if len(shape) == own:
            _check_rows(f"prompts[{i}]", array, batch)
        num.append(shape[-2])
    return tuple(num)


def _check_rows(name: str, array: jax.Array, batch: Any) -> None:
    """Raises ValueError unless axis 0 is the batch, of as many examples or one."""
    if batch is not None and array.shape[0] not in (1, batch):
        raise ValueError(
            f"{name} has shape {tuple(array.shape)}, one for each of"
            f" {array.shape[0]} examples, but there are {batch} pictures; expected as"
            " many, or none of the axis for all alike."
        )


def key_weights(
    mask: Sequence[jax.Array] | None,
    gate: Sequence[jax.Array] | None,
    num: tuple[int, ...],
    batch: Any = None,
) -> list[jax.Array | None]:
    """Mask times gate as float32 `[b or 1, n_i]` per layer; None where neither is.

    A gate `[b, h, q, n_i]` (per head and query) keeps its axes.
    """
    for name, given in (("prompt_mask", mask), ("prompt_gate", gate)):
        if given is None:
            continue
        ranks = (1, 2) if name == "prompt_mask" else (1, 2, 4)
        check_layers(name, given, *ranks, shape="[n_i]")
        got = tuple(int(g.shape[-1]) for g in given)
        if got != num:
            raise ValueError(
                f"{name} has {got} entries per layer but the prompts have {num}; pass"
                " one entry per prompt, layer by layer."
            )
        for i, g in enumerate(given):
            if g.ndim > 1:
                _check_rows(f"{name}[{i}]", g, batch)
            if name == "prompt_mask" and g.dtype != bool:
                raise ValueError(
                    f"{name}[{i}] is {said(g)}; expected booleans, False for prompts"
                    " that are out. Weights in between are prompt_gate."
                )
    result: list[jax.Array | None] = []
    for i, n in enumerate(num):
        weight = None
        if n and gate is not None:
            weight = gate[i] if gate[i].ndim == 4 else batched(gate[i], 2)
            weight = weight.astype(wide(weight.dtype))
        if n and mask is not None:
            keep = batched(mask[i], 2)
            if weight is None:
                weight = keep.astype(jnp.float32)
            else:
                keep = keep if weight.ndim == 2 else keep[:, None, None]
                weight = jnp.where(keep, weight, jnp.zeros((), weight.dtype))
        result.append(weight)
    return result


def prefill(model: Any, backbone: Any, prompts: Sequence[jax.Array]) -> Any:
    """The prompts' keys and values for inference, computed once.

    Args:
      model: The model that will take them.
      backbone: Its parameters.
      prompts: One `[n_i, d]` array per layer (deep prompts).

    Returns:
      One `KeyValue` per layer (the last layer's prompts stay as they are where the
      read-out averages over their outputs); pass it as `prompts=` in their place.

    Raises:
      ValueError: If the prompts do not fit the model, were prefilled before, or the
        model is not of this package.

    Example:
      >>> ready = prefill(model, backbone, prompts)  # of trained ones, once
      >>> features, _ = model.apply({"params": backbone}, images, prompts=ready)
      >>> features.shape
      (4, 128)
    """
    check_model(model, "prefill", "widths")
    check_backbone(backbone)
    check_layers("prompts", prompts, 2, 3, shape="[n_i, d], not prefilled before,")
    return model.apply({"params": backbone}, prompts, method="prefill")
