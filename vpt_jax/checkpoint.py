# SPDX-License-Identifier: Apache-2.0
"""Pretrained weights in, prompts in and out. No pickle anywhere.

Backbones come as `.npz` with Google's names (original ViT, AugReg) or as
`.safetensors` with the same names; the demo backbone ships with the package. Prompts
are released as one safetensors file with their head and a header that says which
backbone they belong to.
"""

import hashlib
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax.models.posemb import resize_pos_embedding
from vpt_jax.models.vit import ViT
from vpt_jax.prompts import Head, Prompts, counts

DEMO_BACKBONE = Path(__file__).parent / "assets" / "demo_vit.safetensors"
FORMAT_VERSION = 1

# Pre-Linen Flax numbered all submodules of a block in one sequence; Google's files
# still carry those names. Linen numbers each kind on its own.
_PRE_LINEN = (
    ("MultiHeadDotProductAttention_1/", "MultiHeadDotProductAttention_0/"),
    ("LayerNorm_2/", "LayerNorm_1/"),
    ("MlpBlock_3/", "MlpBlock_0/"),
)
_NOT_BACKBONE = re.compile(r"(head|pre_logits)/")


class PromptFile(NamedTuple):
    """What `load_prompts` returns: `prompts`, `head`, and the file's header."""

    prompts: Prompts
    head: Head
    header: dict[str, Any]


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """A nested tree as `{'a/b/c': array}`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten` for trees of dicts."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def backbone_hash(backbone: Any) -> str:
    """SHA-256 over the names, shapes and float32 values of a backbone's parameters."""
    digest = hashlib.sha256()
    for name, leaf in sorted(flatten(backbone).items()):
        digest.update(f"{name} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(leaf, np.float32).tobytes())
    return digest.hexdigest()


def load_backbone(
    variant: str,
    path: str | os.PathLike = "",
    *,
    image_size: int = 0,
    resize: str = "corner_aligned",
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
) -> tuple[ViT, Any]:
    """Loads a pretrained ViT.

    Args:
      variant: E.g. `"B/16"`; `"demo/4"` is the small backbone of the package.
      path: `.npz` (Google's ViT and AugReg files) or `.safetensors` with the same
        parameter names. Empty loads the shipped weights of `"demo/4"`. Heads in the
        file are ignored.
      image_size: Side of the pictures in pixels; 0 takes the file's own. The position
        table is resized when it differs.
      resize: How, see `resize_pos_embedding`.
      dtype: Of the computation.
      param_dtype: Of the loaded parameters.

    Returns:
      The model and its parameters.

    Raises:
      ValueError: If the file is absent or damaged, or its parameters are not exactly
        the variant's; the message names what is missing, unused or of another shape.
    """
    own = ViT(variant)  # an unknown variant is the first thing to hear of
    if not path and variant == "demo/4":
        path = DEMO_BACKBONE
    if not path:
        raise ValueError(
            f"no checkpoint given for {variant!r}; pass the path of a .npz or"
            " .safetensors file. Only 'demo/4' ships with the package."
        )
    flat, _ = read_arrays(path)
    flat = {_linen_name(n): a for n, a in flat.items() if not _NOT_BACKBONE.match(n)}
    table = flat.get("Transformer/posembed_input/pos_embedding")
    side = _grid(table, path) * own.patch if table is not None else own.image_size
    model = ViT(variant, image_size=side, dtype=dtype, param_dtype=param_dtype)
    _check_same(flat, model, path)
    if image_size and image_size != side:
        model = model.clone(image_size=image_size)
        resized = resize_pos_embedding(
            jnp.asarray(table, jnp.float32), image_size // model.patch, resize
        )
        flat["Transformer/posembed_input/pos_embedding"] = np.asarray(resized)
    return model, unflatten({n: jnp.asarray(a, param_dtype) for n, a in flat.items()})


def read_card(path: str | os.PathLike = "") -> dict[str, Any]:
    """The model card in a safetensors file's header; `{}` where there is none."""
    path = Path(path or DEMO_BACKBONE)
    if path.suffix != ".safetensors":
        return {}
    return json.loads(read_arrays(path)[1].get("model_card", "{}"))


def save_backbone(path: str | os.PathLike, backbone: Any, card: dict[str, Any]) -> None:
    """Writes a backbone as safetensors with its model card in the header."""
    _write_safetensors(path, flatten(backbone), {"model_card": json.dumps(card)})


def save_prompts(
    path: str | os.PathLike,
    prompts: Prompts,
    head: Head,
    *,
    model: ViT,
    backbone: Any,
    backbone_name: str,
    normalisation: str,
    class_names: Sequence[str],
    deep: bool = True,
) -> None:
    """Writes prompts and their head as one small safetensors file.

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

    Raises:
      ValueError: If the number of class names is not the head's.
    """
    if len(class_names) != head["bias"].shape[0]:
        raise ValueError(
            f"class_names has {len(class_names)} entries but the head has"
            f" {head['bias'].shape[0]} classes."
        )
    known = isinstance(backbone, str)
    header = {
        "version": FORMAT_VERSION,
        "backbone": backbone_name,
        "backbone_hash": backbone if known else backbone_hash(backbone),
        "variant": model.variant,
        "image_size": model.image_size,
        "normalisation": normalisation,
        "class_names": list(class_names),
        "counts": list(counts(prompts)),
        "deep": deep,
    }
    arrays = {f"prompts/{i:02d}": p for i, p in enumerate(prompts)}
    arrays |= {f"head/{name}": value for name, value in head.items()}
    arrays = {name: np.asarray(a, np.float32) for name, a in arrays.items()}
    _write_safetensors(path, arrays, {"vpt_jax": json.dumps(header)})


def load_prompts(path: str | os.PathLike, *, backbone: Any = None) -> PromptFile:
    """Reads what `save_prompts` wrote.

    Args:
      path: The file.
      backbone: The parameters that the prompts will be used with (or their hash). If
        given, it must be the backbone that the prompts were trained on.

    Returns:
      Prompts, head (JAX arrays, float32) and the header.

    Raises:
      ValueError: If the file is damaged, of another kind or version, or belongs to
        another backbone (both hashes are shown).
    """
    arrays, metadata = read_arrays(path)
    if "vpt_jax" not in metadata:
        raise ValueError(
            f"{path} is a safetensors file without a vpt_jax header; expected a file"
            " written by vpt_jax.save_prompts."
        )
    header = json.loads(metadata["vpt_jax"])
    if header["version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {header['version']} but this vpt_jax reads"
            f" version {FORMAT_VERSION}; install the version that wrote it."
        )
    depth = len(header["counts"])
    names = [f"prompts/{i:02d}" for i in range(depth)] + ["head/bias", "head/kernel"]
    if sorted(arrays) != sorted(names):
        raise ValueError(f"{path} holds {sorted(arrays)}; its header says {names}.")
    prompts = tuple(jnp.asarray(arrays[n]) for n in names[:depth])
    if counts(prompts) != tuple(header["counts"]):
        raise ValueError(
            f"{path} holds prompts with counts {counts(prompts)}; its header says"
            f" {tuple(header['counts'])}."
        )
    if backbone is not None:
        got = backbone if isinstance(backbone, str) else backbone_hash(backbone)
        if got != header["backbone_hash"]:
            raise ValueError(
                f"{path} belongs to another backbone: its prompts were trained on"
                f" {header['backbone']!r} with hash {header['backbone_hash']}, but the"
                f" backbone given has hash {got}. Load the weights they were trained"
                " on."
            )
    head = {n: jnp.asarray(arrays[f"head/{n}"]) for n in ("kernel", "bias")}
    return PromptFile(prompts, head, header)


def read_arrays(
    path: str | os.PathLike,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata of a `.npz` (no pickle) or `.safetensors` file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such file: {path}.")
    if path.suffix == ".npz":
        try:
            with open(path, "rb") as f, np.load(f, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}, {}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} cannot be read as .npz: {error}.") from error
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as archive:
                arrays = {n: archive.get_tensor(n) for n in archive.keys()}
                return arrays, archive.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} cannot be read as .safetensors: {error}."
            ) from error
    raise ValueError(
        f"{path} has ending {path.suffix!r}; expected .npz or .safetensors."
    )


