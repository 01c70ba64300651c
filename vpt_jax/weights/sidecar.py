# SPDX-License-Identifier: Apache-2.0
"""What the `config.json` beside a file of weights says that the weights can not.

transformers and timm write one. How the model classifies (timm's `global_pool`) is not
how its features are read.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vpt_jax.files.messages import shown
from vpt_jax.models.inputs import NORMALISATIONS
from vpt_jax.weights.readers import CheckpointError

NAMES = ("config.json", "preprocessor_config.json")
MAX_BYTES = 4 << 20

# transformers' and PyTorch's words for an activation, and ours.
_ACTIVATIONS = {"gelu": "gelu", "gelu_python": "gelu", "quick_gelu": "quick_gelu"}
_ACTIVATIONS |= dict.fromkeys(
    ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_tanh"), "gelu_tanh"
)
_KINDS = {  # transformers' model types that are plain ViTs or Swin, and what they imply
    "vit": {},
    "vit_msn": {},
    "vit_mae": {"readout": "mean_with_prompts", "norm": "after"},
    "ijepa": {},
    "dinov2": {"resize": "bicubic"},
    "dinov2_with_registers": {"resize": "bicubic_antialias"},
    "swin": {"readout": "mean_with_prompts"},
    "deit": {"resize": "bicubic"},
    "dinov3_vit": {},
    "siglip_vision_model": {"readout": "map", "resize": "bicubic"},
    "clip_vision_model": {"resize": "bicubic"},
    "tipsv2_vision_model": {"resize": "half_pixel_antialias"},
}


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if good and 0 < value < 2**31 else None


def _count(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number.is_integer() else None


def _counts(values: Any) -> tuple[int, ...] | None:
    good = isinstance(values, list) and all(type(v) is int for v in values)
    return tuple(values) if good else None


def _activation(value: Any) -> str | None:
    return _ACTIVATIONS.get(value.lower()) if isinstance(value, str) else None


_EXPECTED: dict[Callable[[Any], Any], str] = {
    _number: "a positive number",
    _count: "a positive whole number",
    _counts: "a list of whole numbers",
    _activation: f"one of {', '.join(_ACTIVATIONS)}, which we compute",
}
# Their names, ours, and how a value is read.
_BOTH = {
    "layer_norm_eps": ("epsilon", _number),
    "hidden_act": ("activation", _activation),
}
_VIT = _BOTH | {
    "num_attention_heads": ("num_heads", _count),
    "hidden_size": ("width", _count),
    "num_hidden_layers": ("depth", _count),
}
_SWIN = _BOTH | {
    "num_heads": ("num_heads", _counts),
    "depths": ("depth", _counts),
    "embed_dim": ("width", _count),
}
_TIMM = {
    "num_heads": ("num_heads", _count),
    "embed_dim": ("width", _count),
    "depth": ("depth", _count),
    "act_layer": ("activation", _activation),
}
_NESTED = ("vision_config", "backbone_config", "encoder")


def config_facts(path: str | os.PathLike) -> dict[str, Any]:
    """The facts in the `config.json` beside a local file; `{}` where there is none.

    `num_heads` (of a Swin a tuple), `activation`, `epsilon`, `readout`, `norm`,
    `resize` and `normalisation` as far as they are said; `architecture`, timm's name
    with its tag; `kind`, transformers'; and, to be held against the weights, `width`
    and `depth`. Raises CheckpointError for no JSON object, or what no model of ours
    computes.
    """
    folder = Path(path).parent
    config = _object(folder / NAMES[0])
    if "architecture" in config:
        return _timm(config, folder)
    parts = [config, *(config.get(name) for name in _NESTED)]
    parts = [part for part in parts if isinstance(part, dict)]
    for part in parts:
        if (kind := str(part.get("model_type"))) in _KINDS:
            if part.get("use_swiglu_ffn") or part.get("use_gated_mlp"):
                part = {**part, "hidden_act": None}
            facts = _read(part, _SWIN if kind == "swin" else _VIT, folder)
            facts |= _normalisation(_object(folder / NAMES[1]), "image_")
            return {"kind": kind, **_KINDS[kind], **facts}
    # Somebody's own: what it says counts, the rest is assumed or asked for.
    facts = {}
    for part in parts:
        swin = "depths" in part or isinstance(part.get("num_heads"), list)
        facts = _read(part, _SWIN if swin else _TIMM | _VIT, folder) | facts
    return facts | _normalisation(config, "")


def json_object(text: str | bytes, where: str, remedy: str) -> dict[str, Any]:
    """The JSON object in a text, or a CheckpointError that says `where`."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is no JSON ({error}); {remedy}.") from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{where} is {shown(found)}; expected an object of JSON; {remedy}."
        )
    return found


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; `{}` if there is no file."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error
    return json_object(
        text,
        f"{path} lies beside the weights and",
        f"expected at most {MAX_BYTES >> 20} MB of JSON, as transformers and timm write"
        " it. Repair it or move it away",
    )


def _timm(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    args, pretrained = (
        given if isinstance(given := config.get(key), dict) else {}
        for key in ("model_args", "pretrained_cfg")
    )
    name = config["architecture"] if isinstance(config["architecture"], str) else ""
    if isinstance(pretrained.get("tag"), str) and "." not in name:
        name += f".{pretrained['tag']}"
    # Before `pretrained_cfg`, timm wrote its values beside the name.
    facts = _read(args, _TIMM, folder) | _normalisation(pretrained or config, "")
    return {"architecture": name, **facts}


def _read(config: Any, names: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Checked values of a config, by our names."""
    facts = {}
    for theirs, (ours, read) in names.items():
        if (given := config.get(theirs)) is None:
            continue
        if (value := read(given)) is None:
            raise CheckpointError(
                f"{folder / NAMES[0]} beside the weights has {theirs}"
                f" {shown(given, 80)}; expected {_EXPECTED[read]}. If it belongs to"
                " another model, move it away."
            )
        facts[ours] = value
    return facts


def _normalisation(config: dict[str, Any], prefix: str) -> dict[str, str]:
    """By mean and deviation; `{}` for those that have no name here."""
    if config.get("do_normalize") is False:
        return {"normalisation": "none"}
    found = [config.get(f"{prefix}{name}") for name in ("mean", "std")]
    for name, values in NORMALISATIONS.items():
        if found == [list(v) for v in values]:
            return {"normalisation": name}
    return {}
