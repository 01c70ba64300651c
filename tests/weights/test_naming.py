# SPDX-License-Identifier: Apache-2.0
"""Files with other people's names load as the same network, or say what is wrong."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vpt_jax
from vpt_jax.models.inputs import NORMALISATIONS
from vpt_jax.models.posemb import RESIZES
from vpt_jax.models.vit import NORMS, READOUTS
from vpt_jax.weights.backbones import BACKBONES, architecture, known_backbone
from vpt_jax.weights.matching import match_swin, match_vit, parameters
from vpt_jax.weights.naming import read_names
from vpt_jax.weights.readers import Lazy
from vpt_jax.weights.release import flatten

DOCS = Path(__file__).parents[2] / "docs" / "backbones.md"
ATTENTION = "MultiHeadDotProductAttention_0"
PARTS = ("query", "key", "value")


def random_parameters(model):
    """Random parameters, flat, by our names; `init` would be slower."""
    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    leaves, treedef = jax.tree.flatten(shapes)
    arrays = [rng.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    return flatten(jax.tree.unflatten(treedef, arrays))


def flat_vit(**options):
    """The demo's architecture with larger patches."""
    return random_parameters(vpt_jax.ViT("demo/16", **options))


@pytest.fixture(scope="module")
def flat():
    return flat_vit()


@pytest.fixture(scope="module")
def flat_dinov2():
    return flat_vit(registers=4, layer_scale=True)


def names(block, both, attention, other):
    """A project's names: of blocks; in them; of attention; of what is no block."""
    in_block = ("LayerNorm_0", "LayerNorm_1", "out", "Dense_0", "Dense_1")
    whole = ("cls", "positions", "patches", "norm")
    result = {"block": block, **dict(zip(in_block, both.split(), strict=True))}
    parts = attention.split()
    keys = ("query", "key", "value") if len(parts) == 3 else ("qkv",)
    result |= dict(zip(keys, parts, strict=True))
    return result | dict(zip(whole, other.split(), strict=True))


EMBEDDINGS = "embeddings.cls_token embeddings.position_embeddings "
EMBEDDINGS += "embeddings.patch_embeddings.projection layernorm"
ATTENTIONS = " ".join(f"attention.attention.{n}" for n in PARTS)
NAMES = {
    "timm": names(
        "blocks.{}.",
        "norm1 norm2 attn.proj mlp.fc1 mlp.fc2",
        "attn.qkv",
        "cls_token pos_embed patch_embed.proj norm",
    )
    | {"LayerScale_0": "ls1.gamma", "LayerScale_1": "ls2.gamma"}
    | {"registers": "reg_token"},
    "transformers": names(
        "encoder.layer.{}.",
        "layernorm_before layernorm_after attention.output.dense intermediate.dense"
        " output.dense",
        ATTENTIONS,
        EMBEDDINGS,
    ),
    "Dinov2Model": names(
        "encoder.layer.{}.",
        "norm1 norm2 attention.output.dense mlp.fc1 mlp.fc2",
        ATTENTIONS,
        EMBEDDINGS,
    )
    | {f"LayerScale_{i}": f"layer_scale{i + 1}.lambda1" for i in (0, 1)}
    | {"registers": "embeddings.register_tokens"},
    "VPT": names(
        "encoder.layer.{}.",
        "attention_norm ffn_norm attn.out ffn.fc1 ffn.fc2",
        "attn.query attn.key attn.value",
        "embeddings.cls_token embeddings.position_embeddings"
        " embeddings.patch_embeddings encoder.encoder_norm",
    ),
    "in memory": names(
        "layers.{}.",
        "layernorm_before layernorm_after attention.o_proj mlp.fc1 mlp.fc2",
        "attention.q_proj attention.k_proj attention.v_proj",
        EMBEDDINGS,
    ),
}


def pytorch(flat, names, prefix=""):
    """Our parameters as a PyTorch project would have saved them."""
    result = {names[n]: flat[n] for n in ("cls", "registers") if n in flat}
    if (place := "Transformer/posembed_input/pos_embedding") in flat:
        result[names["positions"]] = flat[place]
    result |= layer(flat, "embedding", names["patches"], oihw)
    result |= layer(flat, "Transformer/encoder_norm", names["norm"])
    for i in range(6):
        here, there = f"Transformer/encoderblock_{i}/", names["block"].format(i)
        result |= in_block(flat, here, there, names)
    return {prefix + n: a for n, a in result.items()}


