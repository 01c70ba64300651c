# SPDX-License-Identifier: Apache-2.0
"""What the `config.json` beside a file of weights says that the weights can not.

transformers and timm write one into the folder of every model. Read are heads,
activation and LayerNorm's epsilon, how pictures are normalised (timm's
`pretrained_cfg`, transformers' `preprocessor_config.json`), and the name of the
architecture. How the model classifies (timm's `global_pool`) is not how its features
are read.
"""

import json
import os
from pathlib import Path
from typing import Any

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
}
_NESTED = ("vision_config", "backbone_config", "encoder")
_NORMALISATIONS = {
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)): "half",
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)): "imagenet",
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)): "none",
}


def config_facts(path: str | os.PathLike) -> dict[str, Any]:
    """The facts in the `config.json` beside a local file; `{}` where there is none.

    Returns:
      `num_heads` (of a Swin a tuple), `activation`, `epsilon`, `readout`, `norm`,
      `resize`, `normalisation` as far as they are said; `architecture`, timm's name
      with its tag; `width` and `depth`, to be held against the weights.

    Raises:
      CheckpointError: If the file is there and is no JSON object, or says what no model
        of ours computes.
    """
    folder = Path(path).parent
    config = _object(folder / NAMES[0])
    if "architecture" in config and "pretrained_cfg" in config:
        return _timm(config, folder)
    for name in ("", *_NESTED):
        part = config.get(name, {}) if name else config
        if isinstance(part, dict) and part.get("model_type") in _KINDS:
            facts = _transformers(part, folder)
            return facts | _normalisation(_object(folder / NAMES[1]), "image_")
    return {}


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; `{}` if there is no file."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error
    try:
        found = json.loads(text) if len(text) <= MAX_BYTES else None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} lies beside the weights and is no JSON ({error}); expected what"
            " transformers or timm write there. Repair it or move it away."
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path} lies beside the weights and holds no JSON object of at most"
            f" {MAX_BYTES >> 20} MB, as transformers and timm write it there. Move it"
            " away."
        )
    return found


def _transformers(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    kind = config["model_type"]
    facts: dict[str, Any] = {"kind": kind, **_KINDS[kind]}
    heads = _Field(config, folder)
    if kind == "swin":
        facts |= heads.numbers("num_heads", "num_heads") | heads.numbers(
            "depths", "depth"
        )
        facts |= heads.number("embed_dim", "width")
    else:
        facts |= heads.number("num_attention_heads", "num_heads")
        facts |= heads.number("hidden_size", "width")
        facts |= heads.number("num_hidden_layers", "depth")
    facts |= heads.number("layer_norm_eps", "epsilon", float)
    if not config.get("use_swiglu_ffn"):
        facts |= heads.activation("hidden_act")
    return facts


def _timm(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    pretrained = config["pretrained_cfg"]
    pretrained = pretrained if isinstance(pretrained, dict) else {}
    args = config.get("model_args") or {}
    args = _Field(args if isinstance(args, dict) else {}, folder)
    name = config["architecture"]
    facts: dict[str, Any] = {"architecture": name if isinstance(name, str) else ""}
    if isinstance(pretrained.get("tag"), str) and "." not in facts["architecture"]:
        facts["architecture"] += f".{pretrained['tag']}"
    facts |= args.number("num_heads", "num_heads") | args.number("embed_dim", "width")
    facts |= args.number("depth", "depth") | args.activation("act_layer")
    return facts | _normalisation(pretrained, "")


class _Field:
    """Checked values of a config."""

    def __init__(self, config: dict[str, Any], folder: Path):
        self.config, self.path = config, folder / NAMES[0]

    def number(self, theirs: str, ours: str, kind: type = int) -> dict[str, Any]:
        value = self.config.get(theirs)
        if value is None:
            return {}
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not 0 < value < 2**31 or (kind is int and value != int(value)):
            self.refuse(theirs, "a positive number")
        return {ours: kind(value)}

    def numbers(self, theirs: str, ours: str) -> dict[str, Any]:
        values = self.config.get(theirs)
        if values is None:
            return {}
        if not isinstance(values, list) or not all(type(v) is int for v in values):
            self.refuse(theirs, "a list of whole numbers")
        return {ours: tuple(values)}

    def activation(self, theirs: str) -> dict[str, str]:
        value = self.config.get(theirs)
        if value is None:
            return {}
        if not isinstance(value, str) or value.lower() not in _ACTIVATIONS:
            self.refuse(theirs, f"one of {', '.join(_ACTIVATIONS)}, which we compute")
        return {"activation": _ACTIVATIONS[value.lower()]}

    def refuse(self, name: str, expected: str) -> None:
        raise CheckpointError(
            f"{self.path} beside the weights has {name}"
            f" {ascii(self.config[name])[:80]}; expected {expected}. If it belongs to"
            " another model, move it away."
        )


def _normalisation(config: dict[str, Any], prefix: str) -> dict[str, str]:
    """By mean and deviation; `{}` for those that have no name here."""
    if config.get("do_normalize") is False:
        return {"normalisation": "none"}
    found = [config.get(f"{prefix}{name}") for name in ("mean", "std")]
    for values, name in _NORMALISATIONS.items():
        if found == [list(v) for v in values]:
            return {"normalisation": name}
    return {}
