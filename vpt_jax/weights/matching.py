# SPDX-License-Identifier: Apache-2.0
"""Which model a file of weights holds, and its parameters, exactly or not at all."""

import contextlib
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax import parallel
from vpt_jax.models.posemb import grid_side
from vpt_jax.models.swin import Swin
from vpt_jax.models.vit import ViT
from vpt_jax.weights.backbones import HEADS
from vpt_jax.weights.families import refuse_structures
from vpt_jax.weights.naming import (
    FINAL_NORM,
    INPUT_NORM,
    POOLING,
    POSITIONS,
    Entry,
    Named,
    named_leaves,
    needed,
    skipped,
    unflatten,
)
from vpt_jax.weights.readers import CheckpointError
from vpt_jax.weights.sizes import (
    describe,
    is_rotary,
    sizes_of,
    swin_sizes,
    variant_of,
    vit_sizes,
)

_SHOWN = 6  # problems that a message lists
_BIAS_TABLE = "/relative_position_bias_table"


def match_vit(
    wanted: ViT, named: Named, path: Any, *, readout: str, norm: str, posemb: str
) -> ViT:
    """The ViT in the file: `wanted` with what the file says of its other attributes.

    Raises CheckpointError if the file holds another variant or kind of network.
    """
    shapes = named.shapes
    found = vit_sizes(named) if named.kind == "vit" else {}
    if posemb == "learned" and is_rotary(named):
        posemb = "rotary"
    if found:
        pooled = norm == "after" and readout != "cls"
        names = [*shapes, *named.skipped]
        refuse_structures(names, path, pooled=pooled, rotary=posemb == "rotary")
    if not found or any(size != getattr(wanted, n) for n, size in found.items()):
        raise CheckpointError(
            f"{path} holds {describe(named)}, not {wanted.variant!r} (width"
            f" {wanted.width}, depth {wanted.depth}, mlp_dim {wanted.mlp_dim}, patch"
            f" {wanted.patch}); pass the variant that the file is, or the path alone."
        )
    class_token, side = "cls" in shapes, wanted.image_size
    if posemb == "learned" and POSITIONS in shapes:
        side = _grid(shapes, class_token, path) * wanted.patch
    pooled = _final_norm(named).endswith("fc_norm.weight") and readout != "cls"
    registers = shapes.get("registers", ())
    first = "map" if f"{POOLING}/probe" in shapes else "cls" if class_token else "mean"
    epsilon, pre_norm = wanted.epsilon, f"{INPUT_NORM}/scale" in shapes
    if epsilon == ViT.epsilon and (posemb == "rotary" or pre_norm):
        epsilon = 1e-5  # of every DINOv3 and CLIP
    return wanted.clone(
        image_size=side,
        class_token=class_token,
        registers=registers[1] if len(registers) == 3 else 0,
        layer_scale=any("LayerScale_0" in name for name in shapes),
        readout=readout or ("mean" if pooled else first),
        norm=norm or ("after" if pooled else "before"),
        posemb=posemb,
        pre_norm=pre_norm,
        epsilon=epsilon,
    )


def match_swin(
    wanted: Swin, named: Named, path: Any, *, readout: str, image_size: int
) -> Swin:
    """The Swin in the file: `wanted` with its window. Raises like `match_vit`."""
    found = swin_sizes(named) if named.kind == "swin" else {}
    windows = found.pop("windows", ())
    if len(set(windows[:-1])) > 1:
        raise CheckpointError(
            f"{path} holds a Swin whose stages have windows of {windows} (Swin S3),"
            " which is not supported: it has one window for all stages here. Take"
            " hf://timm/swin_tiny_patch4_window7_224.ms_in1k/model.safetensors."
        )
    if not found or any(size != getattr(wanted, n) for n, size in found.items()):
        raise CheckpointError(
            f"{path} holds {describe(named)}, not {wanted.variant!r} (embed_dim"
            f" {wanted.embed_dim}, depths {wanted.depths}); pass the variant that the"
            " file is."
        )
    # The last stage's window may be all of its picture, and smaller (Swin S3-S).
    side = wanted.patch * (windows[-1] if windows else 0) * 2 ** (wanted.num_stages - 1)
    return wanted.clone(
        window=max(windows, default=0),
        image_size=image_size or side,
        readout=readout or "mean_with_prompts",  # of every published one
    )