def layer(flat, ours, theirs, change=np.transpose):
    """What there is of a layer."""
    leaves = (("kernel", "weight"), ("scale", "weight"), ("bias", "bias"))
    return {
        f"{theirs}.{leaf}": change(flat[f"{ours}/{own}"])
        for own, leaf in leaves
        if f"{ours}/{own}" in flat
    }


def in_block(flat, here, there, names, attention=ATTENTION):
    """Norms, attention and MLP below `here`, as they are called below `there`."""
    result = layer(flat, f"{here}{attention}/out", there + names["out"], heads_in)
    for n in ("LayerNorm_0", "LayerNorm_1"):
        result |= layer(flat, here + n, there + names.get(n, ""))
    for n in ("Dense_0", "Dense_1"):
        result |= layer(flat, f"{here}MlpBlock_0/{n}", there + names[n])
    for n in ("LayerScale_0", "LayerScale_1"):
        if f"{here}{n}/gamma" in flat:
            result[there + names[n]] = flat[f"{here}{n}/gamma"]
    three = [
        layer(flat, f"{here}{attention}/{n}", there + names.get(n, "qkv"), heads_out)
        for n in PARTS
    ]
    if "qkv" not in names:
        return result | three[0] | three[1] | three[2]
    for leaf in ("weight", "bias"):
        parts = [part[f"{there}qkv.{leaf}"] for part in three]
        result[f"{there}{names['qkv']}.{leaf}"] = np.concatenate(parts)
    return result


def oihw(x):
    return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x


def heads_out(x):
    """Heads and their width as one axis, `[out, in]`."""
    return x.reshape(len(x), -1).T if x.ndim == 3 else x.ravel()


def heads_in(x):
    return x.reshape(-1, x.shape[-1]).T if x.ndim == 3 else x


def load(tmp_path, arrays, variant="demo/16", file="file.npz", **options):
    np.savez(tmp_path / file, **arrays)
    args = (variant, tmp_path / file) if variant else (tmp_path / file,)
    return vpt_jax.load_backbone(*args, **options)


def refused(message, tmp_path, arrays, **options):
    with pytest.raises(vpt_jax.CheckpointError, match=message):
        load(tmp_path, arrays, **options)


def assert_same(backbone, flat):
    loaded = flatten(backbone)
    assert loaded.keys() == flat.keys()
    for name, array in flat.items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        ("timm", ""),
        ("timm", "module.base_encoder."),
        ("transformers", "vit."),
        ("in memory", ""),
        ("VPT", ""),
    ],
)
def test_names_of_pytorch_projects(flat, tmp_path, names, prefix):
    arrays = pytorch(flat, NAMES[names], prefix)
    # What a head, a tuned prompt, a decoder or a second network leaves in the file.
    more = ["head.weight", "prompt_embeddings", "mask_token", "decoder_pos_embed"]
    more += ["decoder_blocks.0.attn.qkv.weight"]
    arrays |= {prefix + n: np.zeros(1) for n in more}
    if prefix:
        more = ["predictor.1.running_mean", "base_encoder.head.1.running_var", "epoch"]
        arrays |= {f"module.{n}": np.zeros(1) for n in more}
        arrays |= {f"module.momentum_encoder.{n}": a for n, a in flat.items()}
    model, backbone = load(tmp_path, arrays)
    assert (model.registers, model.layer_scale, model.image_size) == (0, False, 32)
    assert_same(backbone, flat)


@pytest.mark.parametrize("names", ["timm", "Dinov2Model"])
def test_dinov2(flat_dinov2, tmp_path, names):
    arrays = pytorch(flat_dinov2, NAMES[names])
    arrays["mask_token" if names == "timm" else "embeddings.mask_token"] = np.zeros(1)
    model, backbone = load(tmp_path, arrays)
    assert (model.registers, model.layer_scale) == (4, True)
    assert_same(backbone, flat_dinov2)


