# SPDX-License-Identifier: Apache-2.0
"""Published files by name: which variant each is, how large, and where it lies.

What a family has in common (licence, normalisation, read-out) stands in `backbones`
alone and is found by the file's address. Names are those of the projects themselves:
timm's, the hub's `ORG/NAME`, PyTorch hub's entries, or the file's own without its end.
"""

import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from vpt_jax.models.variants import canonical
from vpt_jax.weights.backbones import Backbone, known_backbone

_ENDS = (".npz", ".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt", ".json")
_META = "https://dl.fbaipublicfiles.com"
_SIZES = {"tiny": "Ti", "small": "S", "base": "B", "large": "L"}
_SIZES |= {"huge": "H", "giant": "g", "so400m": "So400m"}
_NAME = re.compile(r"(?P<org>[\w-][\w.-]*)/(?P<name>[\w-][\w.-]*)")
_TIMM = re.compile(r"\w+_patch\w+\.\w+")  # an architecture and its tag
# MB of the networks in float32; a file may hold a head besides.
MEGABYTES = {"Ti/16": 22, "S/8": 87, "S/14": 88, "S/16": 87, "S/32": 90}
MEGABYTES |= {"B/8": 343, "B/14": 346, "B/16": 343, "B/32": 350, "L/14": 1217}
MEGABYTES |= {"L/16": 1213, "L/32": 1222, "H/14": 2523, "g/14": 4546}
MEGABYTES |= {"Swin-T": 110, "Swin-S": 195, "Swin-B": 347, "Swin-L": 780}
MEGABYTES |= {"S+/16": 115, "H+/16": 3363, "7B/16": 26866, "So400m/14": 1654}
# With SigLIP's pooling.
MEGABYTES |= {"B/16 map": 372, "B/32 map": 378, "L/16 map": 1264}
MEGABYTES |= {"So400m/14 map": 1711, "So400m/16 map": 1712}


class Published(NamedTuple):
    """A file that can be asked for by its name."""

    name: str
    variant: str  # empty: the file says it
    address: str

    @property
    def family(self) -> Backbone:
        """What is known of its family."""
        row = known_backbone(self.address)
        assert row is not None
        return row

    @property
    def megabytes(self) -> int:
        """Of the network in float32."""
        pooled = f"{self.variant} map"
        return MEGABYTES[pooled if self.family.readout == "map" else self.variant]


def _rows() -> Iterator[tuple[str, str, str]]:
    """Name, variant and address of each; no address: `model.safetensors` on the hub."""
    timm = [("tiny", 16), ("small", 16), ("small", 32), ("base", 8), ("base", 16)]
    for size, patch in [*timm, ("base", 32), ("large", 16)]:
        name = f"vit_{size}_patch{patch}_224.augreg_in21k"
        yield name, f"{_SIZES[size]}/{patch}", ""
    for variant in ("B/16", "B/32", "L/16", "L/32", "H/14"):
        name = f"ViT-{variant.replace('/', '_')}"
        yield name, variant, f"gs://vit_models/imagenet21k/{name}.npz"
    for size, patch in (("base", 16), ("base", 32), ("large", 32), ("huge", 14)):
        variant = f"{_SIZES[size]}/{patch}"
        yield f"vit_{size}_patch{patch}_224.orig_in21k", variant, ""
    for size, patch in (("base", 16), ("base", 32), ("large", 16), ("large", 32)):
        variant = f"{_SIZES[size]}/{patch}"
        yield f"google/vit-{size}-patch{patch}-224-in21k", variant, ""
    for distilled in ("", "_distilled"):
        for size in ("tiny", "small", "base"):
            name = f"deit_{size}{distilled}_patch16_224.fb_in1k"
            yield name, f"{_SIZES[size]}/16", ""
    for size, patch in (("base", 16), ("large", 16), ("huge", 14)):
        variant = f"{_SIZES[size]}/{patch}"
        file = f"mae_pretrain_vit_{size}"
        yield f"vit_{size}_patch{patch}_224.mae", variant, ""
        yield file, variant, f"{_META}/mae/pretrain/{file}.pth"
    for size in "sb":
        folder = f"vit-{size}-300ep"
        address = f"{_META}/moco-v3/{folder}/linear-{folder}.pth.tar"
        yield f"linear-{folder}", f"{size.upper()}/16", address
    for reg, tag, entry in (("", "", ""), ("reg4_", "-with-registers", "_reg")):
        for size in ("small", "base", "large", "giant"):
            letter = size[0]
            variant, code = f"{_SIZES[size]}/14", f"dinov2_vit{letter}14"
            file = f"{code}{'_reg4' if entry else ''}_pretrain.pth"
            yield f"vit_{size}_patch14_{reg}dinov2.lvd142m", variant, ""
            yield f"facebook/dinov2{tag}-{size}", variant, ""
            yield f"{code}{entry}", variant, f"{_META}/dinov2/{code}/{file}"
    for size, code in (("small", "deitsmall"), ("base", "vitbase")):
        for patch in (8, 16):
            variant, file = f"{_SIZES[size]}/{patch}", f"dino_{code}{patch}_pretrain"
            yield f"vit_{size}_patch{patch}_224.dino", variant, ""
            address = f"{_META}/dino/{file}/{file}.pth"
            yield f"dino_vit{size[0]}{patch}", variant, address
    yield from _of_2026()
    for size in ("tiny", "small", "base", "large"):
        name = f"swin_{size}_patch4_window7_224.ms_in22k"
        yield name, f"Swin-{_SIZES[size][0]}", ""
    yield "microsoft/swin-tiny-patch4-window7-224", "Swin-T", ""
    yield "microsoft/swin-base-patch4-window7-224-in22k", "Swin-B", ""


