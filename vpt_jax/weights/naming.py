# SPDX-License-Identifier: Apache-2.0
"""What pretrained files call their parameters, and what we call them.

`read_names` looks at names and shapes only. Known are Google's names (original ViT,
AugReg, big_vision, SigLIP), those of timm and the original PyTorch code (ViT, DeiT,
MAE, MoCo v3, DINO, DINOv2, DINOv3, CLIP, SigLIP, TIPSv2, Swin), of OpenAI's and
OpenCLIP's CLIP, transformers (`ViTModel`, `DeiTModel`, `Dinov2Model`, `DINOv3ViTModel`,
`CLIPVisionModel`, `SiglipVisionModel`, `Tipsv2VisionModel`, `SwinModel`), TIPS' Linen
encoder and VPT's ViT.
"""

import collections
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vpt_jax.weights.readers import CheckpointError, Lazy

POSITIONS = "Transformer/posembed_input/pos_embedding"
FINAL_NORM = "Transformer/encoder_norm"
INPUT_NORM = "Transformer/input_norm"
POOLING = "MAPHead_0"
MAX_DEPTH = 1000  # what a stacked encoder's first axis may claim

# The patch embedding is in every network once; what stands before it is the prefix.
_ANCHOR = re.compile(
    r"(?P<prefix>(?:.*?[./])??)(?:(?:ToTokenSequence_0/)?embedding/kernel"
    r"|patch_embed/kernel"
    r"|patch_embed\.proj\.weight"
    r"|embeddings\.patch_embeddings?\.(?:projection\.)?weight|conv1\.weight)"
)
# No part of a backbone: heads, training-only tokens, prompts, buffers.
_LEFT_OUT = re.compile(
    r"(head|head_dist|fc|classifier|pre_logits|pooler|decoder\w*|prompt_embeddings"
    r"|deep_prompt_embeddings\w*|mask_token|embeddings[./]mask_token"
    r"|local_cls_norm)([./]|$)|proj$"
    r"|.*[./](relative_position_index|attn_mask|bias_mask|position_ids)$"
    r"|rope(_embed)?\.periods$"
    r"|(encoder\.)?(deep_)?prompt_\w+([./]|$)"
)

_DENSE = {"weight": ("kernel", "transpose"), "bias": ("bias", "same")}
_NORM = {"weight": ("scale", "same"), "bias": ("bias", "same")}
_CONV = {"weight": ("kernel", "convolution"), "bias": ("bias", "same")}
_SCALE = {n: ("gamma", "same") for n in ("gamma", "lambda1")}
_QKV = {"weight": ("kernel", "split"), "bias": ("bias", "split")}
_IN_PROJ = {f"in_proj_{n}": (ours, "split") for n, (ours, _) in _QKV.items()}
_BARE = {"": ("", "same")}
_ROWS = {"": ("", "rows")}
_MHA = "MultiHeadDotProductAttention_0"
_TABLE = "relative_position_bias_table"