def zeroed(flat, *ends):
    """The parameters with zeros where a file has no array."""
    return {n: 0 * a if n.endswith(ends) else a for n, a in flat.items()}


@pytest.mark.parametrize("bias", [True, False])
def test_dinov3(tmp_path, bias):
    """timm's names: gate and value apart, no bias of keys or of all three, no table."""
    options = {"registers": 4, "layer_scale": True, "swiglu": True}
    flat = flat_vit(posemb="rotary", **options)
    flat = zeroed(flat, *(f"/{n}/bias" for n in (PARTS[1:2] if bias else PARTS)))
    scales = {f"LayerScale_{i}": f"gamma_{i + 1}" for i in (0, 1)}
    arrays = pytorch(flat, NAMES["timm"] | scales)
    for i in range(6):
        here = f"blocks.{i}."
        q, _, v = np.split(arrays.pop(f"{here}attn.qkv.bias"), 3)
        if bias:
            arrays |= {f"{here}attn.q_bias": q, f"{here}attn.v_bias": v}
        for leaf in ("weight", "bias"):
            both = np.split(arrays.pop(f"{here}mlp.fc1.{leaf}"), 2)
            for name, half in zip(("fc1_g", "fc1_x"), both, strict=True):
                arrays[f"{here}mlp.{name}.{leaf}"] = half
    model, backbone = load(tmp_path, arrays, "", num_heads=4)
    assert (model.posemb, model.epsilon, model.image_size) == ("rotary", 1e-5, 224)
    assert (model.readout, model.swiglu, model.registers) == ("cls", True, 4)
    assert_same(backbone, flat)
    if not bias:
        return
    # Another size: nothing is resized.
    _, same = load(tmp_path, arrays, "", num_heads=4, posemb="rotary", image_size=64)
    assert_same(same, flat)
    for gone in ("blocks.3.attn.q_bias", "blocks.3.mlp.fc1_g.bias"):
        some = {n: a for n, a in arrays.items() if n != gone}
        refused(r"block_3|blocks\.3", tmp_path, some, variant="", num_heads=4)


CLIP = names(
    "encoder.layers.{}.",
    "layer_norm1 layer_norm2 self_attn.out_proj mlp.fc1 mlp.fc2",
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "embeddings.class_embedding embeddings.position_embedding.weight"
    " embeddings.patch_embedding post_layernorm",
)


def test_clip(tmp_path):
    """transformers' names: a norm before the blocks, no bias of the patches."""
    flat = zeroed(flat_vit(pre_norm=True), "embedding/bias")
    arrays = pytorch(flat, CLIP, "vision_model.")
    del arrays["vision_model.embeddings.patch_embedding.bias"]
    for leaf, kind in (("weight", "scale"), ("bias", "bias")):
        norm = flat[f"Transformer/input_norm/{kind}"]
        arrays[f"vision_model.pre_layrnorm.{leaf}"] = norm
    for name in ("class_embedding", "position_embedding.weight"):
        name = f"vision_model.embeddings.{name}"
        arrays[name] = np.squeeze(arrays[name])
    arrays["vision_model.embeddings.position_ids"] = np.zeros((1, 5))
    arrays["text_model.embeddings.token_embedding.weight"] = np.zeros((9, 128))
    arrays |= {"visual_projection.weight": np.zeros((3, 128)), "logit_scale": 1.0}
    with pytest.raises(ValueError, match="pass activation='quick_gelu' .*or 'gelu'"):
        load(tmp_path, arrays)
    model, backbone = load(tmp_path, arrays, activation="quick_gelu")
    assert (model.pre_norm, model.epsilon, model.readout) == (True, 1e-5, "cls")
    assert_same(backbone, flat)
    # Without a final norm it is no CLIP, however it is read.
    arrays = {n: a for n, a in arrays.items() if "post_layernorm" not in n}
    options = {"activation": "gelu", "readout": "mean", "norm": "after"}
    refused("a Perception Encoder", tmp_path, arrays, **options)