def infer(named: Named, path: Any, num_heads: int | tuple[int, ...]) -> ViT | Swin:
    """The model of the file's sizes, where the caller names no variant.

    Of a Swin, of which a `config.json` tells a tuple, the file says the heads. Raises
    CheckpointError if sizes are absent, or are no variant's and the heads unknown.
    """
    swins, variant = named.kind == "swin", variant_of(named)
    rotary = not swins and is_rotary(named)
    if not swins:
        names = [*named.shapes, *named.skipped]
        refuse_structures(names, path, pooled=True, rotary=rotary)
    found = sizes_of(named)
    if variant:
        return Swin(variant) if swins else ViT(f"{variant}/{found['patch']}")
    if swins:
        found["window"] = max(found.pop("windows"), default=0)
    else:
        usual = HEADS.get(found.get("width", 0), (0,))[0]
        side = patch = found.get("patch", 0)  # the position table's, where there is one
        if patch and rotary:
            side = 224 // patch * patch
        found |= {"num_heads": num_heads or usual, "image_size": side}
        if not all(found.get(n) for n in ("num_heads", "patch", "depth", "mlp_dim")):
            raise CheckpointError(
                f"{path} holds {describe(named)}, and how many heads it has is not"
                " known; pass num_heads=."
            )
    try:
        return Swin(**found) if swins else ViT(**found)
    except ValueError as error:
        raise CheckpointError(f"{path} holds {describe(named)}: {error}") from error


def parameters(
    named: Named,
    model: Any,
    path: Any,
    skip: Sequence[str],
    param_dtype: Any,
    mesh: Any = None,
) -> dict[str, Any]:
    """The model's parameters, read one array after the other, each put on the mesh.

    Raises CheckpointError if names and shapes are not exactly the model's, but for what
    `skip` names; or a value is NaN or infinite.
    """
    expected, skip = _expected(model), tuple(skip)
    entries = [
        e
        for e in named.entries
        if not any(skipped(n, skip) for n in (e.source, *e.names))
    ]
    absent: set[str] = set()
    refuse_skips(named, expected, path, skip)
    pools = isinstance(model, ViT) and model.readout != "cls"
    if isinstance(model, ViT):
        absent |= _without_bias(model, expected, entries)
        if model.readout != "map":  # read otherwise: no part of the features
            entries = [e for e in entries if not e.names[0].startswith(POOLING)]
    if pools and model.norm == "after" and _token_norm(named):
        # It was trained on tokens: after pooling the norm has no weights (MAE, VPT).
        entries = [e for e in entries if not e.names[0].startswith(FINAL_NORM)]
        absent |= {n for n in expected if n.startswith(FINAL_NORM)}
    _check(entries, expected, absent, named, model, path, skip)
    flat: dict[str, Any] = {}
    rows: Any = 0  # of the position table, for registers
    for entry in entries:
        arrays = entry.make(entry.lazy.load())
        for name, array in zip(entry.names, arrays, strict=True):
            if name == POSITIONS and array.shape[1] == expected[name][1] - 1:
                # The class token has no position: the same as a row of zeros.
                array = np.pad(array, ((0, 0), (1, 0), (0, 0)))
            elif name == POSITIONS and array.shape[1] > expected[name][1]:
                # Registers that have positions: the same as registers with them added.
                first = int(model.class_token)
                last = first + model.registers
                rows = finite(array[:, first:last], entry.source, path, param_dtype)
                array = np.delete(array, slice(first, last), axis=1)
            if name.endswith(_BIAS_TABLE):
                array = _centre(array, expected[name][0])
            array = finite(
                array.reshape(expected[name]), entry.source, path, param_dtype
            )
            flat[name] = parallel.put_part(array, name, mesh)
    if missing := sorted(set(expected) - set(flat)):
        first = jax.jit(lambda: {n: _init(model)[n] for n in missing})()
        for name, x in first.items():
            flat[name] = parallel.put_part(x.astype(param_dtype), name, mesh)
    if not isinstance(rows, int):
        flat["registers"] = flat["registers"] + jnp.asarray(rows, param_dtype)
    return unflatten(flat)


