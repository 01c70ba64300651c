# SPDX-License-Identifier: Apache-2.0
"""Published backbones: what a file's name tells about how to use its weights.

The weights themselves do not say how pictures are normalised or which tokens are read.
`known_backbone` finds the row of `BACKBONES` that a path belongs to; files that are not
in the table need these said by the caller. `docs/backbones.md` prints the table.
"""

import re
from typing import Any, NamedTuple


class Backbone(NamedTuple):
    """A family of published files."""

    name: str
    variants: str  # for people; the weights themselves are checked
    pattern: str  # regular expression, searched in the lower-case path
    source: str
    licence: str
    normalisation: str  # see `data.augment.NORMALISATIONS`
    readout: str = "cls"
    norm: str = "before"
    resize: str = "corner_aligned"
    md5: str = ""  # beginning, where it is known

    def row(self) -> str:
        """The row of the table in `docs/backbones.md`."""
        read = self.readout + (", norm after" if self.norm == "after" else "")
        cells = (self.name, self.variants, self.source, self.licence)
        cells += (self.normalisation, read, self.resize, self.md5)
        return f"| {' | '.join(cells)} |"

    def card(self) -> dict[str, Any]:
        """The fields that loading and the data pipeline use."""
        row = self._asdict()
        return {n: row[n] for n in ("name", "licence", "normalisation", *_SETTINGS)}


_SETTINGS = ("readout", "norm", "resize")
_GOOGLE = "gs://vit_models"
_MEAN = "mean_with_prompts"

BACKBONES = (
    Backbone(
        "ViT, ImageNet-21k (AugReg)",
        "Ti/16 S/16 S/32 B/8 B/16 B/32 L/16",
        r"(^|/)(ti|s|b|l)_(8|16|32)-i(1|21)k-[^/]*\.npz$"
        r"|vit_[a-z]+_patch\d+_\d+\.augreg",
        f"{_GOOGLE}/augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0.npz"
        " or hf://timm/vit_base_patch16_224.augreg_in21k/model.safetensors",
        "Apache-2.0",
        "half",
    ),
    Backbone(
        "ViT, ImageNet-21k (original; the papers' ViT-B/16)",
        "B/8 B/16 B/32 L/16 L/32 H/14",
        r"(^|/)(imagenet21k_)?vit-[blh]_\d+(-\d+)?\.npz$"
        r"|google/vit-|vit_[a-z]+_patch\d+_\d+\.orig_in21k",
        f"{_GOOGLE}/imagenet21k/ViT-B_16.npz"
        " or hf://google/vit-base-patch16-224-in21k/model.safetensors",
        "Apache-2.0",
        "half",
        md5="d9715d (ViT-B_16.npz)",
    ),
    Backbone(
        "DeiT, ImageNet-1k",
        "Ti/16 S/16 B/16 (not distilled)",
        r"deit[-_](tiny|small|base)[-_]patch16",
        "hf://timm/deit_small_patch16_224.fb_in1k/model.safetensors",
        "Apache-2.0",
        "imagenet",
    ),
    Backbone(
        "MAE, ImageNet-1k",
        "B/16 L/16 H/14",
        r"mae_pretrain_vit_|vit_[a-z]+_patch\d+_\d+\.mae|facebook/vit-mae",
        "mae_pretrain_vit_base.pth or hf://timm/vit_base_patch16_224.mae/model.safetensors",
        "CC BY-NC 4.0",
        "imagenet",
        readout=_MEAN,
        norm="after",
        md5="8cad7c (mae_pretrain_vit_base.pth)",
    ),
    Backbone(
        "MoCo v3, ImageNet-1k",
        "S/16 B/16",
        r"(^|/|mocov3_)(linear-)?vit-[sb]-\d+ep\.pth(\.tar)?$",
        "linear-vit-b-300ep.pth.tar",
        "CC BY-NC 4.0",
        "imagenet",
        md5="8f39ce (linear-vit-b-300ep.pth.tar)",
    ),
    Backbone(
        "DINOv2 with registers, LVD-142M",
        "S/14 B/14 L/14 g/14",
        r"dinov2_vit[sblg]14_reg4|_patch14_reg4_dinov2|dinov2-with-registers-",
        "dinov2_vits14_reg4_pretrain.pth, hf://facebook/dinov2-with-registers-small or"
        " hf://timm/vit_small_patch14_reg4_dinov2.lvd142m/model.safetensors",
        "Apache-2.0",
        "imagenet",
        resize="bicubic_antialias",
    ),
    Backbone(
        "DINOv2, LVD-142M",
        "S/14 B/14 L/14 g/14",
        r"dinov2_vit[sblg]14_pretrain|_patch14_dinov2|facebook/dinov2-(small|base|large)"
        r"|facebook/dinov2-giant",
        "dinov2_vits14_pretrain.pth, hf://facebook/dinov2-small/model.safetensors or"
        " hf://timm/vit_small_patch14_dinov2.lvd142m/model.safetensors",
        "Apache-2.0",
        "imagenet",
        resize="bicubic_offset",
    ),
    Backbone(
        "DINO, ImageNet-1k",
        "S/8 S/16 B/8 B/16",
        r"dino_(vit|deit)[a-z]+\d+_pretrain|vit_[a-z]+_patch\d+_\d+\.dino|facebook/dino-vit",
        "dino_vitbase16_pretrain.pth or"
        " hf://timm/vit_base_patch16_224.dino/model.safetensors",
        "Apache-2.0",
        "imagenet",
    ),
    Backbone(
        "Swin, ImageNet-21k or -1k (Swin-B in the papers)",
        "Swin-T Swin-S Swin-B Swin-L",
        r"swin_(tiny|small|base|large)_patch4_window\d+_\d+",
        "swin_base_patch4_window7_224_22k.pth or"
        " hf://timm/swin_base_patch4_window7_224.ms_in22k/model.safetensors",
        "MIT",
        "imagenet",
        readout=_MEAN,
        md5="bf9cc1 (swin_base_patch4_window7_224_22k.pth)",
    ),
)


def known_backbone(path: Any) -> Backbone | None:
    """The row that a path belongs to, by the names of the file and its folder.

    Example:
      >>> known_backbone("weights/mae_pretrain_vit_base.pth").name
      'MAE, ImageNet-1k'
    """
    parts = str(path).lower().split("/")
    # hf://org/name[@revision]/file needs all; elsewhere the file and its folder tell.
    end = "/".join(parts if parts[0] == "hf:" else parts[-2:])
    for row in BACKBONES:
        if re.search(row.pattern, end):
            return row
    return None