# (their name, our name, what becomes of the last part); `{}` in ours is the group.
_PATCHES = r"patch_embed\.proj|embeddings\.patch_embeddings(?:\.projection)?"
_POOL = rf"{POOLING}/{_MHA}"
_VIT = (
    (r"(?:embeddings\.)?cls_token", "cls", _BARE),
    (r"(?:embeddings\.)?class_embedding", "cls", _ROWS),
    (r"pos_embed|embeddings\.position_embeddings", POSITIONS, _BARE),
    (r"positional_embedding|embeddings\.position_embedding\.weight", POSITIONS, _ROWS),
    (
        r"(?:embeddings\.)?(?:reg_token|register_tokens|storage_tokens|dist_token"
        r"|distillation_token)",
        "registers",
        _BARE,
    ),
    (rf"{_PATCHES}|embeddings\.patch_embedding|conv1", "embedding", _CONV),
    (r"norm_pre|pre_layr?norm|ln_pre", INPUT_NORM, _NORM),
    (
        r"norm|fc_norm|layernorm|encoder\.encoder_norm|post_layernorm|ln_post",
        FINAL_NORM,
        _NORM,
    ),
    (r"attn_pool\.latent|head\.probe", f"{POOLING}/probe", _BARE),
    (r"attn_pool\.q", f"{_POOL}/query", _DENSE),
    (r"attn_pool\.kv", f"{_POOL}/{{kv}}", _QKV),
    (r"head\.attention", f"{_POOL}/{{qkv}}", _IN_PROJ),
    (r"attn_pool\.proj|head\.attention\.out_proj", f"{_POOL}/out", _DENSE),
    (r"attn_pool\.norm|head\.layernorm", f"{POOLING}/LayerNorm_0", _NORM),
    (r"(?:attn_pool|head)\.mlp\.fc1", f"{POOLING}/MlpBlock_0/Dense_0", _DENSE),
    (r"(?:attn_pool|head)\.mlp\.fc2", f"{POOLING}/MlpBlock_0/Dense_1", _DENSE),
)
_VIT_BLOCK = re.compile(
    r"(?:blocks|layers|encoder\.layers?|(?:model\.)?layer|transformer\.resblocks)"
    r"\.(?P<block>\d+)\.(?P<rest>.*)"
)
_IN_VIT_BLOCK = (
    (r"norm1|layernorm_before|attention_norm|layer_norm1|ln_1", "LayerNorm_0", _NORM),
    (r"norm2|layernorm_after|ffn_norm|layer_norm2|ln_2", "LayerNorm_1", _NORM),
    (r"attn\.qkv", f"{_MHA}/{{qkv}}", _QKV),
    (r"attn", f"{_MHA}/{{qkv}}", _IN_PROJ),
    (r"attn\.([qv])_bias", f"{_MHA}/{{}}/bias", _BARE),
    (r"(?:attention\.attention|attn)\.(query|key|value)", f"{_MHA}/{{}}", _DENSE),
    (r"(?:attention|self_attn)\.([qkv])_proj", f"{_MHA}/{{}}", _DENSE),
    (
        r"attn\.(?:proj|out)|attention\.(?:output\.dense|o_proj)"
        r"|(?:self_)?attn\.out_proj",
        f"{_MHA}/out",
        _DENSE,
    ),
    # Of gated MLPs in two arrays: the gate, which `_joined` puts before the other.
    (r"mlp\.(?:fc1_g|w1|gate_proj)", "MlpBlock_0/gate", _DENSE),
    (
        r"mlp\.(?:fc1|w12|weights_in|c_fc|fc1_x|w2|up_proj)|ffn\.fc1"
        r"|intermediate\.dense",
        "MlpBlock_0/Dense_0",
        _DENSE,
    ),
    (
        r"mlp\.(?:fc2|w3|weights_out|c_proj|down_proj)|ffn\.fc2|output\.dense",
        "MlpBlock_0/Dense_1",
        _DENSE,
    ),
    (r"ls1|layer_scale1", "LayerScale_0", _SCALE),
    (r"ls2|layer_scale2", "LayerScale_1", _SCALE),
    (r"gamma_1", "LayerScale_0/gamma", _BARE),
    (r"gamma_2", "LayerScale_1/gamma", _BARE),
)
_SWIN = (
    (_PATCHES, "patch_embed", _CONV),
    (r"(?:patch_embed|embeddings)\.norm", "patch_norm", _NORM),
    (r"norm|layernorm", "norm", _NORM),
)
_SWIN_BLOCK = re.compile(
    r"(?:encoder\.)?layers\.(?P<stage>\d+)\.blocks\.(?P<block>\d+)\.(?P<rest>.*)"
)
_IN_SWIN_BLOCK = (
    (r"norm1|layernorm_before", "LayerNorm_0", _NORM),
    (r"norm2|layernorm_after", "LayerNorm_1", _NORM),
    (r"attn\.qkv", "attention/{qkv}", _QKV),
    (r"attention\.self\.(query|key|value)", "attention/{}", _DENSE),
    (r"attention\.([qkv])_proj", "attention/{}", _DENSE),
    (r"attn\.proj|attention\.(?:output\.dense|o_proj)", "attention/out", _DENSE),
    (
        r"(?:attn|attention\.self|attention\.relative_position_bias)\." + _TABLE,
        f"attention/{_TABLE}",
        _BARE,
    ),
    (r"mlp\.fc1|intermediate\.dense", "MlpBlock_0/Dense_0", _DENSE),
    (r"mlp\.fc2|output\.dense", "MlpBlock_0/Dense_1", _DENSE),
)
_SWIN_MERGING = re.compile(
    r"(?:encoder\.)?layers\.(?P<stage>\d+)\.downsample\.(?P<rest>.*)"
)
_IN_SWIN_MERGING = (
    (r"norm", "norm", _NORM),
    (r"reduction", "reduction", {"weight": ("kernel", "transpose")}),
)
_QKV_NAMES = ("query", "key", "value")

