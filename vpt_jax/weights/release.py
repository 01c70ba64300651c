# SPDX-License-Identifier: Apache-2.0
"""Prompts in and out: one safetensors file with their head and a header.

The header says which backbone they belong to, and all else that makes the file answer
as the run did.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from vpt_jax.files.checks import (
    check_head,
    check_layers,
    check_model,
    check_path,
    check_shallow,
    expect,
)
from vpt_jax.files.durable import atomic_path
from vpt_jax.files.messages import printable, shown
from vpt_jax.models.inputs import NORMALISATIONS, check_prompts
from vpt_jax.models.swin import Swin
from vpt_jax.models.vit import ViT
from vpt_jax.prompts import Head, Prompts, check_choice, counts
from vpt_jax.weights.naming import named_leaves
from vpt_jax.weights.published import published
from vpt_jax.weights.readers import CheckpointError, read_arrays
from vpt_jax.weights.remote import local_path
from vpt_jax.weights.sidecar import json_object

FORMAT_VERSION = 1

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


class PromptFile(NamedTuple):
    """What `load_prompts` returns: `prompts`, `head`, and the file's header.

    Example:
      >>> prompts, head, header = load_prompts("mine.safetensors")
      >>> header["variant"], header["counts"]
      ('demo/4', [2, 2, 2, 2, 2, 2])
    """

    prompts: Prompts
    head: Head
    header: dict[str, Any]


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """A nested tree as `{'a/b/c': NumPy array}`."""
    return {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}


def backbone_hash(backbone: Any) -> str:
    """SHA-256 over the names, shapes and float32 values of a backbone's parameters.

    Example:
      >>> backbone_hash(backbone)[:8]
      '9fe268c3'
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(backbone).items()):  # one on the host
        digest.update(f"{name} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(leaf, np.float32).tobytes())
    return digest.hexdigest()


def save_prompts(
    path: str | os.PathLike,
    prompts: Prompts,
    head: Head,
    *,
    model: ViT | Swin,
    backbone: Any,
    backbone_name: str,
    normalisation: str,
    class_names: Sequence[str],
    deep: bool = True,
    resize: str = "",
    source: str | os.PathLike = "",
    load: Mapping[str, Any] | None = None,
) -> None:
    """Writes prompts and their head as one small safetensors file.

    With `resize`, `source` and `load` the file is all that `load_classifier` needs,
    besides the backbone.

    Args:
      path: The file; it appears when it is whole.
      prompts: One `[n_i, d]` array per layer (stored as float32).
      head: `{'kernel', 'bias'}`.
      model: The model they belong to.
      backbone: Its parameters, or their `backbone_hash` where it is known.
      backbone_name: For people: which weights these were.
      normalisation: Name of the pictures' normalisation.
      class_names: One per row of logits.
      deep: False for VPT-Shallow.
      resize: How pictures become squares: one of `data.pictures.RULES`.
      source: Path, address or name of the backbone's file; of a path, its end is kept.
      load: Other arguments of `load_backbone` that made it, see `ARGUMENTS`.

    Raises:
      ValueError: If prompts, head, model and class names do not fit together, a value
        is not finite, or the normalisation is unknown.

    Example:
      >>> about = {"model": model, "backbone": backbone, "backbone_name": "demo"}
      >>> about |= {"normalisation": "half", "class_names": list("0123456789")}
      >>> save_prompts("new.safetensors", prompts, head, **about)
    """
    check_choice("normalisation", normalisation, tuple(NORMALISATIONS))
    _check_released(prompts, head, model, class_names, deep)
    known = isinstance(backbone, str)
    header = {
        "version": FORMAT_VERSION,
        "backbone": backbone_name,
        "backbone_hash": backbone if known else backbone_hash(backbone),
        "variant": model.variant,
        "image_size": model.image_size,
        "readout": model.readout,
        "normalisation": normalisation,
        "class_names": list(class_names),
        "counts": list(counts(prompts)),
        "deep": deep,
        "model": fields_of(model),
        "load": dict(load or {}),
        "source": source_of(source),
        "resize": resize,
    }
    arrays = {f"prompts/{i:02d}": p for i, p in enumerate(prompts)}
    arrays |= {f"head/{name}": value for name, value in head.items()}
    arrays = {name: np.asarray(a, np.float32) for name, a in arrays.items()}
    write_arrays(path, arrays, {"vpt_jax": json.dumps(header)})


def _check_released(
    prompts: Any, head: Any, model: Any, class_names: Any, deep: bool
) -> None:
    """Raises ValueError unless what is to be released is of one model, and finite."""
    check_model(model, "widths", "variant", "readout")
    check_layers("prompts", prompts, 2, shape="[n_i, d]")
    num = check_prompts(prompts, model.widths)
    check_head(head)
    if not deep:
        check_shallow(num)
    width, classes = head["kernel"].shape
    if width != model.width:
        raise ValueError(
            f"head has width {width} but the model's features have {model.width}."
        )
    right = not is_text(class_names) and all(map(is_text, class_names))
    expect(right, "class_names", class_names, "one text per class")
    if len(class_names) != classes:
        raise ValueError(
            f"class_names has {len(class_names)} entries but the head has {classes}"
            " classes."
        )
    if not all(np.isfinite(x).all() for x in (*prompts, *head.values())):
        raise ValueError(
            "prompts or head have values that are infinite or NaN; expected numbers:"
            " the training diverged, save an earlier state."
        )


def load_prompts(path: str | os.PathLike, *, backbone: Any = None) -> PromptFile:
    """Reads what `save_prompts` wrote.

    Args:
      path: The file, its address, or a shared folder: `hf://ORG/NAME`, see `share`.
      backbone: The parameters that the prompts will be used with (or their hash). If
        given, it must be the backbone that the prompts were trained on.

    Returns:
      Prompts, head (JAX arrays, float32) and the header.

    Raises:
      CheckpointError: If the file is damaged, of another kind or version, has values
        that are not finite, or belongs to another backbone (both hashes are shown).

    Example:
      >>> prompts, head, header = load_prompts("mine.safetensors", backbone=backbone)
      >>> counts(prompts), header["normalisation"]
      ((2, 2, 2, 2, 2, 2), 'half')
    """
    path = file_of(path)
    arrays, metadata = read_arrays(path)
    if "vpt_jax" not in metadata:
        raise CheckpointError(
            f"{path} is a file without a vpt_jax header; expected one written by"
            " vpt_jax.save_prompts."
        )
    header = json_object(metadata["vpt_jax"], f"the header of {path}", AGAIN)
    if (version := header.get("version")) != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {shown(version)} but this vpt_jax reads version"
            f" {FORMAT_VERSION}; install the version that wrote it."
        )
    check_header(path, header)
    _check_prompt_arrays(path, arrays, header)
    depth = len(header["counts"])
    prompts = tuple(jnp.asarray(arrays[f"prompts/{i:02d}"]) for i in range(depth))
    if backbone is not None:
        got = backbone if isinstance(backbone, str) else backbone_hash(backbone)
        if got != header["backbone_hash"]:
            raise CheckpointError(
                f"{path} belongs to another backbone: its prompts were trained on"
                f" {shown(header['backbone'])} with hash"
                f" {shown(header['backbone_hash'])}, the one given has hash {got}. Load"
                " the weights they were trained on."
            )
    head = {n: jnp.asarray(arrays[f"head/{n}"]) for n in ("kernel", "bias")}
    return PromptFile(prompts, head, header)


