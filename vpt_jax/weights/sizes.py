# SPDX-License-Identifier: Apache-2.0
"""Sizes of the network in a file, read from names and shapes alone."""

import re
from typing import Any

from vpt_jax.models import swin, vit
from vpt_jax.weights.naming import POSITIONS, Named


def is_rotary(named: Named) -> bool:
    """Whether a ViT is a DINOv3: class token, registers, LayerScale and no table."""
    shapes = named.shapes
    scaled = any("/LayerScale_0/" in name for name in shapes)
    return {"cls", "registers"} <= {*shapes} and POSITIONS not in shapes and scaled


def sizes_of(named: Named) -> dict[str, Any]:
    """`vit_sizes` or `swin_sizes`."""
    return swin_sizes(named) if named.kind == "swin" else vit_sizes(named)


def variant_of(named: Named) -> str:
    """Our name of the network's sizes, of a ViT without the patch; empty for none."""
    found = {"swiglu": False, **sizes_of(named)}
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
    found, variant = sizes_of(named), variant_of(named)
    if variant and named.kind == "swin":
        return f"a {variant!r} with window {max(found['windows'])}"
    if variant:
        return f"a '{variant}/{found.get('patch')}'"
    sizes = ", ".join(f"{n} {v}" for n, v in found.items() if n != "swiglu")
    kind = "Swin" if named.kind == "swin" else "ViT"
    return f"a {kind} of {sizes}, which is none of our variants"


def differing(named: Named, told: dict[str, Any]) -> list[str]:
    """Sizes of a `config.json` that are not the file's, as a message shows them."""
    found = sizes_of(named)
    if named.kind == "swin":
        found = {"width": found["embed_dim"], "depth": found["depths"]}
    return [
        f"{n} {told[n]} (the file has {found.get(n)})"
        for n in ("width", "depth")
        if n in told and told[n] != found.get(n)
    ]
