# SPDX-License-Identifier: Apache-2.0
"""Prompts of VPT's own code (KMnP/vpt, PyTorch), in and out, as far as they are ours.

There a model's state has `prompt_embeddings [1, n, d]`, prompts of the first layer, and
for VPT-Deep `deep_prompt_embeddings [layers - 1, n, d]`, of a Swin one per stage with
the first layer left out; an optional linear `prompt_proj`; and `head.last_layer`.
"""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from vpt_jax.files.checks import check_head, check_layers, check_model
from vpt_jax.files.durable import atomic_path
from vpt_jax.models.inputs import check_prompts
from vpt_jax.models.swin import Swin
from vpt_jax.prompts import Head, Prompts
from vpt_jax.weights.readers import CheckpointError, read_arrays
from vpt_jax.weights.remote import local_path

_HEAD = "head.last_layer"
_PREFIX = "enc.transformer."  # of VPT's ViT; a Swin's is "enc."


class VPTPrompts(NamedTuple):
    """Prompts, one `[n, d]` per layer; the head, None without a linear one; `deep`."""

    prompts: Prompts
    head: Head | None
    deep: bool


def load_vpt(path: str | os.PathLike, model: Any) -> VPTPrompts:
    """Reads prompts that VPT's code trained, projected as it does.

    Args:
      path: The `.pth` of a training (fvcore's checkpointer), or another file of weights
        with these names; local or an address.
      model: The `ViT` or `Swin` that they are for.

    Raises:
      CheckpointError: If the file cannot be read, has no prompts, or those of another
        size.

    Example:
      >>> model, backbone = load_backbone("B/16", "ViT-B_16.npz")
      >>> prompts, head, deep = load_vpt("model_final.pth", model)
    """
    check_model(model, "widths", "depth")
    arrays, _ = read_arrays(local_path(path))
    first = _one(arrays, "prompt_embeddings", path)
    if first is None:
        raise CheckpointError(
            f"{path} has no prompt_embeddings; expected a checkpoint of VPT's code"
            " (KMnP/vpt) for prompts before the patches."
        )
    later = [_one(arrays, name, path) for name in _deep_names(model)]
    deep = any(array is not None for array in later)
    layers = [*first, *(row for array in later if array is not None for row in array)]
    weight, bias = (_one(arrays, f"prompt_proj.{x}", path) for x in ("weight", "bias"))
    if weight is not None:
        layers = [p @ weight.T + (0 if bias is None else bias) for p in layers]
    if not deep:
        layers += [np.zeros((0, width)) for width in model.widths[1:]]
    widths = [layer.shape[-1] for layer in layers]
    if widths != list(model.widths):
        raise CheckpointError(
            f"{path} has prompts of {len(widths)} layers with widths"
            f" {sorted(set(widths))}; expected {len(model.widths)} layers with"
            f" {sorted(set(model.widths))}, as the model."
        )
    prompts = tuple(jnp.asarray(p, jnp.float32) for p in layers)
    return VPTPrompts(prompts, _head(arrays, path, model.width), deep)


def save_vpt(
    path: str | os.PathLike,
    prompts: Prompts,
    head: Head | None = None,
    *,
    model: Any,
    deep: bool = True,
) -> None:
    """Writes prompts, and a head, as a checkpoint that VPT's code loads; needs PyTorch.

    Args:
      path: The `.pth`; it appears when it is whole.
      prompts: One `[n, d]` per layer, of one number `n`: VPT has no other.
      head: `{'kernel', 'bias'}`.
      model: The `ViT` or `Swin` they belong to.
      deep: False for VPT-Shallow, whose later layers have none.

    Raises:
      ValueError: If the layers have different numbers of prompts, or PyTorch is not
        installed.
    """
    check_model(model, "widths", "depth")
    check_layers("prompts", prompts, 2, shape="[n_i, d]")
    counts = check_prompts(prompts, model.widths)
    wanted = set(counts) if deep else {*counts[1:], 0}
    if len(wanted) != 1 or not counts[0]:
        raise ValueError(
            f"prompts have {counts} per layer; expected the same number in every layer:"
            " VPT's code has no place for condensed prompts (a zero prompt is no absent"
            " one)."
        )
    prefix = "enc." if isinstance(model, Swin) else _PREFIX
    arrays = {f"{prefix}prompt_embeddings": prompts[0][None]}
    if deep:
        depths = model.depths if isinstance(model, Swin) else [model.depth]
        ends = np.cumsum(depths)
        for name, num, end in zip(_deep_names(model), depths, ends, strict=True):
            arrays[prefix + name] = np.stack(prompts[max(1, end - num) : end])
    if head is not None:
        check_head(head)
        arrays |= {f"{_HEAD}.weight": head["kernel"].T, f"{_HEAD}.bias": head["bias"]}
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            "a .pth is written by PyTorch, which is not installed; pip install torch."
        ) from None
    state = {n: torch.tensor(np.array(a, np.float32)) for n, a in arrays.items()}
    with atomic_path(Path(path)) as temporary:
        torch.save({"model": state}, temporary)


def _deep_names(model: Any) -> list[str]:
    if isinstance(model, Swin):
        return [f"deep_prompt_embeddings_{i}" for i in range(model.num_stages)]
    return ["deep_prompt_embeddings"]


def _one(arrays: dict[str, np.ndarray], name: str, path: Any) -> np.ndarray | None:
    """The array of a name, under whatever prefix; None without one."""
    found = [n for n in arrays if re.search(rf"(^|\.){re.escape(name)}$", n)]
    if len(found) > 1:
        raise CheckpointError(f"{path} holds {name} twice, as {' and '.join(found)}.")
    return np.asarray(arrays[found[0]], np.float32) if found else None


def _head(arrays: dict[str, np.ndarray], path: Any, width: int) -> Head | None:
    """The head where it is one linear layer on the model's features."""
    weight, bias = (_one(arrays, f"{_HEAD}.{x}", path) for x in ("weight", "bias"))
    if weight is None or bias is None or weight.shape[1:] != (width,):
        return None
    if any(".projection." in name for name in arrays if name.startswith("head.")):
        return None  # an MLP
    return {"kernel": jnp.asarray(weight.T), "bias": jnp.asarray(bias)}