# Pre-Linen Flax numbered all submodules of a block in one sequence; Google's files
# still carry those names. Linen numbers each kind on its own.
_PRE_LINEN = (
    ("MultiHeadDotProductAttention_1/", "MultiHeadDotProductAttention_0/"),
    ("LayerNorm_2/", "LayerNorm_1/"),
    ("MlpBlock_3/", "MlpBlock_0/"),
)
# Of TIPS' official Linen encoder, with class token and register in one array.
_TIPS = (
    ("ToTokenSequence_0/posembed_input", POSITIONS),
    ("ToTokenSequence_0/", ""),
    ("encoder_norm/", f"{FINAL_NORM}/"),
    ("transformer/", "Transformer/"),
    ("FFNSwiGluFused_0/Dense_0/", "MlpBlock_0/gate/"),
    ("FFNSwiGluFused_0/Dense_1/", "MlpBlock_0/Dense_0/"),
    ("FFNSwiGluFused_0/Dense_2/", "MlpBlock_0/Dense_1/"),
)


class Entry(NamedTuple):
    """An array of a file and our parameters that are made of it.

    `make` turns the array into a list with one array per name. Attention kernels and
    biases of PyTorch files have one axis where ours have heads and width: the same
    numbers in the same order.
    """

    source: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    lazy: Lazy
    make: Callable[[np.ndarray], Sequence[np.ndarray]]


class Named(NamedTuple):
    """What a file of weights holds, in our names."""

    kind: str  # "vit" or "swin"
    entries: list[Entry]
    unknown: list[str]  # of the network, but nothing that we know
    left_out: list[str]  # heads and the like
    skipped: list[str]  # of the network, left alone as the caller said

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: shape
            for entry in self.entries
            for name, shape in zip(entry.names, entry.shapes, strict=True)
        }


def skipped(name: str, skip: Sequence[str]) -> bool:
    """Whether `skip` has the name, or successive parts of it (`"encoder_norm"`)."""
    parts = f"/{name.replace('.', '/')}/"
    return any(f"/{part.replace('.', '/')}/" in parts for part in skip)


def read_names(arrays: Mapping[str, Lazy], path: Any, skip: Sequence[str]) -> Named:
    """Finds the network in a file, named by `path`, and names its parameters as we do.

    Leaves alone what `skipped` says. Raises CheckpointError if there is no network of a
    known kind, or several.
    """
    prefix = _prefix(list(arrays), path)
    inside = {n[len(prefix) :]: a for n, a in arrays.items() if n.startswith(prefix)}
    outside = [n for n in arrays if not n.startswith(prefix)]
    pooled = {n for n in inside if "head.probe" in inside and n.startswith("head.")}
    aside = {n for n in inside if _LEFT_OUT.match(n) and n not in pooled}
    alone = {n for n in inside if n not in aside and skipped(n, skip)}
    every = inside
    inside = {n: a for n, a in inside.items() if n not in aside | alone}
    anchors = (m for n in inside if (m := _ANCHOR.fullmatch(n)) and not m["prefix"])
    if any(len(inside[m[0]].shape) == 2 for m in anchors):
        raise CheckpointError(
            f"{path} holds a ViT for pictures of all proportions (NaFlex), which is not"
            " supported: its patches are rows. Take the model of a fixed size, such as"
            " hf://google/siglip2-base-patch16-224/model.safetensors."
        )
    if any(n.startswith("blocks_0_0/") for n in inside):
        kind, translate = "swin", _flax_entry
    elif "embedding/kernel" in inside:
        kind, translate = "vit", _flax_entry
    elif "ToTokenSequence_0/embedding/kernel" in inside:
        kind, translate = "vit", _tips_entry
    elif any(_SWIN_BLOCK.fullmatch(n) for n in inside):
        kind, translate = "swin", _swin_names(inside)
    else:
        kind, translate = "vit", _vit_entry
    entries, unknown = [], []
    for name, lazy in inside.items():
        found = translate(name, lazy)
        if found is None:
            unknown.append(prefix + name)
        else:
            if f"{name}_mask" in every:  # Meta's DINOv3: no bias of the keys
                found = [entry._replace(make=_keyless(entry.make)) for entry in found]
            entries += [entry._replace(source=prefix + name) for entry in found]
    entries = _joined(entries)
    names = collections.Counter(name for entry in entries for name in entry.names)
    if twice := sorted(name for name, count in names.items() if count > 1):
        both = [e.source for e in entries if twice[0] in e.names]
        raise CheckpointError(
            f"{path} holds {twice[0]} twice, as {' and '.join(both)}; name the one to"
            " leave out in skip=."
        )
    for name in sorted(alone):  # before the position table is compared without it
        left = [n for e in translate(name, every[name]) or () for n in e.names]
        if "cls" in left and "cls" not in names:
            raise CheckpointError(needed(path, prefix + name))
    return Named(
        kind,
        entries,
        unknown,
        left_out=[*outside, *(prefix + n for n in sorted(aside))],
        skipped=[prefix + n for n in sorted(alone)],
    )


