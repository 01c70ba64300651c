# SPDX-License-Identifier: Apache-2.0
"""What a file of released prompts says, so that it answers as the run did."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vpt_jax.files.checks import check_path
from vpt_jax.files.messages import shown
from vpt_jax.weights.published import published
from vpt_jax.weights.readers import CheckpointError
from vpt_jax.weights.remote import local_path

FOLDER = "prompts.safetensors"  # of a folder that is shared

# Of a model: not what it computes, but how, and Linen's own.
_HOW = ("parent", "name", "dtype", "param_dtype", "remat", "attention")
# Arguments of `load_backbone` that a file may name.
ARGUMENTS = {
    "readout": str,
    "norm": str,
    "posemb": str,
    "resize": str,
    "num_heads": int,
    "activation": str,
    "epsilon": float,
    "skip": list,
    "dtype": str,
}
_MAX_SIDE = 4096  # px
AGAIN = "it is damaged or was written by something else: fetch it again"
_REPOSITORY = re.compile(r"hf://[\w.-]+/[\w.-]+(@[^/@]+)?/?")
# Where Hugging Face keeps its downloads.
_HUB = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([^/]+)/(.+)$")


def is_text(value: Any) -> bool:
    """Whether it is a text."""
    return isinstance(value, str)


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(map(is_text, values))


def _arguments(given: Any) -> bool:
    return isinstance(given, dict) and all(
        isinstance(value, ARGUMENTS.get(name, ())) and (name != "skip" or _texts(value))
        for name, value in given.items()
    )


_ALWAYS = ("backbone", "backbone_hash", "counts", "class_names")
_HEADER: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("backbone", "backbone_hash", "variant", "readout"), is_text),
    **dict.fromkeys(("normalisation", "resize", "source"), is_text),
    "counts": lambda x: isinstance(x, list) and all(type(n) is int for n in x),
    "class_names": _texts,
    "image_size": lambda x: type(x) is int and 1 <= x <= _MAX_SIDE,
    "deep": lambda x: type(x) is bool,
    "model": lambda x: isinstance(x, dict),
    "load": _arguments,
}


def fields_of(model: Any) -> dict[str, Any]:
    """What makes a model the function that it is, as JSON can hold it."""
    found = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in found.items()
        if name not in _HOW
    }


def with_fields(path: Any, model: Any, fields: Mapping[str, Any]) -> Any:
    """The model with the fields that a file names, or a CheckpointError."""
    own, changed = fields_of(model), {}
    for name, value in fields.items():
        if name not in own or type(value) is not type(own[name]):
            raise CheckpointError(
                f"{path} says of its model {shown(name, 80)} = {shown(value, 80)};"
                f" expected the fields of {type(model).__name__}; install the version"
                " of vpt_jax that wrote it, or a newer one."
            )
        if value != own[name]:
            changed[name] = tuple(value) if isinstance(value, list) else value
    return model.clone(**changed) if changed else model


def source_of(path: str | os.PathLike) -> str:
    """Where others can get a backbone: its address, else its file's name alone.

    Which folder it lay in is nobody's business.

    Example:
      >>> source_of("/home/me/ViT-B_16.npz")
      'ViT-B_16.npz'
      >>> source_of("~/.cache/hub/models--timm--vit/snapshots/abc/model.safetensors")
      'hf://timm/vit@abc/model.safetensors'
      >>> source_of("facebook/dinov2-base")
      'hf://facebook/dinov2-base/model.safetensors'
    """
    text = os.fspath(path)
    if found := _HUB.search(text.replace(os.sep, "/")):
        return "hf://{}/{}@{}/{}".format(*found.groups())
    if named := published(text):
        return named.address
    return text if is_address(text) else Path(text).name


def is_address(path: str) -> bool:
    """Whether a path is an address, such as `hf://ORG/NAME/FILE`."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path))


def file_of(path: str | os.PathLike) -> Path:
    """The file of released prompts: itself, of an address, or in a shared folder.

    `hf://ORG/NAME`, or with `@REVISION`, is such a folder on the hub.
    """
    check_path("path", path)
    text = os.fspath(path)
    if _REPOSITORY.fullmatch(text):
        text = f"{text.rstrip('/')}/{FOLDER}"
    local = local_path(text)
    return local / FOLDER if (local / FOLDER).is_file() else local


def check_header(path: Any, header: Mapping[str, Any]) -> None:
    """Raises CheckpointError for what a header must not say, whichever version."""
    check_fields(path, "header", {**dict.fromkeys(_ALWAYS), **header}, _HEADER)


def check_fields(
    path: Any,
    where: str,
    fields: Mapping[str, Any],
    rules: Mapping[str, Callable[[Any], bool]],
) -> None:
    """Raises CheckpointError for a value that is there and not as its rule says."""
    for name, good in rules.items():
        if name in fields and not good(fields[name]):
            raise CheckpointError(
                f"{path} has {name} {shown(fields[name])} in its {where}; expected what"
                f" vpt_jax writes there; {AGAIN}."
            )