def _check_prompt_arrays(
    path: str | os.PathLike, arrays: dict[str, np.ndarray], header: dict[str, Any]
) -> None:
    """Raises unless the arrays are those that the header describes, and finite."""
    classes = len(header["class_names"])
    expected: dict[str, tuple[int | str, ...]] = {
        f"prompts/{i:02d}": (n, "d") for i, n in enumerate(header["counts"])
    }
    expected |= {"head/bias": (classes,), "head/kernel": ("d", classes)}
    if arrays.keys() != expected.keys():
        raise CheckpointError(
            f"{path} holds {shown(sorted(arrays), 500)}; expected"
            f" {shown(list(expected), 500)}, as its header says; {AGAIN}."
        )
    for name, shape in expected.items():
        array = arrays[name]
        fits = len(shape) == array.ndim and all(
            n in ("d", size) for n, size in zip(shape, array.shape, strict=True)
        )
        if not fits or array.dtype != np.float32:
            raise CheckpointError(
                f"{path} has {name} {array.dtype} {list(array.shape)}; expected float32"
                f" [{', '.join(map(str, shape))}], as its header says; {AGAIN}."
            )
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"{path} has values in {name} that are infinite or NaN, expected"
                f" numbers: the training diverged, train again; or {AGAIN}."
            )


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


def variant_of(header: Mapping[str, Any]) -> str:
    """What a file calls its backbone: the variant, or the sizes of one without."""
    sizes = header.get("model", {})
    found = header["variant"] or f"{sizes.get('width')} x {sizes.get('depth')}"
    return printable(found)[:40]


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


def write_arrays(
    path: str | os.PathLike, arrays: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    """As safetensors, by a temporary name and a rename: the file is whole or absent."""
    from safetensors.numpy import save

    data = save({n: np.ascontiguousarray(a) for n, a in arrays.items()}, metadata)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