@pytest.mark.parametrize("whose", ["big_vision", "timm", "transformers"])
def test_siglip(tmp_path, whose):
    flat = flat_vit(class_token=False, readout="map")
    pool = {"Dense_0": "mlp.fc1", "Dense_1": "mlp.fc2"}
    if whose == "big_vision":
        arrays = {f"params/img/{n}": a for n, a in flat.items()}
    elif whose == "timm":
        arrays = pytorch(flat, NAMES["timm"])
        pool |= {"LayerNorm_0": "norm", "out": "proj", "qkv": "qkv"}
        arrays |= in_block(flat, "MAPHead_0/", "attn_pool.", pool)
        arrays["attn_pool.latent"] = flat["MAPHead_0/probe"]
        for leaf in ("weight", "bias"):
            q, k, v = np.split(arrays.pop(f"attn_pool.qkv.{leaf}"), 3)
            arrays[f"attn_pool.q.{leaf}"] = q
            arrays[f"attn_pool.kv.{leaf}"] = np.concatenate([k, v])
    else:
        arrays = pytorch(flat, CLIP)
        pool |= {"LayerNorm_0": "layernorm", "out": "attention.out_proj"}
        pool |= {"qkv": "attention.in_proj"}
        arrays |= in_block(flat, "MAPHead_0/", "head.", pool)
        arrays["head.probe"] = flat["MAPHead_0/probe"]
        arrays = {n.replace("in_proj.", "in_proj_"): a for n, a in arrays.items()}
    model, backbone = load(tmp_path, arrays, activation="gelu_tanh")
    assert (model.readout, model.class_token) == ("map", False)
    assert_same(backbone, flat)
    # Read by the mean, the pooling is no part of the features.
    model, backbone = load(tmp_path, arrays, activation="gelu", readout="mean")
    assert model.readout == "mean"
    assert_same(backbone, {n: a for n, a in flat.items() if "MAPHead" not in n})
    # With a class token it would be another network (a Perception Encoder).
    name = {"timm": "cls_token", "big_vision": "params/img/cls"}
    arrays[name.get(whose, "embeddings.class_embedding")] = np.zeros((1, 1, 128))
    refused("a Perception Encoder", tmp_path, arrays, activation="gelu")


@pytest.mark.parametrize("gated", [False, True])
def test_tips(tmp_path, gated):
    """The official Linen tree: two class tokens in one array, a grid as a table."""
    flat = flat_vit(registers=1, swiglu=gated)
    table = flat["Transformer/posembed_input/pos_embedding"]
    table[:, 0] = 0  # the class token has no position there
    tokens = "encoder/ToTokenSequence_0"
    arrays = {
        f"{tokens}/cls": np.concatenate([flat["cls"], flat["registers"]], axis=1),
        f"{tokens}/posembed_input": table[:, 1:].reshape(1, 2, 2, 128),
    }
    for name, array in flat.items():
        name = name.replace("Transformer/encoder_", "encoder/encoder_")
        name = name.replace("Transformer", "encoder/transformer")
        if name.startswith("embedding/"):
            arrays[f"{tokens}/{name}"] = array
        elif gated and "MlpBlock_0/Dense_0" in name:
            for i, half in enumerate(np.split(array, 2, axis=-1)):
                own = f"FFNSwiGluFused_0/Dense_{i}"
                arrays[name.replace("MlpBlock_0/Dense_0", own)] = half
        elif gated and "MlpBlock_0/Dense_1" in name:
            own = "FFNSwiGluFused_0/Dense_2"
            arrays[name.replace("MlpBlock_0/Dense_1", own)] = array
        elif name.startswith("encoder/") and "posembed" not in name:
            arrays[name] = array
    options = {"variant": "", "file": "tips_v2_b14_vision.npz", "num_heads": 4}
    model, backbone = load(tmp_path, arrays, **options)
    assert (model.registers, model.layer_scale, model.swiglu) == (1, False, gated)
    assert (model.activation, model.readout) == ("gelu_tanh", "cls")
    assert_same(backbone, flat)
    arrays[f"{tokens}/cls"] = flat["cls"][:, :, :5]
    refused(r"/cls has shape \(1, 1, 5\)", tmp_path, arrays, **options)


