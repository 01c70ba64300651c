# SPDX-License-Identifier: Apache-2.0
"""Networks that are no plain ViT or Swin: recognised by what their files hold.

A file of one of these has arrays that no model here has, or lacks some that every model
here needs. Left out, they would leave another function than the one that was saved; so
the file is refused, before any size is compared, by the name of its family. A family
that is to be loaded leaves this table for `naming` and `models`.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from vpt_jax.weights.readers import CheckpointError

_VIT = "hf://timm/vit_base_patch16_224.augreg_in21k/model.safetensors"
_DINOV2 = "hf://timm/vit_small_patch14_reg4_dinov2.lvd142m/model.safetensors"
_SIGLIP = "hf://timm/vit_base_patch16_siglip_224.v2_webli/model.safetensors"
_DINOV3 = "hf://timm/vit_small_patch16_dinov3.lvd1689m/model.safetensors"
_PLAIN = f"a plain ViT, such as {_VIT} or {_DINOV2}"
# A block of PyTorch's ViTs, whatever it is called.
_BLOCK = r"(^|\.)(blocks|layers?|resblocks)\.\d+\."


class Family(NamedTuple):
    """A kind of network, and what tells it from those that are loaded."""

    name: str
    has: str  # regular expression, searched in the names of a file's arrays
    why: str  # in "which is not supported: it has ..."
    instead: str  # what to take
    lacks: str = ""  # and no array has this
    called: str = ""  # regular expression, searched in the name of a variant


# The first that fits; the more special ones come first.
FAMILIES = (
    Family(
        "a LoRA or another adapter",
        r"(^|[._])(lora_[ab]|lora_(down|up|embedding|magnitude)\w*|lokr_\w+|hada_\w+"
        r"|ia3_l|oft_r)([._]|$)",
        "small additions to a backbone that is not in the file",
        "the merged model: merge_and_unload() of peft, then save_pretrained",
    ),
    Family(
        "a quantised network",
        r"(^|[._])(qweight|qzeros|scb|absmax|quant_map|quant_state|nested_absmax"
        r"|weight_scale(_inv)?|weight_zero_point|_packed_params|_?scale_w\w*"
        r"|weight_quantizer)([._]|$)",
        "integers that stand for its weights",
        "the file from before the quantisation, in float32, float16 or bfloat16",
    ),
    Family(
        "a Swin V2",
        r"logit_scale$.*|cpb_mlp|continuous_position_bias_mlp|attn\.meta_mlp",
        "cosine attention and a computed position bias",
        "a Swin of the first version, such as"
        " hf://timm/swin_base_patch4_window7_224.ms_in22k/model.safetensors",
        lacks=r"text_model|token_embedding|(^|/)t/|attn_pool|probe|resblocks",
        called=r"swin[-_]?v2",
    ),
    Family(
        "a ViT with attention pooling of another kind",
        r"\.attnpool\.|maphead_[1-9]"
        r"|(^|\.)attn_pool\.(?!latent$|(q|kv|proj|norm|mlp\.fc[12])\.(weight|bias)$)",
        "another pooling than one learned query (SigLIP's)",
        _SIGLIP,
        lacks=r"(^|\.)layer[1-4]\.\d+\.",
    ),
    Family(
        "a BLIP, or another ViT of transformers with fused projections",
        r"self_attn\.(qkv|projection)\.",
        "names that are not read here",
        _PLAIN,
    ),
    Family(
        "a ViT of torchvision",
        r"(^|\.)encoder_layer_\d+\.(ln_\d|self_attention|mlp)\.",
        "names that are not read here",
        _PLAIN,
    ),
    Family(
        "a Swin of torchvision",
        r"(^|\.)features\.\d+\.\d+\.(norm1|attn)\.",
        "names that are not read here",
        "hf://timm/swin_base_patch4_window7_224.ms_in22k/model.safetensors",
    ),
    Family(
        "an XCiT",
        r"attn\.temperature$|local_mp\.",
        "attention between channels and convolutions in its blocks",
        _PLAIN,
    ),
    Family(
        "a SAM",
        r"attn\.rel_pos_h$",
        "relative positions in every block and a neck after them",
        _PLAIN,
        lacks=r"pool_q|stages\.\d",
    ),
    Family(
        "a hierarchical or convolutional network",
        r"(^|\.)stages?\.?\d+\.|(^|\.)network\.\d+\.|pos_embed_win|attn\.pool_[qkv]"
        r"|(^|\.)blocks\.\d+\.(proj\.(weight|bias)$|blocks\.|fusion\.)"
        r"|gating_param$|attention_biases$|(^|\.)layer[1-4]\.\d+\.|(^|\.)conv_stem\."
        r"|^(?!.*(head|predictor|projector|decoder)).*running_mean$",
        "stages, convolutions or pooling between its blocks",
        f"{_PLAIN}, or a Swin of the first version",
        lacks=r"patch_embed\.backbone\.|patch_embeddings\.backbone\.",
    ),
    Family(
        "a hybrid of a convolutional network and a ViT",
        r"patch_embed\.backbone\.|patch_embeddings\.backbone\.|(^|/)conv_root/"
        r"|(^|/)gn_root/|(^|\.)patch_embed\.(conv|proj\.)?\d+\.|patch_embed\.conv",
        "a convolutional network before the blocks",
        _PLAIN,
    ),
    Family(
        "a ViT with rotary positions that is no DINOv3",
        r"(^|\.)rope\.(?!periods$)|attn\.w[qkv]\.",
        "rotary positions of another kind in every block",
        _DINOV3,
        called=r"_rope_",
    ),
    Family(
        "a ViT with rotary positions that is no DINOv3",
        r"(^|\.)reg_token$",
        "registers, and neither a class token nor a position table",
        _DINOV3,
        lacks=r"pos_embed|cls_token",
    ),
    Family(
        "a CaiT",
        r"attn\.proj_[lw]\.|blocks_token_only",
        "attention heads that are mixed, and blocks for the class token alone",
        _PLAIN,
    ),
    Family(
        "a ViT with relative positions",
        r"(attn|shared)[._]rel_pos",
        "relative positions in every block",
        _PLAIN,
    ),
    Family(
        "a BEiT or Data2Vec",
        r"(^|\.)(blocks|layers?)\.\d+\.(attn|attention)\.(.*\.)?relative_position_bias"
        r"|rel_pos_bias|(^|\.)layers?\.\d+\.lambda_[12]$|shared_relative_position_bias",
        "relative positions and no bias of its keys",
        "MAE or DINOv2, self-supervised too:"
        " hf://timm/vit_base_patch16_224.mae/model.safetensors",
        lacks=r"layers\.\d+\.(blocks\.\d|downsample)",
        called=r"(^|[-_/])beit|data2vec",
    ),
    Family(
        "an EVA, AIMv2 or another ViT with rotary positions or gates",
        r"blocks\.\d+\.(gamma_[12]$|attn\.(q_bias|q_proj|inner_attn_ln)|mlp\.fc1_[gx]"
        r"|mlp\.w[123]\.|mlp\.ffn_ln)",
        "blocks of another kind (rotary positions, gates, no bias of the keys)",
        _PLAIN,
        lacks=r"ls1\.gamma|blocks\.\d+\.mlp\.w12|stages\.\d|(^|\.)reg_token$",
    ),
    Family(
        "a ViT with normalised queries and keys",
        rf"{_BLOCK}.*(q_norm|k_norm|query_norm|key_norm)\.",
        "a norm of queries and keys in every block",
        _PLAIN,
        lacks=rf"{_BLOCK}in_proj\.",
    ),
    Family(
        "a ViT with parallel blocks",
        rf"{_BLOCK}(in_proj|in_norm|attns\.\d|ffns\.\d)\.",
        "attention and MLP side by side",
        _PLAIN,
    ),
    Family(
        "a ViT with differential attention",
        rf"{_BLOCK}attn\.lambda_[qk]\d",
        "differences of attentions in every block",
        _PLAIN,
    ),
    Family(
        "a BEiT 3, or another ViT with norms within attention and MLP",
        rf"{_BLOCK}(attn\.(sub_)?norm|mlp\.norm)\.",
        "norms within attention and MLP",
        _PLAIN,
    ),
    Family(
        "a NaFlexViT",
        r"(^|\.)embeds\.(proj|pos_embed)",
        "positions for pictures of all proportions",
        f"timm's ViT of a fixed size, such as {_VIT}",
        called=r"naflex",
    ),
)
# What every plain ViT has and these lack: (our name of it, once it was translated).
STRUCTURES = (
    Family(
        "a ViT whose norms have no bias (RMSNorm: AIMv2 and others)",
        r"/LayerNorm_0/scale$",
        "no mean in its norms",
        _PLAIN,
        lacks=r"/LayerNorm_0/bias$",
    ),
    Family(
        "a ViT without a bias of queries, keys and values (timm's miil, rpn, medium_gap"
        " and others, of which some put norms after attention and MLP)",
        r"/query/kernel$",
        "no bias there, and its blocks may be of another kind",
        _PLAIN,
        lacks=r"/query/bias$",
    ),
    Family(
        "a ViT without a final norm (RADIO, InternViT and others)",
        r"/LayerNorm_1/scale$",
        "features that are not normalised",
        _PLAIN,
        lacks=r"Transformer/encoder_norm/(scale|bias)$",
    ),
)
# Their rotary positions are in no array: what tells them is what else they have.
PERCEPTION = tuple(
    Family(
        "a Perception Encoder, or another ViT whose pooling reads more than patches",
        has,
        "attention pooling beside a class token, registers or a norm before its blocks,"
        " or such a norm without a final one; and in most files rotary positions",
        _SIGLIP,
        lacks,
        called,
    )
    for has, lacks, called in (
        (
            r"(?s)(^cls$|^registers$|input_norm/).*(MAPHead_0/|attn_pool\.)"
            r"|(MAPHead_0/|attn_pool\.).*(^cls$|^registers$|input_norm/)",
            "",
            r"(^|[-_/])pe[-_](core|lang|spatial)",
        ),
        (r"input_norm/", r"encoder_norm/", ""),
    )
)


def refuse_name(variant: str) -> None:
    """Raises if a variant's name is that of a family which is not supported.

    Raises:
      ValueError: As `refuse_families`.
    """
    for family in (*FAMILIES, *PERCEPTION):
        if family.called and re.search(family.called, variant.lower()):
            raise ValueError(
                f"{variant!r} is {family.name}, which is not supported: it has"
                f" {family.why}. Take {family.instead}."
            )


def refuse_families(names: Iterable[str], path: Any) -> None:
    """Raises if the names of a file's arrays are those of one of `FAMILIES`.

    Raises:
      CheckpointError: It names the family, what it has, and what to take instead.
    """
    _refuse(FAMILIES, [name.lower() for name in names], path)


def refuse_structures(
    names: Iterable[str], path: Any, *, pooled: bool, rotary: bool
) -> None:
    """Raises if a ViT, in our names, lacks what every plain ViT has.

    Args:
      names: Our names, and the file's own of what `skip` leaves alone.
      path: For the message.
      pooled: The read-out has a norm of its own, so the file needs none.
      rotary: It is a DINOv3, of which no bias of queries, keys and values is needed.

    Raises:
      CheckpointError: As `refuse_families`.
    """
    _, no_bias, no_norm = STRUCTURES
    waived = {no_bias: rotary, no_norm: pooled}
    asked = [f for f in (*PERCEPTION, *STRUCTURES) if not waived.get(f)]
    _refuse(asked, list(names), path)


def _refuse(families: Iterable[Family], names: list[str], path: Any) -> None:
    # One search over all names each: line by line.
    text = "\n".join(names)
    for family in families:
        found = re.search(family.has, text, re.MULTILINE)
        if found and not (family.lacks and re.search(family.lacks, text, re.MULTILINE)):
            raise CheckpointError(
                f"{path} holds {family.name}, which is not supported: it has"
                f" {family.why} ({_line(text, found.start())}). Take {family.instead}."
            )


def _line(text: str, at: int) -> str:
    """The name around a place in the text, as a message shows it."""
    start = text.rfind("\n", 0, at + (text[at : at + 1] == "\n")) + 1
    return ascii(text[start:].partition("\n")[0])[1:-1][:80]
