# SPDX-License-Identifier: Apache-2.0
"""What a file of released prompts says, so that it answers as the run did.

Beside prompts and head: the model's own fields, how its backbone was loaded and where
it came from, and what happens to a picture before it. Files of earlier versions say
less; `checkpoint.load_prompts` reads them, and who needs the rest asks for it.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
_WORDS = ("variant", "readout", "normalisation", "resize", "source")
_MAX_SIDE = 4096  # px
_REPOSITORY = re.compile(r"hf://[\w.-]+/[\w.-]+(@[^/@]+)?/?")
# Where Hugging Face keeps its downloads.
_HUB = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([^/]+)/(.+)$")


def fields_of(model: Any) -> dict[str, Any]:
    """What makes a model the function that it is, as JSON can hold it."""
    found = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in found.items()
        if name not in _HOW
    }


def with_fields(path: Any, model: Any, fields: Mapping[str, Any]) -> Any:
    """The model with the fields that a file names.

    Raises:
      CheckpointError: If it has no such field, or a value is of another kind.
    """
    own, changed = fields_of(model), {}
    for name, value in fields.items():
        if name not in own or type(value) is not type(own[name]):
            raise CheckpointError(
                f"{path} says of its model {ascii(name)[:80]} = {ascii(value)[:80]};"
                f" expected the fields of {type(model).__name__}. Install the version"
                " of vpt_jax that wrote the file, or a newer one."
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
    """
    text = os.fspath(path)
    if found := _HUB.search(text.replace(os.sep, "/")):
        return "hf://{}/{}@{}/{}".format(*found.groups())
    return text if is_address(text) else Path(text).name


def is_address(path: str) -> bool:
    """Whether a path is an address, such as `hf://ORG/NAME/FILE`."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path))


def file_of(path: str | os.PathLike) -> Path:
    """The file of released prompts: itself, of an address, or in a shared folder.

    `hf://ORG/NAME`, or with `@REVISION`, is such a folder on the hub.

    Raises:
      CheckpointError: If an address cannot be had, see `remote.local_path`.
    """
    text = os.fspath(path)
    if _REPOSITORY.fullmatch(text):
        text = f"{text.rstrip('/')}/{FOLDER}"
    local = local_path(text)
    return local / FOLDER if (local / FOLDER).is_file() else local


def check_header(path: Any, header: Mapping[str, Any], again: str) -> None:
    """Raises CheckpointError for what a header must not say, whichever version."""
    wrong = [n for n in _WORDS if not isinstance(header.get(n, ""), str)]
    wrong += [n for n in ("load", "model") if not isinstance(header.get(n, {}), dict)]
    side = header.get("image_size", 1)
    if type(side) is not int or not 1 <= side <= _MAX_SIDE:
        wrong.append("image_size")
    if type(header.get("deep", True)) is not bool:
        wrong.append("deep")
    if not wrong:
        for name, value in header.get("load", {}).items():
            kind = ARGUMENTS.get(name)
            texts = not isinstance(value, list) or all(type(x) is str for x in value)
            if kind is None or not isinstance(value, kind) or not texts:
                wrong.append("load")
    if wrong:
        raise CheckpointError(
            f"{path} has {wrong[0]} {ascii(header[wrong[0]])[:200]} in its header;"
            f" expected what vpt_jax.save_prompts writes; {again}."
        )
