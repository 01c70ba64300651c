# SPDX-License-Identifier: Apache-2.0
"""Which model a file of weights holds, and its parameters, exactly or not at all."""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax.models import swin, vit
from vpt_jax.models.posemb import grid_side
from vpt_jax.models.swin import Swin
from vpt_jax.models.vit import ViT
from vpt_jax.naming import (
    FINAL_NORM,
    POSITIONS,
    Entry,
    Named,
    named_leaves,
    skipped,
    unflatten,
)
from vpt_jax.readers import CheckpointError

_SHOWN = 6  # problems that a message lists
_BIAS_TABLE = "/relative_position_bias_table"


def match_vit(
    wanted: ViT, named: Named, path: Any, *, readout: str, norm: str, posemb: str
) -> ViT:
    """The ViT in the file: `wanted` with what the file says of its other attributes.

    Raises:
      CheckpointError: If the file holds another variant or kind of network.
    """
    shapes = named.shapes
    found = vit_sizes(named) if named.kind == "vit" else {}
    if not found or any(size != getattr(wanted, n) for n, size in found.items()):
        raise CheckpointError(
            f"{path} holds {describe(named)}, not {wanted.variant!r} (width"
            f" {wanted.width}, depth {wanted.depth}, mlp_dim {wanted.mlp_dim}, patch"
            f" {wanted.patch}); pass the variant that the file is."
        )
    class_token, side = "cls" in shapes, wanted.image_size
    if posemb == "learned" and POSITIONS in shapes:
        side = _grid(shapes[POSITIONS], class_token, path) * wanted.patch
    pooled = _final_norm(named).endswith("fc_norm.weight") and readout != "cls"
    registers = shapes.get("registers", ())
    return wanted.clone(
        image_size=side,
        class_token=class_token,
        registers=registers[1] if len(registers) == 3 else 0,
        layer_scale=any("LayerScale_0" in name for name in shapes),
        readout=readout or ("cls" if class_token and not pooled else "mean"),
        norm=norm or ("after" if pooled else "before"),
        posemb=posemb,
    )


def match_swin(
    wanted: Swin, named: Named, path: Any, *, readout: str, image_size: int
) -> Swin:
    """The Swin in the file: `wanted` with the file's window.

    Raises:
      CheckpointError: If the file holds another variant or kind of network.
    """
    found = swin_sizes(named) if named.kind == "swin" else {}
    window = found.pop("window", 0)
    if not found or any(size != getattr(wanted, n) for n, size in found.items()):
        raise CheckpointError(
            f"{path} holds {describe(named)}, not {wanted.variant!r} (embed_dim"
            f" {wanted.embed_dim}, depths {wanted.depths}); pass the variant that the"
            " file is."
        )
    return wanted.clone(
        window=window, image_size=image_size, readout=readout or wanted.readout
    )


def vit_sizes(named: Named) -> dict[str, int]:
    """`width`, `patch`, `depth`, `mlp_dim`, `swiglu` of the file's ViT.

    Sizes whose arrays are absent are left out: those are reported as missing later.
    """
    shapes = named.shapes
    kernel = shapes.get("embedding/kernel", ())
    found = {}
    if len(kernel) == 4:
        found = {"width": kernel[3], "patch": kernel[0]}
    blocks = {m[1] for n in shapes if (m := re.match(r".*/encoderblock_(\d+)/", n))}
    found["depth"] = len(blocks)
    dense = "Transformer/encoderblock_0/MlpBlock_0/Dense_{}/kernel"
    first, second = (shapes.get(dense.format(i), ()) for i in (0, 1))
    if len(first) == len(second) == 2:
        found["mlp_dim"] = second[0]
        found["swiglu"] = first[1] == 2 * second[0]
    return found