def _write_safetensors(
    path: str | os.PathLike, arrays: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    """Through a temporary name and a rename, so that the file is whole or absent."""
    from safetensors.numpy import save

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = save({n: np.ascontiguousarray(a) for n, a in arrays.items()}, metadata)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes 0600
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _linen_name(name: str) -> str:
    for old, new in _PRE_LINEN:
        name = name.replace(old, new)
    return name


def _grid(table: np.ndarray, path: Any) -> int:
    grid = round((table.shape[1] - 1) ** 0.5) if table.ndim == 3 else 0
    if grid < 1 or grid * grid + 1 != table.shape[1]:
        raise ValueError(
            f"{path}: the position table has shape {table.shape}; expected"
            " [1, 1 + n * n, d], a class token and a square grid."
        )
    return grid


def _check_same(flat: dict[str, np.ndarray], model: ViT, path: Any) -> None:
    """Raises unless names and shapes are exactly the model's."""
    side = model.image_size
    abstract = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, side, side, 3))
    )["params"]
    expected = {
        jax.tree_util.keystr(p, simple=True, separator="/"): leaf.shape
        for p, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }
    problems = [f"missing {n}" for n in sorted(set(expected) - set(flat))]
    problems += [f"unused {n}" for n in sorted(set(flat) - set(expected))]
    problems += [
        f"{n} has shape {flat[n].shape}, expected {expected[n]}"
        for n in sorted(set(flat) & set(expected))
        if flat[n].shape != expected[n]
    ]
    if problems:
        shown = "; ".join(problems[:6])
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        kernel = flat.get("embedding/kernel", np.zeros((0, 0, 0, 0)))
        blocks = {n.split("/")[1] for n in flat if "/encoderblock_" in n}
        raise ValueError(
            f"{path} does not fit {model.variant!r} (width {model.width}, depth"
            f" {model.depth}, patch {model.patch}); the file has width"
            f" {kernel.shape[-1]}, depth {len(blocks)}, patch {kernel.shape[0]}:"
            f" {shown}{more}."
        )
