# SPDX-License-Identifier: Apache-2.0
"""Published backbones: what a file's name tells about how to use its weights.

The weights themselves do not say how pictures are normalised, which tokens are read,
how many heads attend, or which activation stands in the MLP. `known_backbone` finds the
row of `BACKBONES` that a path belongs to; `AMBIGUOUS` are the facts in which published
files of the same names and sizes differ, so that they must be asked for.
`docs/backbones.md` prints the table.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Backbone(NamedTuple):
    """A family of published files."""

    name: str
    variants: str  # for people; the weights themselves are checked
    pattern: str  # regular expression, searched in the lower-case path
    source: str
    licence: str
    normalisation: str  # see `models.inputs.NORMALISATIONS`
    readout: str = "cls"
    norm: str = "before"
    resize: str = "corner_aligned"  # empty: there is no table
    md5: str = ""  # beginning, where it is known
    num_heads: int = 0  # where they are not the variant's
    activation: str = ""
    epsilon: float = 0.0

    def row(self) -> str:
        """The row of the table in `docs/backbones.md`."""
        read = self.readout + (", norm after" if self.norm == "after" else "")
        read += f", {self.num_heads} heads" if self.num_heads else ""
        read += f", {self.activation}" if self.activation else ""
        cells = (self.name, self.variants, self.source, self.licence)
        cells += (self.normalisation, read, self.resize or "none: rotary", self.md5)
        return f"| {' | '.join(cells)} |"

    def card(self) -> dict[str, Any]:
        """The fields that loading and the data pipeline use, as far as known."""
        row = self._asdict()
        names = ("name", "licence", "normalisation", *_SETTINGS)
        return {name: row[name] for name in names if row[name]}


_SETTINGS = ("readout", "norm", "resize", "num_heads", "activation", "epsilon")
_META = "https://dl.fbaipublicfiles.com"
_GOOGLE = "gs://vit_models"
_TIPS = "gs://tips_data/v2_0/checkpoints"
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
        r"|(^|/|--)vit-(base|large|huge)-patch\d+-\d+(-in21k)?(@[^/]*)?/"
        r"|vit_[a-z]+_patch\d+_\d+\.orig_in21k",
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
        "DeiT, ImageNet-1k, distilled",
        "Ti/16 S/16 B/16",
        r"deit[-_](tiny|small|base)[-_]distilled[-_]patch16",
        "hf://timm/deit_small_distilled_patch16_224.fb_in1k/model.safetensors",
        "Apache-2.0",
        "imagenet",
    ),
    Backbone(
        "MAE, ImageNet-1k",
        "B/16 L/16 H/14",
        r"mae_pretrain_vit_|vit_[a-z]+_patch\d+_\d+\.mae|vit-mae-(base|large|huge)",
        f"{_META}/mae/pretrain/mae_pretrain_vit_base.pth"
        " or hf://timm/vit_base_patch16_224.mae/model.safetensors",
        "CC BY-NC 4.0",
        "imagenet",
        readout=_MEAN,
        norm="after",
        md5="8cad7c (mae_pretrain_vit_base.pth)",
    ),
    Backbone(
        "MoCo v3, ImageNet-1k",
        "S/16 B/16",
        r"(^|[/_-])(linear-)?vit-[sb]-\d+ep\.pth(\.tar)?$|(^|[/_.-])moco",
        f"{_META}/moco-v3/vit-b-300ep/linear-vit-b-300ep.pth.tar",
        "CC BY-NC 4.0",
        "imagenet",
        md5="8f39ce (linear-vit-b-300ep.pth.tar)",
        num_heads=12,  # also of S/16: its vits.py
    ),
    # How each project's own code resizes the table: Meta's hubconf.py, transformers'
    # interpolate_pos_encoding, timm's resample_abs_pos_embed.
    Backbone(
        "DINOv2 with registers, LVD-142M",
        "S/14 B/14 L/14 g/14",
        r"dinov2_vit[sblg]14_reg4|_patch14_reg4_dinov2|dinov2-with-registers-",
        f"{_META}/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth,"
        " hf://facebook/dinov2-with-registers-small/model.safetensors or"
        " hf://timm/vit_small_patch14_reg4_dinov2.lvd142m/model.safetensors",
        "Apache-2.0",
        "imagenet",
        resize="bicubic_antialias",
    ),
    Backbone(
        "DINOv2, LVD-142M (Meta's file)",
        "S/14 B/14 L/14 g/14",
        r"dinov2_vit[sblg]14(_pretrain|/|\.)",
        f"{_META}/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
        "Apache-2.0",
        "imagenet",
        resize="bicubic_offset",
    ),
    Backbone(
        "DINOv2, LVD-142M (transformers' file)",
        "S/14 B/14 L/14 g/14",
        r"dinov2-(small|base|large|giant)",
        "hf://facebook/dinov2-small/model.safetensors",
        "Apache-2.0",
        "imagenet",
        resize="bicubic",
    ),
    Backbone(
        "DINOv2, LVD-142M (timm's file)",
        "S/14 B/14 L/14 g/14",
        r"_patch14_dinov2",
        "hf://timm/vit_small_patch14_dinov2.lvd142m/model.safetensors",
        "Apache-2.0",
        "imagenet",
        resize="bicubic_antialias",
    ),
    Backbone(
        "DINOv3, LVD-1689M",
        "S/16 S+/16 B/16 L/16 H+/16 7B/16",
        r"_patch16_dinov3(_qkvb)?\.lvd|dinov3-vit\w+-pretrain-lvd"
        r"|dinov3_vit\w+_pretrain_lvd",
        "hf://facebook/dinov3-vits16-pretrain-lvd1689m/model.safetensors or"
        " hf://timm/vit_small_patch16_dinov3.lvd1689m/model.safetensors",
        "DINOv3 License (Meta's is gated: its terms are accepted on its page)",
        "imagenet",
        resize="",
        epsilon=1e-5,
    ),
    Backbone(
        "SigLIP and SigLIP 2 (big_vision's file)",
        "B/16 B/32 L/16 So400m/14 So400m/16",
        r"(^|/)(siglip2?|webli_(en|i18n))_[^/]*\.npz$",
        "gs://big_vision/siglip2/siglip2_b16_224.npz",
        "Apache-2.0",
        "half",
        readout="map",
        activation="gelu_tanh",
    ),
    Backbone(
        "SigLIP and SigLIP 2 (transformers' file)",
        "B/16 B/32 L/16 So400m/14 So400m/16",
        r"siglip2?-(base|large|so400m|giant-opt)-patch\d+-\d",
        "hf://google/siglip2-base-patch16-224/model.safetensors",
        "Apache-2.0",
        "half",
        readout="map",
        resize="bicubic",
        activation="gelu_tanh",
    ),
    Backbone(
        "SigLIP and SigLIP 2 (timm's file)",
        "B/16 B/32 L/16 So400m/14 So400m/16",
        r"_siglip_\d+\.(v2_)?webli(_i18n)?(?!\w)",
        "hf://timm/vit_base_patch16_siglip_224.v2_webli/model.safetensors",
        "Apache-2.0",
        "half",
        readout="map",
        resize="bicubic_antialias",
    ),
    Backbone(
        "CLIP of OpenAI (transformers' file)",
        "B/16 B/32 L/14",
        r"clip-vit-(base|large)-patch\d+",
        "hf://openai/clip-vit-base-patch16/pytorch_model.bin",
        "none is stated",
        "clip",
        resize="bicubic",
        activation="quick_gelu",
        epsilon=1e-5,
    ),
    Backbone(
        "CLIP of OpenAI (timm's file)",
        "B/16 B/32 L/14",
        r"_clip_(quickgelu_)?\d+\.openai(?!\w)",
        "hf://timm/vit_base_patch16_clip_224.openai/open_clip_model.safetensors",
        "Apache-2.0",
        "clip",
        resize="bicubic_antialias",
        activation="quick_gelu",
        epsilon=1e-5,
    ),
    Backbone(
        "OpenCLIP, LAION-2B and DataComp (timm's file)",
        "B/16 B/32 H/14",
        r"_(base|huge|giant|gigantic)_patch\d+_clip_\d+\.(laion2b|datacompxl)(?!\w)",
        "hf://timm/vit_base_patch16_clip_224.laion2b/model.safetensors",
        "MIT",
        "clip",
        resize="bicubic_antialias",
        activation="gelu",
        epsilon=1e-5,
    ),
    Backbone(
        "OpenCLIP, LAION-2B and DataComp (transformers' file)",
        "B/32 H/14",
        r"clip-vit-(b-32|h-14)-(laion2b|datacomp)",
        "hf://laion/CLIP-ViT-B-32-laion2B-s34B-b79K/model.safetensors",
        "MIT",
        "clip",
        resize="bicubic",
        activation="gelu",
        epsilon=1e-5,
    ),
    Backbone(
        "TIPSv2 (Google's Linen file)",
        "B/14 L/14 So400m/14 g/14",
        r"(^|/)tips_v2_(b|l|so|g)14_vision\.npz$",
        f"{_TIPS}/scenic/tips_v2_b14_vision.npz",
        "CC BY 4.0",
        "none",
        resize="half_pixel_antialias",
        activation="gelu_tanh",
    ),
    Backbone(
        "TIPSv2 (Google's PyTorch file, transformers' file)",
        "B/14 L/14 So400m/14 g/14",
        r"(^|/)tipsv2-\w+(@[^/]*)?/|tips_v2_oss_\w+_vision",
        f"{_TIPS}/pytorch/tips_v2_oss_b14_vision.npz or"
        " hf://google/tipsv2-b14/model.safetensors",
        "Apache-2.0",
        "none",
        resize="half_pixel_antialias",
    ),
    Backbone(
        "TIPSv2 (timm's file)",
        "B/14 L/14 So400m/14 g/14",
        r"_patch14_reg1_tipsv2",
        "hf://timm/vit_base_patch14_reg1_tipsv2.webli/model.safetensors",
        "Apache-2.0",
        "none",
        resize="bicubic_antialias",
    ),
    Backbone(
        "DINO, ImageNet-1k",
        "S/8 S/16 B/8 B/16",
        r"dino_(vit|deit)[a-z]+\d+_pretrain|vit_[a-z]+_patch\d+_\d+\.dino(/|\.|$)"
        r"|dino-vit[sb]\d+",
        f"{_META}/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth or"
        " hf://timm/vit_base_patch16_224.dino/model.safetensors",
        "Apache-2.0",
        "imagenet",
    ),
    Backbone(
        "Swin, ImageNet-21k or -1k (transformers' file)",
        "Swin-T Swin-S Swin-B Swin-L",
        r"swin-(tiny|small|base|large)-patch4-window\d+-\d+",
        "hf://microsoft/swin-base-patch4-window7-224-in22k/model.safetensors",
        "Apache-2.0",
        "imagenet",
        readout=_MEAN,
    ),
    Backbone(
        "Swin, ImageNet-21k or -1k (Swin-B in the papers)",
        "Swin-T Swin-S Swin-B Swin-L",
        r"swin_(tiny|small|base|large)_patch4_window\d+_\d+",
        "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
        "swin_base_patch4_window7_224_22k.pth or"
        " hf://timm/swin_base_patch4_window7_224.ms_in22k/model.safetensors",
        "MIT",
        "imagenet",
        readout=_MEAN,
        md5="bf9cc1 (swin_base_patch4_window7_224_22k.pth)",
    ),
)


# What timm's names of architectures say and the arrays do not: all that fit, in turn.
_ARCHITECTURES: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        r"(vit|deit3?|eva)_[a-z0-9]+_patch\d+|flexivit_(small|base|large)|test_vit",
        {"activation": "gelu"},
    ),
    (r"test_vit", {"num_heads": 2}),  # timm's smallest, for its tests
    (r"vit_base_patch16_gap_|vit_giantopt_patch16_siglip_", {"num_heads": 16}),
    (r"siglip2[-_]g(iant)?-opt", {"num_heads": 16}),
    (
        r"vit_(base_patch32|so400m_patch16|giantopt_patch16)_siglip_"
        r"|vit_large_patch16_siglip_(gap_)?512",
        {"activation": "gelu_tanh"},
    ),
    # timm's "natively QuickGELU", which its plain architectures do not compute.
    (
        r"_clip_quickgelu_|_clip_\d+\.(openai|metaclip\w*|dfn2b|dfn5b)(?!\w)"
        r"|_base_patch32_clip_224\.laion400m",
        {"activation": "quick_gelu"},
    ),
)
# Heads of published plain ViTs by their width, the usual number first.
HEADS = {192: (3,), 256: (4,), 320: (5,), 384: (6, 12), 512: (8,), 640: (10,)}
HEADS |= {768: (12, 16), 832: (13,), 896: (14,), 1024: (16,), 1152: (16,)}
HEADS |= {1280: (16,), 1408: (16,), 1536: (24, 16), 1664: (16,)}


class Question(NamedTuple):
    """A fact in which published files of the same names and sizes differ."""

    fact: str  # an argument of `load_backbone`
    applies: Callable[[Any], bool]  # to the ViT as it was found
    answers: str


# Asked of files with the names of timm and the original PyTorch code.
AMBIGUOUS = (
    Question(
        "num_heads",
        lambda vit: (
            (vit.width, vit.class_token, vit.layer_scale, vit.norm)
            == (384, True, False, "before")
        ),
        "6 (DeiT, DINO, timm) or 12 (MoCo v3)",
    ),
    Question(
        "num_heads",
        lambda vit: vit.width == 768 and not vit.class_token and vit.readout != "map",
        "12 (timm's siglip_gap and others) or 16 (timm's vit_base_patch16_gap_224)",
    ),
    Question(
        "num_heads",
        lambda vit: vit.width == 1536 and not vit.class_token,
        "16 (timm's giantopt siglip_gap) or 24",
    ),
    Question(
        "activation",
        lambda vit: not vit.class_token and not vit.layer_scale,
        "'gelu' or 'gelu_tanh' (some of timm's siglip)",
    ),
    Question(
        "activation",
        lambda vit: vit.pre_norm,
        "'quick_gelu' (CLIP of OpenAI, MetaCLIP, DFN) or 'gelu' (OpenCLIP)",
    ),
)


def known_backbone(path: Any) -> Backbone | None:
    """The row that a path belongs to, by the names of the file and its folder.

    Hugging Face's cache, `models--ORG--NAME/snapshots/HASH/...`, is known by the
    repository's.

    Example:
      >>> known_backbone("weights/mae_pretrain_vit_base.pth").name
      'MAE, ImageNet-1k'
    """
    end = _end(path)
    for row in BACKBONES:
        if re.search(row.pattern, end):
            return row
    return None


def architecture(path: Any) -> dict[str, Any]:
    """Facts that timm's name of an architecture in a path tells; `{}` without one.

    Example:
      >>> architecture("vit_base_patch16_gap_224/model.safetensors")
      {'activation': 'gelu', 'num_heads': 16}
    """
    facts: dict[str, Any] = {}
    for pattern, told in _ARCHITECTURES:
        if re.search(pattern, _end(path)):
            facts |= told
    return facts


def where_to_get(variant: str, path: Any = "") -> str:
    """A sentence with the addresses of published files, of a path's row or a variant.

    Example:
      >>> where_to_get("", "mae_pretrain_vit_base.pth")[:52]
      'MAE, ImageNet-1k is at https://dl.fbaipublicfiles.c'
    """
    rows = [row] if path and (row := known_backbone(path)) else []
    rows = rows or [row for row in BACKBONES if variant in row.variants.split()][:3]
    places = "; ".join(f"{row.name} is at {row.source}" for row in rows)
    return (
        f"{places}; such an address can be given as the path. docs/backbones.md lists"
        " more"
        if rows
        else "docs/backbones.md lists published files"
    )


def _end(path: Any) -> str:
    """What of a path names the weights, in lower case."""
    parts = str(path).lower().replace("\\", "/").split("/")
    for i, part in enumerate(parts):
        if part.startswith("models--"):
            return "/".join([*part.split("--")[1:], *parts[i + 3 :]])
    # hf://org/name[@revision]/file needs all; elsewhere the file and its folder tell.
    if parts[0] == "hf:" or "huggingface.co" in parts:
        return "/".join(parts)
    name = re.sub(r"^[0-9a-f]{16}-", "", parts[-1])  # of a copy in our own cache
    return "/".join([*parts[-2:-1], name])
