# SPDX-License-Identifier: Apache-2.0
"""Pretrained weights in.

They come in any format that `readers` knows, under any names that `naming` knows; what
does not fit exactly is an error.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from vpt_jax.files.messages import expect, shown
from vpt_jax.models.attention import wide
from vpt_jax.models.posemb import resize_pos_embedding
from vpt_jax.models.swin import Swin
from vpt_jax.models.vit import ViT
from vpt_jax.models.xla import ACTIVATIONS
from vpt_jax.weights.backbones import known_backbone, where_to_get
from vpt_jax.weights.facts import ask, assumed, card_of, check_given, check_sizes
from vpt_jax.weights.families import refuse_families, refuse_name
from vpt_jax.weights.matching import infer, match_swin, match_vit, parameters
from vpt_jax.weights.naming import Named, read_names
from vpt_jax.weights.published import names_of, published, told_apart
from vpt_jax.weights.readers import CheckpointError
from vpt_jax.weights.release import (
    AGAIN,
    check_fields,
    flatten,
    is_text,
    write_arrays,
)
from vpt_jax.weights.remote import local_path
from vpt_jax.weights.shards import open_weights
from vpt_jax.weights.sidecar import NAMES, json_object

DEMO_BACKBONE = Path(__file__).parent.parent / "assets" / "demo_vit.safetensors"
_LOG = logging.getLogger(__name__)  # one line per file of which something was assumed
_FACTS = ("num_heads", "activation", "epsilon")
_CARD = {  # what a model card may say, and of the first four any text
    **dict.fromkeys(("normalisation", "readout", "norm", "resize"), is_text),
    "num_heads": lambda x: type(x) is int and x > 0,
    "activation": lambda x: is_text(x) and x in ACTIVATIONS,
    "epsilon": lambda x: type(x) is float and 0 < x < 1,
}


def load_backbone(
    variant: str | os.PathLike,
    path: str | os.PathLike = "",
    *,
    image_size: int = 0,
    readout: str = "",
    norm: str = "",
    posemb: str = "learned",
    resize: str = "",
    num_heads: int = 0,
    activation: str = "",
    epsilon: float = 0.0,
    skip: Sequence[str] = (),
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
) -> tuple[ViT | Swin, Any]:
    """Loads a pretrained ViT or Swin.

    Empty arguments take what is known of the file (`read_card`), else the default given
    here. Where nothing is known, `logging` warns in one line of what was assumed.

    Args:
      variant: `"B/16"`, `"S/14"`, ... or `"Swin-T"` to `"Swin-L"`, or another project's
        name of one (`"vit_small_patch16_224"`); `"demo/4"` is the small backbone of the
        package. Or the path, alone: then the file says which variant it is, and a plain
        ViT of any size is loaded. Or the name of a published file, alone:
        `"ViT-B_16"`, `"timm/vit_small_patch14_dinov2.lvd142m"`,
        `"facebook/dinov2-base"`; `python -m vpt_jax.weights list` shows them.
      path: `.npz`, `.safetensors` or a PyTorch file, local or remote (`hf://`, `gs://`;
        see `remote.local_path`), or such a name; of several shards one of them or their
        index. Empty loads the shipped weights of `"demo/4"`. Heads in the file are
        ignored.
      image_size: Side of the pictures in pixels; 0 takes the file's own. The position
        table is resized when it differs.
      readout: `"cls"`, `"mean"` or `"mean_with_prompts"`, see `ViT`. Default: the class
        token if there is one, else the mean; of a Swin `"mean_with_prompts"`.
      norm: Final norm `"before"` or `"after"` the read-out (ViT). Default: before,
        unless the file was trained the other way (`fc_norm`). After pooling, a norm
        that was trained on tokens is not used: scale 1, bias 0, as MAE and VPT do.
      posemb: `"sincos"` for files without a position table.
      resize: How to resize the table, see `resize_pos_embedding`. Default:
        `"corner_aligned"`, VPT's rule.
      num_heads: Attention heads (ViT). Default: the variant's.
      activation: Of the MLP (ViT): `"gelu"` (default), `"gelu_tanh"`, `"quick_gelu"`.
      epsilon: Of every LayerNorm (ViT). Default: 1e-6.
      skip: Names, or successive parts of them such as `"my_head"`, of arrays of the
        file that are no part of the features.
      dtype: Of the computation.
      param_dtype: Of the loaded parameters.
      mesh: With an axis `model`, as `parallel.all_devices(model)` makes: each parameter
        goes to its devices (`parallel.backbone_shardings`) as it is read, so that a
        backbone is loaded which no device holds whole.

    Returns:
      The model and its parameters.

    Raises:
      ValueError: If the file is absent, damaged or not to be trusted; is of a family
        that is not supported; has values that are not finite; or its parameters are not
        exactly the variant's: the message says what it is, or what is missing, unused
        or of another shape. Also if published files of the same arrays differ in what
        nobody said of this one.

    Example:
      >>> model, backbone = load_backbone("demo/4")
      >>> model.width, model.depth
      (128, 6)
    """
    image_size = check_given(variant, path, image_size, resize)
    skip = (skip,) if isinstance(skip, str) else skip
    variant, path = told_apart(variant, path)
    refuse_name(variant)  # an unknown variant is the first thing to hear of
    kind: Any = Swin if variant.startswith("Swin") else ViT
    wanted = kind(variant) if variant else None
    path = path or (DEMO_BACKBONE if variant == "demo/4" else "")
    if not path:
        raise ValueError(
            f"no checkpoint given for {variant!r}; pass the path of a .npz,"
            " .safetensors or PyTorch file (--config.backbone.checkpoint=PATH). Only"
            f" 'demo/4' ships with the package. {where_to_get(variant)}"
            f"{names_of(variant)}."
        )
    if not local_path(path, beside=NAMES).exists():
        refuse_name(os.fspath(path))  # of the hub
        raise CheckpointError(f"no such file: {path}. {where_to_get(variant, path)}.")
    given = {"readout": readout, "norm": norm, "resize": resize}
    given |= {"num_heads": num_heads, "activation": activation, "epsilon": epsilon}
    given = {name: value for name, value in given.items() if value}
    expect(num_heads >= 0, "num_heads", num_heads, "a positive integer, or nothing")
    expect(0 <= epsilon < 1, "epsilon", epsilon, "a number from 0 to below 1")
    with open_weights(path) as file:
        refuse_families(file.arrays, path)
        card = card_of(path, _own_card(path, file.metadata))
        told = {**card, **given}
        named = read_names(file.arrays, path, skip)
        check_sizes(named, card, path)
        model = wanted or infer(named, path, told.get("num_heads", 0))
        model = model.clone(dtype=dtype, param_dtype=param_dtype)
        if isinstance(model, Swin):
            if facts := [name for name in _FACTS if name in given]:
                raise ValueError(f"{facts[0]}= is for a ViT; leave it out for a Swin.")
            read = {"readout": told.get("readout", ""), "image_size": image_size}
            model = match_swin(model, named, path, **read)
        else:
            model = _with_facts(model, told, path)
            read = {name: told.get(name, "") for name in ("readout", "norm")}
            model = match_vit(model, named, path, **read, posemb=posemb)
        tree = parameters(named, model, path, skip, param_dtype, mesh)
        ask(model, named, card, given, path)
        networks = file.metadata.get("networks", "")
    resized = bool(image_size and image_size != model.image_size)
    notes = [_taken(named, networks), assumed(model, card, given, resized)]
    if any(notes):
        _LOG.warning("%s: %s.", path, "; ".join(filter(None, notes)))
    if resized:
        model = model.clone(image_size=image_size)
        if model.posemb == "learned":
            _resize_table(tree, model, told.get("resize", "corner_aligned"))
    return model, tree


def _taken(named: Named, networks: str) -> str:
    """Which of several networks in a file was read; empty if there is one."""
    if any("momentum" in name for name in named.left_out):
        source = named.entries[0].source
        networks = f"{source.partition('encoder')[0]}encoder, not its moving average"
    return networks and f"several networks are in the file; took {networks}"


def read_card(path: str | os.PathLike = "") -> dict[str, Any]:
    """What is known of a file of weights beside the weights.

    Of the `config.json` beside it; of the row of `backbones.BACKBONES` that its name
    belongs to; of its own model card (safetensors written by `save_backbone`).

    Returns:
      `normalisation`, `readout`, `norm`, `resize`, `num_heads`, `activation`,
      `epsilon`, `name`, `licence` and more, as far as known; `{}` for a file that
      nobody knows.

    Raises:
      ValueError: If the file, or the `config.json`, cannot be read.

    Example:
      >>> read_card("")["normalisation"]  # of the package's own
      'half'
    """
    named = published(path)
    path = named.address if named else path or DEMO_BACKBONE
    if known := known_backbone(path):
        return card_of(path, {}) if local_path(path).exists() else known.card()
    with open_weights(path) as file:
        return card_of(path, _own_card(path, file.metadata))


def _own_card(path: str | os.PathLike, metadata: dict[str, str]) -> dict[str, Any]:
    text = metadata.get("model_card", "{}")
    card = json_object(text, f"the model card of {path}", AGAIN)
    check_fields(path, "model card", card, _CARD)
    return card


def _with_facts(model: ViT, told: Mapping[str, Any], path: Any) -> ViT:
    """The model with what weights cannot say of it."""
    heads = told.get("num_heads") or model.num_heads
    if not isinstance(heads, int) or model.width % heads:
        raise CheckpointError(
            f"{path}: num_heads is {shown(heads)}, by the config.json beside it or as"
            f" given; expected a divisor of its width, {model.width}."
        )
    return model.clone(**{name: told[name] for name in _FACTS if told.get(name)})


def _resize_table(tree: Any, model: Any, how: str) -> None:
    place, dtype = tree["Transformer"]["posembed_input"], model.param_dtype
    table = place["pos_embedding"].astype(wide(dtype))
    grid = model.image_size // model.patch
    table = resize_pos_embedding(table, grid, how, model.class_token)
    place["pos_embedding"] = table.astype(dtype)


def save_backbone(path: str | os.PathLike, backbone: Any, card: dict[str, Any]) -> None:
    """Writes a backbone as safetensors with its model card in the header."""
    write_arrays(path, flatten(backbone), {"model_card": json.dumps(card)})