@pytest.mark.parametrize(
    ("token", "num", "class_token"), [("dist_token", 1, True), ("reg_token", 3, False)]
)
def test_registers_with_positions(tmp_path, token, num, class_token):
    """A distilled DeiT's second token is a register: its position is added to it."""
    readout = "cls" if class_token else "mean"
    flat = flat_vit(registers=num, class_token=class_token, readout=readout)
    first = int(class_token)
    arrays = pytorch(flat, NAMES["timm"] | {"registers": token})
    rows = np.random.default_rng(1).standard_normal((1, num, 128), np.float32)
    table = arrays["pos_embed"]
    parts = (table[:, :first], rows, table[:, first:])
    arrays["pos_embed"] = np.concatenate(parts, axis=1)
    model, backbone = load(tmp_path, arrays, num_heads=4, activation="gelu")
    assert (model.registers, model.image_size) == (num, 32)
    flat["registers"] = flat["registers"] + rows
    assert_same(backbone, flat)


def test_a_convolution_of_that_name_is_no_second_network(flat, tmp_path):
    """OpenAI's patch embedding is called conv1, as much else is."""
    arrays = pytorch(flat, NAMES["timm"], "module.encoder.")
    arrays["module.neck.conv1.weight"] = np.zeros((3, 3, 1, 1))
    assert_same(load(tmp_path, arrays)[1], flat)


def test_rows_of_patches_are_refused_by_name(flat, tmp_path):
    arrays = pytorch(flat, CLIP)
    name = "embeddings.patch_embedding.weight"
    arrays[name] = arrays[name].reshape(128, -1)
    refused(r"all proportions \(NaFlex\)", tmp_path, arrays)


def test_a_table_without_a_row_for_the_class_token_gets_zeros(flat, tmp_path):
    arrays = pytorch(flat, NAMES["timm"])
    arrays["pos_embed"] = arrays["pos_embed"][:, 1:]
    model, backbone = load(tmp_path, arrays)
    table = backbone["Transformer"]["posembed_input"]["pos_embedding"]
    assert np.all(table[:, 0] == 0)
    np.testing.assert_array_equal(table[:, 1:], arrays["pos_embed"])


@pytest.mark.parametrize(
    ("scan", "place"), [(False, "pos_embedding"), (True, "Transformer/pos_embedding")]
)
def test_big_visions_names(flat, tmp_path, scan, place):
    arrays = {n: a for n, a in flat.items() if n != "cls"}
    table = arrays.pop("Transformer/posembed_input/pos_embedding")
    arrays[place] = table[:, 1:]
    if scan:
        first = "Transformer/encoderblock_0/"
        for n in [n for n in arrays if n.startswith(first)]:
            blocks = [arrays.pop(n.replace("_0/", f"_{i}/", 1)) for i in range(6)]
            arrays[n.replace("_0/", "/", 1)] = np.stack(blocks)
    arrays["head/kernel"] = np.zeros((128, 3))
    arrays = {f"params/{n}": a for n, a in arrays.items()}
    model, backbone = load(tmp_path, arrays)
    assert (model.class_token, model.readout, model.norm) == (False, "mean", "before")
    expected = {n: a for n, a in flat.items() if n != "cls"}
    expected["Transformer/posembed_input/pos_embedding"] = table[:, 1:]
    assert_same(backbone, expected)


def test_a_file_without_a_table_needs_to_be_told_so(flat, tmp_path):
    place = "Transformer/posembed_input/pos_embedding"
    arrays = {n: a for n, a in flat.items() if n not in ("cls", place)}
    refused(f"missing {place}", tmp_path, arrays)
    model, backbone = load(tmp_path, arrays, posemb="sincos", image_size=48)
    assert (model.posemb, model.image_size) == ("sincos", 48)
    assert_same(backbone, arrays)