def _of_2026() -> Iterator[tuple[str, str, str]]:
    """SigLIP, DINOv3, CLIP, TIPSv2, as `_rows`."""
    sides = ("base", 16, 224), ("base", 32, 256), ("large", 16, 256)
    for size, patch, side in (*sides, ("so400m", 14, 224), ("so400m", 16, 256)):
        variant = f"{_SIZES[size]}/{patch}"
        yield f"vit_{size}_patch{patch}_siglip_{side}.v2_webli", variant, ""
        yield f"google/siglip2-{size}-patch{patch}-{side}", variant, ""
    yield "vit_base_patch16_siglip_224.webli", "B/16", ""
    yield "google/siglip-base-patch16-224", "B/16", ""
    file = "siglip2_b16_224"
    yield file, "B/16", f"gs://big_vision/siglip2/{file}.npz"
    for size in ("small", "small_plus", "base", "large", "huge_plus"):
        letter, plus = size[0], "plus" * ("_" in size)
        variant = f"{letter.upper()}{'+' * bool(plus)}/16"
        yield f"vit_{size}_patch16_dinov3.lvd1689m", variant, ""
        yield f"facebook/dinov3-vit{letter}16{plus}-pretrain-lvd1689m", variant, ""
    yield "vit_7b_patch16_dinov3.lvd1689m", "7B/16", ""
    for size, patch in (("base", 16), ("base", 32), ("large", 14)):
        variant = f"{_SIZES[size]}/{patch}"
        yield f"vit_{size}_patch{patch}_clip_224.openai", variant, ""
        yield f"openai/clip-vit-{size}-patch{patch}", variant, ""
    for size, patch in (("base", 16), ("base", 32), ("huge", 14)):
        variant = f"{_SIZES[size]}/{patch}"
        yield f"vit_{size}_patch{patch}_clip_224.laion2b", variant, ""
    for size, code in (("base", "b"), ("large", "l"), ("so400m", "so"), ("giant", "g")):
        variant, file = f"{_SIZES[size]}/14", f"tips_v2_{code}14_vision"
        hub = "so400m" if code == "so" else code
        yield f"vit_{size}_patch14_reg1_tipsv2.webli", variant, ""
        yield f"google/tipsv2-{hub}14", variant, ""
        yield file, variant, f"gs://tips_data/v2_0/checkpoints/scenic/{file}.npz"


def _hub(name: str) -> str:
    """The address of a repository's file; without a slash the name is timm's."""
    whole, file = name if "/" in name else f"timm/{name}", "model.safetensors"
    if re.search(r"_clip_\d+\.openai$", whole):
        file = "open_clip_model.safetensors"
    if whole.startswith("openai/"):
        file = "pytorch_model.bin"
    return f"hf://{whole}/{file}"


PUBLISHED = {
    name: Published(name, variant, address or _hub(name))
    for name, variant, address in _rows()
}


def published(name: str | os.PathLike) -> Published | None:
    """The published file of a name; None for what is a path, a variant or unknown.

    Of a name that `PUBLISHED` does not list, the hub's `ORG/NAME` or timm's with its
    tag, the family must be known: then the file is `model.safetensors` there, and says
    which variant it is. A file or folder of that name here comes first.

    Example:
      >>> published("timm/vit_small_patch16_224.augreg_in21k").variant
      'S/16'
      >>> published("timm/vit_base_patch16_384.augreg_in21k_ft_in1k").address
      'hf://timm/vit_base_patch16_384.augreg_in21k_ft_in1k/model.safetensors'
      >>> published("B/16") is published("vit_base_patch16_224") is None
      True
    """
    text = os.fspath(name)
    if not isinstance(text, str) or "://" in text or os.path.exists(text):
        return None
    if row := PUBLISHED.get(text.removeprefix("timm/")):
        return row
    whole = text if "/" in text else f"timm/{text}" if _TIMM.fullmatch(text) else ""
    address = _hub(whole)
    a_file = text.lower().endswith(_ENDS)  # that is not there
    if a_file or not _NAME.fullmatch(whole) or known_backbone(address) is None:
        return None
    return Published(text, "", address)


def told_apart(variant: str | os.PathLike, path: Any) -> tuple[str, Any]:
    """Our name of the variant, and the path; the path alone may stand first.

    The name of a published file, in either place, becomes its address.
    """
    first = os.fspath(variant)
    if named := published(path or first):
        return (canonical(first) if path else named.variant), named.address
    alone = first.lower().endswith(_ENDS) or "://" in first or os.path.isfile(first)
    return ("", first) if alone and not path else (canonical(first), path)


def names_of(variant: str) -> str:
    """Names of published files of a variant, as a sentence's end; empty if none."""
    names = [row.name for row in PUBLISHED.values() if row.variant == variant]
    return f", or a name: {', '.join(names[:4])}" if names else ""