# Biases that all blocks of a network may lack: none is the same as zeros.
_NO_BIAS = {
    "rotary": re.compile(r"/(query|key|value)/bias$"),
    "pre_norm": re.compile(r"^embedding/bias$"),
}


def _without_bias(
    model: ViT, expected: dict[str, Any], entries: list[Entry]
) -> set[str]:
    """Biases that DINOv3 (of keys, or all three) and CLIP (of patches) do not have."""
    given = {name for entry in entries for name in entry.names}
    absent: set[str] = set()
    for kind, pattern in _NO_BIAS.items():
        if kind not in (model.posemb, "pre_norm" if model.pre_norm else ""):
            continue
        kinds = {m[0] for name in given if (m := pattern.search(name))}
        absent |= {
            n for n in expected if (m := pattern.search(n)) and m[0] not in kinds
        }
    return absent


def finite(array: np.ndarray, name: str, path: Any, dtype: Any) -> np.ndarray:
    """The array in `dtype`, or a CheckpointError if a value is no number there."""
    with np.errstate(over="ignore"):  # too large for `dtype`: infinite there
        cast = array.astype(dtype, copy=False)
        bad = cast.size - int(np.count_nonzero(np.isfinite(cast)))
        narrow = bad and np.isfinite(array.astype(np.float32, copy=False)).all()
    if narrow:
        raise CheckpointError(
            f"{path} has {name} with {bad} of {array.size} values beyond what"
            f" {cast.dtype} holds; expected smaller ones. Pass"
            " param_dtype=jnp.float32 or jnp.bfloat16."
        )
    if bad:
        raise CheckpointError(
            f"{path} has {name} with {bad} of {array.size} values that are NaN or"
            " infinite; expected numbers. The training that made it diverged, or it was"
            " damaged: take an earlier checkpoint, or fetch it again."
        )
    return cast


# Where a name lies in a block, in any project's words.
_IN_BLOCK = re.compile(
    r"(^|[./])((blocks|layers?|resblocks)\.\d+|(encoder)?block\w*|blocks_\d+_\d+)[./]"
)


def refuse_skips(
    named: Named, expected: dict[str, Any], path: Any, skip: tuple[str, ...]
) -> None:
    """Raises CheckpointError if `skip` names what the network's function needs.

    That is a parameter of the model which nothing else in the file gives, and any array
    within a block, the model's or not.
    """
    if not skip:
        return
    given = {
        name
        for e in named.entries
        if not any(skipped(n, skip) for n in (e.source, *e.names))
        for name in e.names
    }
    names = [n for n in expected if skipped(n, skip) and n not in given]
    names += [n for n in named.skipped if _IN_BLOCK.search(n)]
    for name in names:
        raise CheckpointError(needed(path, name))


def _init(model: Any) -> dict[str, jax.Array]:
    """All initial parameters; under jit only those are computed that are used."""
    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    return named_leaves(model.init(jax.random.key(0), images)["params"])