def test_read_out_and_norm(flat, tmp_path):
    timm = pytorch(flat, NAMES["timm"])
    model, backbone = load(tmp_path, timm, readout="mean")
    assert (model.readout, model.norm) == ("mean", "before")
    assert_same(backbone, flat)
    # After pooling, a norm that was trained on tokens is not used.
    model, backbone = load(tmp_path, timm, readout="mean", norm="after")
    norm = backbone["Transformer"]["encoder_norm"]
    assert np.all(norm["scale"] == 1) and np.all(norm["bias"] == 0)
    # The class token is a token: there it is used, wherever the norm stands.
    model, backbone = load(tmp_path, timm, readout="cls", norm="after")
    assert_same(backbone, flat)
    # One that was trained after pooling is.
    pooled = pytorch(flat, NAMES["timm"] | {"norm": "fc_norm"})
    model, backbone = load(tmp_path, pooled)
    assert (model.readout, model.norm) == ("mean", "after")
    assert_same(backbone, flat)


def small_swin(window):
    sizes = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "patch": 4}
    return vpt_jax.Swin(**sizes, window=window, image_size=8 * window)


@pytest.fixture(scope="module")
def flat_swin():
    return random_parameters(small_swin(7))


def swin_names(flat, late):
    """Names of timm (`late`: merging starts a stage) or of the original code."""
    result = layer(flat, "patch_embed", "patch_embed.proj", oihw)
    result |= layer(flat, "patch_norm", "patch_embed.norm") | layer(
        flat, "norm", "norm"
    )
    for place in {name.split("/")[0] for name in flat}:
        kind, *at = place.split("_")
        if kind == "merging":
            there = f"layers.{int(at[0]) + late}.downsample"
            for n in ("norm", "reduction"):
                result |= layer(flat, f"{place}/{n}", f"{there}.{n}")
        if kind == "blocks":
            there = f"layers.{at[0]}.blocks.{at[1]}."
            result |= in_block(flat, f"{place}/", there, NAMES["timm"], "attention")
            table = "relative_position_bias_table"
            result[f"{there}attn.{table}"] = flat[f"{place}/attention/{table}"]
    return result


@pytest.mark.parametrize("late", [True, False])
def test_swin(flat_swin, tmp_path, late):
    arrays = swin_names(flat_swin, late)
    arrays["layers.0.blocks.1.attn_mask"] = np.zeros((64, 49, 49))
    arrays["layers.0.blocks.1.attn.relative_position_index"] = np.zeros((49, 49))
    arrays["head.weight"] = np.zeros((10, 32))
    model, backbone = load(tmp_path, arrays, "")
    assert (model.window, model.image_size) == (7, 56)
    assert model.readout == "mean_with_prompts"
    assert_same(backbone, flat_swin)


def test_swin_on_pictures_smaller_than_its_window(tmp_path):
    """Patches at the same distance keep their bias in the one smaller window."""
    flat = random_parameters(small_swin(8))
    small, backbone = load(tmp_path, swin_names(flat, True), "", image_size=32)
    assert (small.window, small.image_size) == (8, 32)
    table = "attention/relative_position_bias_table"
    loaded = flatten(backbone)
    np.testing.assert_array_equal(
        loaded[f"blocks_0_0/{table}"], flat[f"blocks_0_0/{table}"]
    )
    whole, part = flat[f"blocks_1_1/{table}"], loaded[f"blocks_1_1/{table}"]
    assert (whole.shape, part.shape) == ((225, 4), (49, 4))
    square = whole.reshape(15, 15, 4)[4:11, 4:11]
    np.testing.assert_array_equal(part, square.reshape(49, 4))


