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

from vpt_jax.models import swin, vit
from vpt_jax.models.posemb import grid_side
from vpt_jax.models.swin import Swin
from vpt_jax.models.vit import ViT
from vpt_jax.weights.backbones import HEADS
from vpt_jax.weights.families import refuse_structures
from vpt_jax.weights.naming import (
    FINAL_NORM,
    POSITIONS,
    Entry,
    Named,
    named_leaves,
    needed,
    skipped,
    unflatten,
)
from vpt_jax.weights.readers import CheckpointError

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
    if found:
        refuse_structures(shapes, path, pooled=norm == "after" and readout != "cls")
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


def infer(named: Named, path: Any, num_heads: int) -> ViT | Swin:
    """The model of the file's sizes, where the caller names no variant.

    Raises CheckpointError if sizes are absent, or are no variant's and the heads
    unknown.
    """
    swins, variant = named.kind == "swin", _variant(named)
    if not swins:
        refuse_structures(named.shapes, path, pooled=True)
    found = _sizes(named)
    if variant:
        return Swin(variant) if swins else ViT(f"{variant}/{found['patch']}")
    if swins:
        found["window"] = max(found.pop("windows"), default=0)
    else:
        usual = HEADS.get(found.get("width", 0), (0,))[0]
        found |= {"num_heads": num_heads or usual, "image_size": found.get("patch", 0)}
        if not all(found.get(n) for n in ("num_heads", "patch", "depth", "mlp_dim")):
            raise CheckpointError(
                f"{path} holds {describe(named)}, and how many heads it has is not"
                " known; pass num_heads=."
            )
    try:
        return Swin(**found) if swins else ViT(**found)
    except ValueError as error:
        raise CheckpointError(f"{path} holds {describe(named)}: {error}") from error


def _sizes(named: Named) -> dict[str, Any]:
    return swin_sizes(named) if named.kind == "swin" else vit_sizes(named)


def _variant(named: Named) -> str:
    """Our name of the network's sizes, of a ViT without the patch; empty for none."""
    found = {"swiglu": False, **_sizes(named)}
    if named.kind == "swin":
        known = {f"Swin-{letter}": sizes for letter, sizes in swin.VARIANTS.items()}
    else:
        names = ("width", "depth", "mlp_dim", "swiglu")
        known = {
            variant: {n: sizes.get(n, False) for n in names}
            for variant, sizes in vit.VARIANTS.items()
        }
    fitting = [name for name, sizes in known.items() if sizes.items() <= found.items()]
    return fitting[0] if fitting else ""


def vit_sizes(named: Named) -> dict[str, int]:
    """The sizes of the file's ViT; those whose arrays are absent are left out."""
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
    """`embed_dim`, `depths`, `num_heads`, `windows` (of every stage) of a Swin."""
    shapes = named.shapes
    depths: dict[int, set[str]] = {}
    heads: dict[int, int] = {}
    sides: dict[int, int] = {}
    for name, shape in shapes.items():
        if not (m := re.match(r"blocks_(\d+)_(\d+)/", name)):
            continue
        depths.setdefault(int(m[1]), set()).add(m[2])
        if name.endswith("bias_table") and len(shape) == 2:
            heads[int(m[1])] = shape[1]
            sides[int(m[1])] = (round(shape[0] ** 0.5) + 1) // 2
    kernel = shapes.get("patch_embed/kernel", ())
    return {
        "embed_dim": kernel[3] if len(kernel) == 4 else 0,
        "depths": tuple(len(depths[i]) for i in sorted(depths)),
        "num_heads": tuple(heads[i] for i in sorted(heads)),
        "windows": tuple(sides[i] for i in sorted(sides)),
    }


def describe(named: Named) -> str:
    """Which network a file holds, in words; its variant if it is one of ours."""
    found, variant = _sizes(named), _variant(named)
    if variant and named.kind == "swin":
        return f"a {variant!r} with window {max(found['windows'])}"
    if variant:
        return f"a '{variant}/{found.get('patch')}'"
    sizes = ", ".join(f"{n} {v}" for n, v in found.items() if n != "swiglu")
    kind = "Swin" if named.kind == "swin" else "ViT"
    return f"a {kind} of {sizes}, which is none of our variants"


def differing(named: Named, told: dict[str, Any]) -> list[str]:
    """Sizes of a `config.json` that are not the file's, as a message shows them."""
    found = _sizes(named)
    if named.kind == "swin":
        found = {"width": found["embed_dim"], "depth": found["depths"]}
    return [
        f"{n} {told[n]} (the file has {found.get(n)})"
        for n in ("width", "depth")
        if n in told and told[n] != found.get(n)
    ]


def parameters(
    named: Named, model: Any, path: Any, skip: Sequence[str], param_dtype: Any
) -> dict[str, Any]:
    """The model's parameters, read one array after the other.

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
            flat[name] = jnp.asarray(
                finite(array.reshape(expected[name]), entry.source, path, param_dtype),
                param_dtype,
            )
    if missing := sorted(set(expected) - set(flat)):
        first = jax.jit(lambda: {n: _init(model)[n] for n in missing})()
        flat |= {n: x.astype(param_dtype) for n, x in first.items()}
    return unflatten(flat)


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
        if not _fits(n, found[n][0], expected[n])
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
    """Patches per side; a table without a row for the class token counts too."""
    shape, registers = shapes[POSITIONS], shapes.get("registers", ())
    for with_row in (class_token, False):
        with contextlib.suppress(ValueError):
            return grid_side(shape, with_row)
    extra = registers[1] if len(registers) == 3 else 0
    first = int(class_token) + extra
    patches = shape[1] - first if len(shape) == 3 else -1
    if extra and patches > 0 and math.isqrt(patches) ** 2 == patches:
        raise CheckpointError(
            f"{path} holds a ViT whose registers have positions, which is not"
            f" supported: its table has {first} rows more than patches. Take one whose"
            " registers have none, such as"
            " hf://timm/vit_small_patch14_reg4_dinov2.lvd142m/model.safetensors."
        )
    raise CheckpointError(
        f"{path}: the position table has shape {shape} and the file has"
        f" {'a' if class_token else 'no'} class token (cls); expected [1, n * n, d]"
        f"{' or [1, 1 + n * n, d]' if class_token else ''}."
    )