def swin_sizes(named: Named) -> dict[str, Any]:
    """`embed_dim`, `depths`, `num_heads`, `window` of the file's Swin."""
    shapes = named.shapes
    depths: dict[int, set[str]] = {}
    heads: dict[int, int] = {}
    sides = []
    for name, shape in shapes.items():
        if not (m := re.match(r"blocks_(\d+)_(\d+)/", name)):
            continue
        depths.setdefault(int(m[1]), set()).add(m[2])
        if name.endswith("bias_table") and len(shape) == 2:
            heads[int(m[1])] = shape[1]
            sides.append((round(shape[0] ** 0.5) + 1) // 2)
    kernel = shapes.get("patch_embed/kernel", ())
    return {
        "embed_dim": kernel[3] if len(kernel) == 4 else 0,
        "depths": tuple(len(depths[i]) for i in sorted(depths)),
        "num_heads": tuple(heads[i] for i in sorted(heads)),
        "window": max(sides, default=0),
    }


def describe(named: Named) -> str:
    """Which network a file holds, in words; its variant if it is one of ours."""
    if named.kind == "swin":
        found = swin_sizes(named)
        for letter, sizes in swin.VARIANTS.items():
            if all(found[n] == size for n, size in sizes.items()):
                return f"a 'Swin-{letter}' with window {found['window']}"
        shown = ", ".join(f"{n} {v}" for n, v in found.items())
        return f"a Swin of {shown}, which is none of our variants"
    found = vit_sizes(named)
    for name, sizes in vit.VARIANTS.items():
        same = {"swiglu": False, **sizes}
        if all(found.get(n) == same[n] for n in ("width", "depth", "mlp_dim")):
            return f"a '{name}/{found.get('patch')}'"
    shown = ", ".join(f"{n} {v}" for n, v in found.items() if n != "swiglu")
    return f"a ViT of {shown}, which is none of our variants"


def parameters(
    named: Named, model: Any, path: Any, skip: Sequence[str], param_dtype: Any
) -> dict[str, Any]:
    """The model's parameters, read one array after the other.

    Raises:
      CheckpointError: If names and shapes are not exactly the model's, but for what
        `skip` names.
    """
    expected, skip = _expected(model), tuple(skip)
    entries = [
        e
        for e in named.entries
        if not any(skipped(n, skip) for n in (e.source, *e.names))
    ]
    absent = {n for n in expected if skipped(n, skip)}
    pools = isinstance(model, ViT) and model.readout != "cls"
    if pools and model.norm == "after" and _token_norm(named):
        # It was trained on tokens: after pooling the norm has no weights (MAE, VPT).
        entries = [e for e in entries if not e.names[0].startswith(FINAL_NORM)]
        absent |= {n for n in expected if n.startswith(FINAL_NORM)}
    _check(entries, expected, absent, named, model, path, skip)
    flat: dict[str, Any] = {}
    for entry in entries:
        arrays = entry.make(entry.lazy.load())
        for name, array in zip(entry.names, arrays, strict=True):
            if name == POSITIONS and array.shape[1] == expected[name][1] - 1:
                # The class token has no position: the same as a row of zeros.
                array = np.pad(array, ((0, 0), (1, 0), (0, 0)))
            if name.endswith(_BIAS_TABLE):
                array = _centre(array, expected[name][0])
            flat[name] = jnp.asarray(array.reshape(expected[name]), param_dtype)
    if missing := sorted(set(expected) - set(flat)):
        first = jax.jit(lambda: {n: _init(model)[n] for n in missing})()
        flat |= {n: x.astype(param_dtype) for n, x in first.items()}
    return unflatten(flat)


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
    problems += [
        f"{found[n][1]} has shape {found[n][0]}, expected {expected[n]}"
        for n in sorted(set(found) & set(expected))
        if not _fits(n, found[n][0], expected[n])
    ]
    everything = [*expected, *named.unknown, *named.left_out]
    everything += [n for e in named.entries for n in (e.source, *e.names)]
    for part in skip:
        if not any(skipped(n, (part,)) for n in everything):
            problems.append(f"skip names {part!r}, which is neither in file nor model")
    if problems:
        more = len(problems) - _SHOWN
        raise CheckpointError(
            f"{path} does not fit {model.variant!r}: {'; '.join(problems[:_SHOWN])}"
            f"{f'; and {more} more' if more > 0 else ''}. Parts that may be missing or"
            " unused are named in skip=."
        )


def _fits(name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    if name == POSITIONS:
        no_class_row = (1, expected[1] - 1, expected[2])
        return got in (expected, no_class_row)
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

    A picture smaller than the file's window has one smaller window; patches at the same
    distance keep their bias.
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


def _grid(shape: tuple[int, ...], class_token: bool, path: Any) -> int:
    """Patches per side; a table without a row for the class token counts too."""
    for with_row in (class_token, False):
        try:
            return grid_side(shape, with_row)
        except ValueError:
            continue
    raise CheckpointError(
        f"{path}: the position table has shape {shape} and the file has"
        f" {'a' if class_token else 'no'} class token (cls); expected [1, n * n, d]"
        f"{' or [1, 1 + n * n, d]' if class_token else ''}."
    )
