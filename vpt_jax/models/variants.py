# SPDX-License-Identifier: Apache-2.0
"""Names of variants: ours, and those by which other projects call the same sizes."""

import re

_LETTERS = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H"}
_LETTERS |= {short.lower(): short for short in _LETTERS.values()}
_LETTERS["so400m"] = "So400m"
_SIZE = "|".join(sorted(_LETTERS, key=len, reverse=True))
_END = r"(?:[-_.].*)?"
_VIT = re.compile(
    rf"(?:dino[-_]|clip[-_])?(?:vit|deit3?|siglip2?)?[-_]?(?P<size>{_SIZE})"
    rf"(?:[-_]distilled)?[-_/]?(?:patch|p)?[-_]?(?P<patch>\d\d?){_END}"
)
_DINOV3 = re.compile(
    rf"(?:dinov3[-_])?vit_?(?P<size>{_SIZE}|7b)(?P<plus>_?plus)?(?:_patch)?16"
    rf"(?P<after>plus)?(?:_dinov3|[-_]pretrain){_END}"
)
_DINOV2 = re.compile(
    r"dinov2(?:-with-registers)?[-_](?:vit)?(?P<size>s|b|l|g|small|base|large|giant)"
    rf"(?:14)?{_END}|vit_(?P<giant>giant)_patch14_(?:reg4_)?dinov2{_END}"
)
_SWIN = re.compile(
    rf"swin[-_]?(?P<size>t|tiny|s|small|b|base|l|large){_END}", re.IGNORECASE
)
_OTHERS = re.compile(r"naflex|_rope_")

EXAMPLES = [  # of other projects' names, for those who misspell one
    *(f"vit_{s}_patch{p}_224" for s in ("small", "base", "large") for p in (16, 32)),
    *(f"deit_{s}_patch16_224" for s in ("tiny", "small", "base")),
    *("vit_tiny_patch16_224", "vit_huge_patch14_224"),
    *(f"swin_{s}_patch4_window7_224" for s in ("tiny", "small", "base", "large")),
    *(f"dinov2_vit{s}14" for s in "sblg"),
]


def canonical(variant: str) -> str:
    """Our name of a variant, or the name as it is where it is none that we know.

    Example:
      >>> canonical("vit_small_patch16_224"), canonical("ViT-B/16"), canonical("B16")
      ('S/16', 'B/16', 'B/16')
      >>> canonical("swin_tiny_patch4_window7_224"), canonical("facebook/dinov2-base")
      ('Swin-T', 'B/14')
    """
    if not isinstance(variant, str) or len(variant) < 3:
        return variant
    # Of timm/vit_base_patch16_224 or google/vit-base-patch16-224 the name alone.
    names = {variant, variant.rpartition("/")[2]}
    if _OTHERS.search(variant.lower()):  # the sizes of a ViT, and another network
        return variant
    for name in map(str.lower, sorted(names, key=len, reverse=True)):
        if match := _SWIN.fullmatch(name):
            return f"Swin-{match['size'][0].upper()}"
        if match := _DINOV2.fullmatch(name):
            size = (match["size"] or match["giant"])[0]
            return f"{size if size == 'g' else size.upper()}/14"
        if match := _DINOV3.fullmatch(name):
            plus = "+" * bool(match["plus"] or match["after"])
            return f"{_LETTERS.get(match['size'], '7B')}{plus}/16"
        if match := _VIT.fullmatch(name):
            return f"{_LETTERS[match['size']]}/{match['patch']}"
    return variant