def test_wrong_variants_say_what_the_file_is(flat, tmp_path):
    timm = pytorch(flat, NAMES["timm"])
    swin = swin_names(random_parameters(vpt_jax.Swin("T")), True)
    shallow = {n: a for n, a in timm.items() if "s.5." not in n}
    table = "layers.0.blocks.{}.attn.relative_position_bias_table"
    several = swin | {table.format(i): np.zeros((121, 3)) for i in range(2)}
    for variant, arrays, message in [
        ("demo/8", timm, "holds a 'demo/16', not 'demo/8'"),
        ("Swin-T", timm, "holds a 'demo/16', not 'Swin-T'"),
        ("B/16", swin, "holds a 'Swin-T' with window 7"),
        ("Swin-T", several, r"windows of \(6, 7, 7, 7\) \(Swin S3\)"),
        ("Swin-S", swin, "holds a 'Swin-T' with window 7"),
        ("B/16", shallow, "depth 5.*none of"),
        ("B/33x", timm, "unknown variant 'B/33x'"),
        ("Swin-X", timm, "unknown variant 'Swin-X'"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(tmp_path, arrays, variant)


def test_what_does_not_fit_is_named(flat, tmp_path):
    timm = pytorch(flat, NAMES["timm"])
    qkv = "blocks.2.attn.qkv.weight"
    row, three = timm[qkv][0], timm["pos_embed"][:, :3]
    second = {f"a.{n}": a for n, a in timm.items()}
    for change, message in [
        ({"norm.bias": None}, "missing Transformer/encoder_norm/bias"),
        ({"blocks.0.extra.weight": row}, "unused blocks.0.extra.weight"),
        ({qkv: timm[qkv][1:]}, f"unused {qkv}"),
        ({"norm.bias": row[:5]}, r"norm.bias has shape \(5,\), expected \(128,"),
        ({"norm.bias": row[None]}, r"norm.bias has shape \(1, 128\)"),
        ({"pos_embed": three}, "expected .1, n . n, d. or .1, 1"),
        ({"cls_token": None}, "the file has no class token"),
        (second, "holds 2 networks, below '', 'a.'"),
        (dict.fromkeys(timm) | {"x": row}, "holds no ViT or Swin.*1 arrays: x"),
    ]:
        arrays = {n: a for n, a in (timm | change).items() if a is not None}
        refused(message, tmp_path, arrays)


def test_only_what_is_no_part_of_the_features_can_be_skipped(flat, tmp_path):
    timm = pytorch(flat, NAMES["timm"])
    more = timm | {"my_head.weight": np.zeros((3, 128)), "fc_norm.bias": np.zeros(128)}
    refused("twice, as norm.bias and fc_no", tmp_path, more)
    refused(r"unused my_head.weight\. .*skip=", tmp_path, more, skip=("fc_norm",))
    _, backbone = load(tmp_path, more, skip=("fc_norm", "my_head"))
    assert_same(backbone, flat)
    more["blocks.0.extra.weight"] = more.pop("my_head.weight")
    # Of a block nothing can be: no word of skip=.
    no_advice = r"unused blocks.0.extra.weight((?!skip).)*$"
    refused(no_advice, tmp_path, more, skip="fc_norm")
    for name in ("extra", "encoder_norm", "embedding/bias", "patch_embed.proj.bias"):
        skip = ("fc_norm", "extra", name)
        refused("function needs|missing emb", tmp_path, more, skip=skip)


def test_other_dtypes_in_file_and_out(flat, tmp_path):
    half = {n: a.astype(np.float16) for n, a in flat.items()}
    _, backbone = load(tmp_path, half)
    assert_same(backbone, {n: a.astype(np.float32) for n, a in half.items()})
    _, backbone = load(tmp_path, flat, param_dtype=jnp.bfloat16, image_size=64)
    assert {x.dtype for x in jax.tree.leaves(backbone)} == {jnp.dtype(jnp.bfloat16)}


# A path that no row's source names, the beginning of its row, facts that are told. With
# DINOv2's 24 heads features of timm's giantopt are off by 7 %: benchmarks/timm_scan.py.
KNOWN = """
a/vit-s-300ep.pth.tar                                                   | MoCo |
0123456789abcdef-vit-b-300ep.pth                                        | MoCo |
mocov3_linear-vit-b-300ep.pth.tar                                       | MoCo |
models--timm--vit_base_patch16_224.mae/snapshots/25/model.safetensors   | MAE |
/c/models--facebook--vit-mae-base/snapshots/25/w/model.safetensors      | MAE |
https://huggingface.co/facebook/vit-mae-base/resolve/main/w.safetensors | MAE |
mae_pretrain_vit_base.pth/mine.npz                                      | MAE |
mae_pretrain_vit_base.pth/run/mine.npz                                  | |
weights.npz                                                             | |
google--vit-base-patch16-224-in21k/model.safetensors    | ViT, ImageNet-21k (orig |
imagenet21k_ViT-B_16.npz                                | ViT, ImageNet-21k (orig |
hf://timm/vit_base_patch16_224.augreg_in21k@main/x.bin  | ViT, ImageNet-21k (Aug |
webli_en_b16_224_63724782.npz                           | SigLIP | gelu_tanh
timm/vit_base_patch16_siglip_224.v2_webli/x.bin         | SigLIP | gelu
timm/vit_base_patch32_siglip_256.v2_webli/x.bin         | SigLIP | gelu_tanh
timm/vit_large_patch16_siglip_512.v2_webli/x.bin        | SigLIP | gelu_tanh
vit_7b_patch16_dinov3.sat493m/model.safetensors         | | gelu
vit_base_patch16_clip_224.openai_ft_in1k/x.bin          | | gelu
vit_base_patch16_clip_224.metaclip_400m/x.bin           | | quick_gelu
vit_base_patch32_clip_224.laion2b/model.safetensors     | OpenCLIP | gelu
vit_large_patch14_clip_224.laion2b/model.safetensors    | | gelu
vit_giantopt_patch16_siglip_gap_256/model.safetensors   | | 16 gelu_tanh
"""


@pytest.mark.parametrize("line", KNOWN.strip().splitlines())
def test_known_files(line):
    path, start, facts = (part.strip() for part in line.split("|"))
    known = known_backbone(path)
    assert (known.name if known else "").startswith(start)
    assert bool(known) == bool(start)
    told = architecture(path) | (known.card() if known else {})
    assert set(facts.split()) <= set(map(str, told.values()))


def test_the_table_of_backbones_is_consistent_and_in_the_docs():
    text = DOCS.read_text(encoding="utf-8")
    for row in BACKBONES:
        assert row.row() in text
        for address in re.split(", | or ", row.source):
            assert known_backbone(address.strip()) is row
        assert row.normalisation in NORMALISATIONS
        assert row.readout in READOUTS and row.norm in NORMS
        assert row.resize in ("", *RESIZES)


@pytest.mark.parametrize("kind", ["google", "timm", "Dinov2Model", "swin", "scan"])
def test_hostile_names_and_shapes_are_our_error(kind, flat_dinov2, flat_swin):
    """Whatever names and shapes a file claims: an error of ours, or a model."""
    if kind == "scan":
        arrays = {"embedding/kernel": flat_dinov2["embedding/kernel"]}
        arrays["Transformer/encoderblock/LayerNorm_0/bias"] = np.zeros((6, 128))
    elif kind == "swin":
        arrays = swin_names(flat_swin, True)
    else:
        arrays = pytorch(flat_dinov2, NAMES[kind]) if kind in NAMES else flat_dinov2
    shapes = {name: a.shape for name, a in arrays.items()}
    wanted = small_swin(7) if kind == "swin" else vpt_jax.ViT("demo/16")
    rng, errors = np.random.default_rng(0), 0
    sizes = (0, 1, 2, 3, 4, 5, 16, 128, 384, 2**20, 2**40)
    for _ in range(60):
        changed = dict(shapes)
        for name in rng.choice(list(shapes), rng.integers(1, 4)):
            shape = list(changed.pop(name, (1,)))
            how = rng.integers(5)
            if how == 0 and shape:
                shape[rng.integers(len(shape))] = int(rng.choice(sizes))
            elif how == 1:
                shape = [int(n) for n in rng.choice(sizes, rng.integers(0, 6))]
            elif how == 2:
                name = name.replace(*rng.choice(list("abcdeknt/._012"), 2))
            elif how == 3:
                name = "".join(rng.permutation(list(name)))
            if how < 4:
                changed[name] = tuple(shape)
        lazy = {n: Lazy(s, np.dtype(np.float32), unread) for n, s in changed.items()}
        try:
            named = read_names(lazy, "file", ())
            if kind == "swin":
                model = match_swin(wanted, named, "file", readout="", image_size=0)
            else:
                model = match_vit(
                    wanted, named, "file", readout="", norm="", posemb="learned"
                )
            parameters(named, model, "file", (), jnp.float32)
        except vpt_jax.CheckpointError:
            errors += 1
        except Unread:  # names and shapes fit after all
            pass
    assert errors > 30


class Unread(Exception):
    """Raised in place of reading an array."""


def unread():
    raise Unread