@functools.lru_cache(8)
def _expected(model: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's parameters."""
    shapes = jax.eval_shape(functools.partial(_init, model))
    return {name: leaf.shape for name, leaf in shapes.items()}


def _check(
    entries: list[Entry],
    expected: dict[str, tuple[int, ...]],
    absent: set[str],
    named: Named,
    model: Any,
    path: Any,
    skip: tuple[str, ...],
) -> None:
    found = {
        name: (shape, entry.source)
        for entry in entries
        for name, shape in zip(entry.names, entry.shapes, strict=True)
    }
    problems = [f"missing {n}" for n in sorted(set(expected) - set(found) - absent)]
    unused = {found[n][1] for n in set(found) - set(expected)}
    unused |= {n for n in named.unknown if not skipped(n, skip)}
    problems += [f"unused {n}" for n in sorted(unused)]
    if whole := [e.source for e in entries if e.lazy.dtype.kind in "iub"]:
        raise CheckpointError(
            f"{path} holds a quantised network, which is not supported: {whole[0]} has"
            " whole numbers. Take the file from before the quantisation, in float32,"
            " float16 or bfloat16."
        )
    problems += [
        f"{found[n][1]} has shape {found[n][0]}, expected {expected[n]}"
        for n in sorted(set(found) & set(expected))
        if not _fits(n, found[n][0], expected[n], getattr(model, "registers", 0))
    ]
    everything = [*expected, *named.unknown, *named.left_out, *named.skipped]
    everything += [n for e in named.entries for n in (e.source, *e.names)]
    problems += [
        f"skip names {part!r}, which is neither in file nor model"
        for part in skip
        if not any(skipped(n, (part,)) for n in everything)
    ]
    if problems:
        more = len(problems) - _SHOWN
        advice = (
            "Expected exactly the variant's arrays: another kind of network is not"
            " loaded in part."
        )
        if len(problems) == len(unused) and not any(map(_IN_BLOCK.search, unused)):
            advice = "Name what is no part of the features, such as a head, in skip=."
        raise CheckpointError(
            f"{path} does not fit {model.variant!r}: {'; '.join(problems[:_SHOWN])}"
            f"{f'; and {more} more' if more > 0 else ''}. {advice}"
        )


def _fits(
    name: str, got: tuple[int, ...], expected: tuple[int, ...], registers: int
) -> bool:
    if name == POSITIONS:
        rows = {expected[1] - 1, expected[1], expected[1] + registers}
        return len(got) == 3 and got[::2] == expected[::2] and got[1] in rows
    if name.endswith(_BIAS_TABLE) and len(got) == 2:
        return got[1] == expected[1] and got[0] in _odd_squares(expected[0])
    # PyTorch has one axis for all heads: the same numbers in the same order.
    heads = re.search(r"/(query|key|value|out)/(kernel|bias)$", name)
    joined = len(got) == (2 if name.endswith("kernel") else 1)
    if heads and joined and len(expected) > len(got):
        inner = expected[0] if heads[1] != "out" else expected[-1]
        outer = np.prod(expected) // inner
        rows = (inner, outer) if heads[1] != "out" else (outer, inner)
        return got == (rows if len(got) == 2 else (np.prod(expected),))
    return got == expected


def _odd_squares(least: int) -> set[int]:
    """Rows of bias tables of this window and larger ones, up to 64 patches."""
    return {n * n for n in range(math.isqrt(least), 128, 2)}


def _centre(table: np.ndarray, rows: int) -> np.ndarray:
    """The part of a window's bias table `[(2 m - 1)**2, h]` for a smaller window.

    Patches at the same distance keep their bias.
    """
    old, new = math.isqrt(table.shape[0]), math.isqrt(rows)
    cut = (old - new) // 2
    square = table.reshape(old, old, -1)[cut : cut + new, cut : cut + new]
    return square.reshape(rows, -1)


def _final_norm(named: Named) -> str:
    """The file's name of the final norm's scale; empty if there is none."""
    name = f"{FINAL_NORM}/scale"
    return next((e.source for e in named.entries if name in e.names), "")


def _token_norm(named: Named) -> bool:
    """Whether the final norm is one that PyTorch models use before pooling."""
    source = _final_norm(named)
    return "/" not in source and not source.endswith("fc_norm.weight")


def _grid(shapes: dict[str, tuple[int, ...]], class_token: bool, path: Any) -> int:
    """Patches per side; the table may have rows for class token and registers, or not.

    Registers have rows in distilled DeiTs and some of timm's ViTs.
    """
    shape, registers = shapes[POSITIONS], shapes.get("registers", ())
    for with_row in (class_token, False):
        with contextlib.suppress(ValueError):
            return grid_side(shape, with_row)
    if len(registers) == len(shape) == 3:
        with contextlib.suppress(ValueError):
            return grid_side((shape[0], shape[1] - registers[1], shape[2]), class_token)
    raise CheckpointError(
        f"{path}: the position table has shape {shape} and the file has"
        f" {'a' if class_token else 'no'} class token (cls); expected [1, n * n, d]"
        f"{' or [1, 1 + n * n, d]' if class_token else ''}."
    )