def needed(path: Any, name: str) -> str:
    """The message about a name in `skip` without which there is another network."""
    return (
        f"{path}: skip= names {name!r}, which the network's function needs; leave out"
        " only what is no part of the features, such as a further head."
    )


def named_leaves(tree: Any) -> dict[str, Any]:
    """A nested tree as `{'a/b/c': leaf}`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{'a/b/c': leaf}` as a nested tree of dicts."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _prefix(names: list[str], path: Any) -> str:
    anchors = [m for n in names if (m := _ANCHOR.fullmatch(n))]
    # Many networks have a conv1; OpenAI's ViT has a class token beside it.
    tokens = {n.removesuffix("class_embedding") for n in names}
    found = sorted(
        {m["prefix"] for m in anchors if "conv1" not in m[0] or m["prefix"] in tokens}
    )
    # MoCo files hold the network that learns and its moving average.
    found = [p for p in found if "momentum" not in p] or found
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{path} holds {len(found)} networks, below {', '.join(map(repr, found))};"
            " save the one to use in a file of its own."
        )
    shown = ", ".join(sorted(names)[:5]) or "nothing"
    raise CheckpointError(
        f"{path} holds no ViT or Swin whose names are known (no patch embedding); it"
        f" holds {len(names)} arrays: {shown}{', ...' if len(names) > 5 else ''}."
        " Expected the names of Google's ViT, timm, transformers or the original code."
    )


def _flax_entry(name: str, lazy: Lazy) -> list[Entry] | None:
    """Google's names, old and new, and our own."""
    if name in ("pos_embedding", "Transformer/pos_embedding"):  # big_vision, new, old
        name = POSITIONS
    for old, new in _PRE_LINEN:
        name = name.replace(old, new)
    if name.startswith("Transformer/encoderblock/"):  # a scanned encoder: stacked
        rest = name.removeprefix("Transformer/encoderblock/")
        depth = lazy.shape[0] if lazy.shape else 0
        if depth > MAX_DEPTH:
            return None
        names = tuple(f"Transformer/encoderblock_{i}/{rest}" for i in range(depth))
        return [Entry("", names, (lazy.shape[1:],) * depth, lazy, list)]
    return _changed((name,), "same", lazy)


def _tips_entry(name: str, lazy: Lazy) -> list[Entry] | None:
    for theirs, ours in _TIPS:
        name = name.replace(theirs, ours)
    if name == "cls" and len(lazy.shape) == 3 and lazy.shape[1] == 2:
        shape = (lazy.shape[0], 1, lazy.shape[2])
        halves = functools.partial(np.split, indices_or_sections=2, axis=1)
        return [Entry("", ("cls", "registers"), (shape,) * 2, lazy, halves)]
    return _changed((name,), "rows" if name == POSITIONS else "same", lazy)


def _vit_entry(name: str, lazy: Lazy) -> list[Entry] | None:
    if block := _VIT_BLOCK.fullmatch(name):
        where = f"Transformer/encoderblock_{block['block']}/"
        return _look_up(_IN_VIT_BLOCK, where, block["rest"], lazy)
    return _look_up(_VIT, "", name, lazy)


def _swin_names(names: Mapping[str, Lazy]) -> Callable:
    # The original merges at the end of a stage, timm at the start of the next one.
    late = not any(
        (m := _SWIN_MERGING.fullmatch(n)) and m["stage"] == "0" for n in names
    )

    def translate(name: str, lazy: Lazy) -> list[Entry] | None:
        if m := _SWIN_BLOCK.fullmatch(name):
            where = f"blocks_{m['stage']}_{m['block']}/"
            return _look_up(_IN_SWIN_BLOCK, where, m["rest"], lazy)
        if m := _SWIN_MERGING.fullmatch(name):
            where = f"merging_{int(m['stage']) - late}/"
            return _look_up(_IN_SWIN_MERGING, where, m["rest"], lazy)
        return _look_up(_SWIN, "", name, lazy)

    return translate


def _look_up(
    table: Sequence[tuple], where: str, name: str, lazy: Lazy
) -> list[Entry] | None:
    for pattern, ours, leaves in table:
        for leaf, (our_leaf, change) in leaves.items():
            dotted = rf"(?:{pattern})\.{leaf}" if leaf else pattern
            if not (match := re.fullmatch(dotted, name)):
                continue
            group = match[1] if match.lastindex else ""
            group = {"q": "query", "k": "key", "v": "value"}.get(group, group)
            if change == "split":
                split = _QKV_NAMES["{kv}" in ours :]
                full = [ours.format(qkv=n, kv=n) for n in split]
            else:
                full = [ours.format(group)]
            names = tuple(f"{where}{n}/{our_leaf}".rstrip("/") for n in full)
            return _changed(names, change, lazy)
    return None


def _changed(names: tuple[str, ...], change: str, lazy: Lazy) -> list[Entry] | None:
    """The entry, or None if the array has not the axes that the change needs."""
    shape, make = lazy.shape, lambda x: [x]
    if change == "transpose":  # [out, in] to [in, out]
        if len(shape) != 2:
            return None
        shape, make = shape[::-1], lambda x: [x.T]
    elif change == "convolution":  # OIHW to HWIO
        if len(shape) != 4:
            return None
        shape = (shape[2], shape[3], shape[1], shape[0])
        make = lambda x: [x.transpose(2, 3, 1, 0)]  # noqa: E731
    elif change == "split":  # query, key and value one below the other
        num = len(names)
        if len(shape) not in (1, 2) or shape[0] % num:
            return None
        shape = (shape[0] // num, *shape[1:])[::-1]
        make = lambda x: [part.T for part in np.split(x, num)]  # noqa: E731
    elif change == "rows":  # without the axis of examples, or as a grid
        if not shape:
            return None
        shape = (1, math.prod(shape[:-1]), shape[-1])
        make = lambda x: [x.reshape(shape)]  # noqa: E731
    return [Entry("", names, (shape,) * len(names), lazy, make)]


def _keyless(make: Callable) -> Callable:
    """`make` of a fused bias whose part for the keys does not count: zeros there."""
    return lambda x: [part * (i != 1) for i, part in enumerate(make(x))]


def _joined(entries: list[Entry]) -> list[Entry]:
    """Gate and value of a gated MLP, two arrays of a file, as halves of one layer."""
    place = {name: entry for entry in entries for name in entry.names}
    result = {id(entry): entry for entry in entries}
    for name, gate in place.items():
        own = name.replace("/gate/", "/Dense_0/")
        value = place.get(own)
        if own == name or value is None or value.shapes != gate.shapes:
            continue
        if not gate.shapes[0]:  # what does not fit is named later
            continue
        shape = (*gate.shapes[0][:-1], 2 * gate.shapes[0][-1])

        def load(parts: tuple[Entry, Entry] = (gate, value)) -> np.ndarray:
            return np.concatenate([p.make(p.lazy.load())[0] for p in parts], axis=-1)

        lazy = gate.lazy._replace(shape=shape, load=load)
        del result[id(gate)]
        result[id(value)] = Entry(value.source, (own,), (shape,), lazy, lambda x: [x])
    return list(result.values())
