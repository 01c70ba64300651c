# SPDX-License-Identifier: Apache-2.0
"""Files with other people's names load as the same network, or say what is wrong."""

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


EMBEDDINGS = (
    "embeddings.cls_token embeddings.position_embeddings"
    " embeddings.patch_embeddings{} {}"
).format
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
        "attention.attention.query attention.attention.key attention.attention.value",
        EMBEDDINGS(".projection", "layernorm"),
    ),
    "Dinov2Model": names(
        "encoder.layer.{}.",
        "norm1 norm2 attention.output.dense mlp.fc1 mlp.fc2",
        "attention.attention.query attention.attention.key attention.attention.value",
        EMBEDDINGS(".projection", "layernorm"),
    )
    | {f"LayerScale_{i}": f"layer_scale{i + 1}.lambda1" for i in (0, 1)}
    | {"registers": "embeddings.register_tokens"},
    "VPT": names(
        "encoder.layer.{}.",
        "attention_norm ffn_norm attn.out ffn.fc1 ffn.fc2",
        "attn.query attn.key attn.value",
        EMBEDDINGS("", "encoder.encoder_norm"),
    ),
    "in memory": names(
        "layers.{}.",
        "layernorm_before layernorm_after attention.o_proj mlp.fc1 mlp.fc2",
        "attention.q_proj attention.k_proj attention.v_proj",
        EMBEDDINGS(".projection", "layernorm"),
    ),
}


def pytorch(flat, names, prefix=""):
    """Our parameters as a PyTorch project would have saved them."""
    result = {names[n]: flat[n] for n in ("cls", "registers") if n in flat}
    if (place := "Transformer/posembed_input/pos_embedding") in flat:
        result[names["positions"]] = flat[place]

    def put(there, here, change=np.transpose):
        for ours, theirs in (("kernel", "weight"), ("scale", "weight"), ("bias",) * 2):
            if (array := flat.get(f"{here}/{ours}")) is not None:
                result[f"{there}.{theirs}"] = change(array)

    put(names["patches"], "embedding", oihw)
    put(names["norm"], "Transformer/encoder_norm")
    for i in range(6):
        here, there = f"Transformer/encoderblock_{i}/", names["block"].format(i)
        for n in ("LayerNorm_0", "LayerNorm_1"):
            put(there + names[n], here + n)
        for n in ("Dense_0", "Dense_1"):
            put(there + names[n], f"{here}MlpBlock_0/{n}")
        put(there + names["out"], f"{here}{ATTENTION}/out", one_axis)
        if "qkv" in names:
            for kind in ("kernel", "bias"):
                three = [one_axis(flat[f"{here}{ATTENTION}/{n}/{kind}"]) for n in PARTS]
                leaf = "weight" if kind == "kernel" else kind
                result[f"{there}{names['qkv']}.{leaf}"] = np.concatenate(three)
        else:
            for n in PARTS:
                put(there + names[n], f"{here}{ATTENTION}/{n}", one_axis)
        for n in ("LayerScale_0", "LayerScale_1"):
            if f"{here}{n}/gamma" in flat:
                result[there + names[n]] = flat[f"{here}{n}/gamma"]
    return {prefix + n: a for n, a in result.items()}


def oihw(x):
    return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x


def one_axis(x):
    """Heads and their width as one axis, `[out, in]`."""
    return x.reshape(128, 128).T if x.ndim == 3 else x.reshape(-1)


def load(tmp_path, arrays, variant="demo/16", **options):
    np.savez(tmp_path / "file.npz", **arrays)
    return vpt_jax.load_backbone(variant, tmp_path / "file.npz", **options)


def assert_same(backbone, flat):
    loaded = flatten(backbone)
    assert loaded.keys() == flat.keys()
    for name, array in flat.items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)


@pytest.mark.parametrize("prefix", ["", "vit.", "module.base_encoder."])
@pytest.mark.parametrize("names", ["timm", "transformers", "in memory", "VPT"])
def test_names_of_pytorch_projects(flat, tmp_path, names, prefix):
    arrays = pytorch(flat, NAMES[names], prefix)
    # What a head, a tuned prompt or a second network would leave in the file.
    arrays |= {f"{prefix}head.weight": np.zeros((3, 128)), "epoch": np.zeros(())}
    arrays |= {f"{prefix}prompt_embeddings": np.zeros((1, 5, 128))}
    arrays |= {f"module.momentum_encoder.{n}": a for n, a in flat.items()}
    if not prefix:
        arrays = {
            n: a for n, a in arrays.items() if "momentum" not in n and n != "epoch"
        }
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
    np.savez(tmp_path / "w.npz", **arrays)
    model, backbone = vpt_jax.load_backbone(tmp_path / "w.npz", num_heads=4)
    assert (model.posemb, model.epsilon, model.image_size) == ("rotary", 1e-5, 224)
    assert (model.readout, model.swiglu, model.registers) == ("cls", True, 4)
    assert_same(backbone, flat)
    # Another size: nothing is resized.
    _, same = vpt_jax.load_backbone(
        tmp_path / "w.npz", num_heads=4, posemb="rotary", image_size=64
    )
    assert_same(same, flat)
    for gone in ("blocks.3.attn.q_bias", "blocks.3.mlp.fc1_g.bias"):
        some = {n: a for n, a in arrays.items() if n != gone}
        if len(some) < len(arrays):
            np.savez(tmp_path / "w.npz", **some)
            with pytest.raises(vpt_jax.CheckpointError, match=r"block_3|blocks\.3"):
                vpt_jax.load_backbone(tmp_path / "w.npz", num_heads=4)


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
    with pytest.raises(vpt_jax.CheckpointError, match="a Perception Encoder"):
        load(tmp_path, arrays, activation="gelu", readout="mean", norm="after")


@pytest.mark.parametrize("whose", ["big_vision", "timm", "transformers"])
def test_siglip(tmp_path, whose):
    flat = flat_vit(class_token=False, readout="map")
    arrays = {f"params/img/{n}": a for n, a in flat.items()}
    if whose != "big_vision":
        table = CLIP if whose == "transformers" else NAMES["timm"]
        arrays = pytorch(flat, table)
        pool = "head." if whose == "transformers" else "attn_pool."
        inside = {f"MAPHead_0/{ATTENTION}/out": "proj", "MAPHead_0/LayerNorm_0": "norm"}
        inside |= {f"MAPHead_0/MlpBlock_0/Dense_{i}": f"mlp.fc{i + 1}" for i in (0, 1)}
        inside |= {f"MAPHead_0/{ATTENTION}/{n}": n for n in PARTS}
        parts = {}
        for name, array in flat.items():
            place, _, leaf = name.rpartition("/")
            if place in inside:
                array = one_axis(array) if ATTENTION in name else array.T
                leaf = "bias" if leaf == "bias" else "weight"
                parts[inside[place], leaf] = array
        for leaf in ("weight", "bias"):
            q, k, v = (parts.pop((n, leaf)) for n in PARTS)
            if whose == "timm":
                arrays[f"{pool}q.{leaf}"] = q
                arrays[f"{pool}kv.{leaf}"] = np.concatenate([k, v])
            else:
                arrays[f"{pool}attention.in_proj_{leaf}"] = np.concatenate([q, k, v])
        own = {"proj": "attention.out_proj", "norm": "layernorm"}
        own = own if whose == "transformers" else {}
        arrays |= {f"{pool}{own.get(n, n)}.{leaf}": a for (n, leaf), a in parts.items()}
        probe = "probe" if whose == "transformers" else "latent"
        arrays[f"{pool}{probe}"] = flat["MAPHead_0/probe"]
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
    with pytest.raises(vpt_jax.CheckpointError, match="a Perception Encoder"):
        load(tmp_path, arrays, activation="gelu")


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
        if name.startswith("embedding/"):
            arrays[f"{tokens}/{name}"] = array
        if name.startswith("Transformer/encoder_norm/"):
            arrays[name.replace("Transformer", "encoder")] = array
        if "encoderblock" not in name:
            continue
        name = name.replace("Transformer", "encoder/transformer")
        if gated and "MlpBlock_0" in name:
            own = name.replace("MlpBlock_0", "FFNSwiGluFused_0")
            if "Dense_1" in name:
                arrays[own.replace("Dense_1", "Dense_2")] = array
                continue
            first, second = np.split(array, 2, axis=-1)
            arrays |= {own: first, own.replace("Dense_0", "Dense_1"): second}
        else:
            arrays[name] = array
    file = tmp_path / "tips_v2_b14_vision.npz"
    np.savez(file, **arrays)
    model, backbone = vpt_jax.load_backbone(file, num_heads=4)
    assert (model.registers, model.layer_scale, model.swiglu) == (1, False, gated)
    assert (model.activation, model.readout) == ("gelu_tanh", "cls")
    assert_same(backbone, flat)
    np.savez(file, **arrays | {f"{tokens}/cls": flat["cls"][:, :, :5]})
    with pytest.raises(vpt_jax.CheckpointError, match=r"/cls has shape \(1, 1, 5\)"):
        vpt_jax.load_backbone(file, num_heads=4)


@pytest.mark.parametrize(("token", "num"), [("dist_token", 1), ("reg_token", 3)])
@pytest.mark.parametrize("class_token", [True, False])
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
    with pytest.raises(vpt_jax.CheckpointError, match=r"all proportions \(NaFlex\)"):
        load(tmp_path, arrays)


def test_a_table_without_a_row_for_the_class_token_gets_zeros(flat, tmp_path):
    arrays = pytorch(flat, NAMES["timm"])
    arrays["pos_embed"] = arrays["pos_embed"][:, 1:]
    model, backbone = load(tmp_path, arrays)
    table = backbone["Transformer"]["posembed_input"]["pos_embedding"]
    assert float(jnp.abs(table[:, 0]).max()) == 0
    np.testing.assert_array_equal(table[:, 1:], arrays["pos_embed"])


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("place", ["pos_embedding", "Transformer/pos_embedding"])
def test_big_visions_names(flat, tmp_path, scan, place):
    arrays = {n: a for n, a in flat.items() if n != "cls"}
    table = arrays.pop("Transformer/posembed_input/pos_embedding")
    arrays[place] = table[:, 1:]
    if scan:
        blocks = [
            {
                n.partition(f"_{i}/")[2]: a
                for n, a in arrays.items()
                if f"block_{i}/" in n
            }
            for i in range(6)
        ]
        arrays = {n: a for n, a in arrays.items() if "encoderblock" not in n}
        for n in blocks[0]:
            stacked = np.stack([b[n] for b in blocks])
            arrays[f"Transformer/encoderblock/{n}"] = stacked
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
    with pytest.raises(vpt_jax.CheckpointError, match=f"missing {place}"):
        load(tmp_path, arrays)
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
    assert (float(norm["scale"].min()), float(norm["scale"].max())) == (1.0, 1.0)
    assert float(jnp.abs(norm["bias"]).max()) == 0
    # The class token is a token: there it is used, wherever the norm stands.
    model, backbone = load(tmp_path, timm, readout="cls", norm="after")
    assert_same(backbone, flat)
    # One that was trained after pooling is.
    pooled = {
        n.replace("norm.", "fc_norm.", n.startswith("norm.")): a
        for n, a in timm.items()
    }
    model, backbone = load(tmp_path, pooled)
    assert (model.readout, model.norm) == ("mean", "after")
    assert_same(backbone, flat)


@pytest.fixture(scope="module")
def flat_swin():
    return random_parameters(vpt_jax.Swin("T"))


SWIN = {"patch_embed": "patch_embed.proj", "patch_norm": "patch_embed.norm"}
SWIN["norm"] = "norm"


def swin_names(flat, late):
    """Names of timm (`late`: merging starts a stage) or of the original code."""
    result = {}
    for name, a in flat.items():
        parts = name.split("/")
        leaf = {"kernel": "weight", "scale": "weight"}.get(parts[-1], parts[-1])
        if parts[0] in SWIN:
            result[f"{SWIN[parts[0]]}.{leaf}"] = oihw(a)
        elif parts[0].startswith("merging"):
            stage = int(parts[0][-1]) + late
            result[f"layers.{stage}.downsample.{parts[1]}.{leaf}"] = a.T
        else:
            _, stage, block = parts[0].split("_")
            here = f"layers.{stage}.blocks.{block}"
            if parts[-2] == "query":
                three = [flat[name.replace("query", n)] for n in PARTS]
                rows = [
                    x.reshape(len(a), -1).T if x.ndim == 3 else x.ravel() for x in three
                ]
                result[f"{here}.attn.qkv.{leaf}"] = np.concatenate(rows)
            elif parts[-2] == "out":
                a = a.reshape(a.shape[-1], -1).T if a.ndim == 3 else a
                result[f"{here}.attn.proj.{leaf}"] = a
            elif parts[-1] == "relative_position_bias_table":
                result[f"{here}.attn.relative_position_bias_table"] = a
            elif parts[-2] not in PARTS:
                result[f"{here}.{NAMES['timm'][parts[-2]]}.{leaf}"] = a.T
    return result


@pytest.mark.parametrize("late", [True, False])
def test_swin(flat_swin, tmp_path, late):
    arrays = swin_names(flat_swin, late)
    arrays["layers.0.blocks.1.attn_mask"] = np.zeros((64, 49, 49))
    arrays["layers.0.blocks.1.attn.relative_position_index"] = np.zeros((49, 49))
    arrays["head.weight"] = np.zeros((10, 768))
    model, backbone = load(tmp_path, arrays, "Swin-T", readout="mean_with_prompts")
    assert (model.window, model.image_size) == (7, 224)
    assert model.readout == "mean_with_prompts"
    assert_same(backbone, flat_swin)


def test_swin_on_pictures_smaller_than_its_window(tmp_path):
    """Patches at the same distance keep their bias in the one smaller window."""
    sizes = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
    flat = random_parameters(vpt_jax.Swin(**sizes, window=8, image_size=256))
    small, backbone = load(tmp_path, swin_names(flat, True), "Swin-T", image_size=128)
    assert (small.window, small.image_size) == (8, 128)
    table = "attention/relative_position_bias_table"
    loaded = flatten(backbone)
    np.testing.assert_array_equal(
        loaded[f"blocks_0_0/{table}"], flat[f"blocks_0_0/{table}"]
    )
    whole, part = flat[f"blocks_3_1/{table}"], loaded[f"blocks_3_1/{table}"]
    assert (whole.shape, part.shape) == ((225, 24), (49, 24))
    for down in range(-3, 4):
        for right in range(-3, 4):
            np.testing.assert_array_equal(
                part[(down + 3) * 7 + right + 3], whole[(down + 7) * 15 + right + 7]
            )


def test_wrong_variants_say_what_the_file_is(flat, flat_swin, tmp_path):
    timm = pytorch(flat, NAMES["timm"])
    for variant, arrays, message in [
        ("B/16", timm, "holds a 'demo/16', not 'B/16'"),
        ("demo/8", timm, "holds a 'demo/16', not 'demo/8'"),
        ("Swin-T", timm, "holds a 'demo/16', not 'Swin-T'"),
        ("B/16", swin_names(flat_swin, True), "holds a 'Swin-T' with window 7"),
        ("Swin-S", swin_names(flat_swin, True), "holds a 'Swin-T' with window 7"),
        (
            "B/16",
            {n: a for n, a in timm.items() if "s.5." not in n},
            "depth 5.*none of",
        ),
        ("B/33x", timm, "unknown variant 'B/33x'"),
        ("Swin-X", timm, "unknown variant 'Swin-X'"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(tmp_path, arrays, variant)


def test_what_does_not_fit_is_named(flat, tmp_path):
    timm = pytorch(flat, NAMES["timm"])
    fused = timm["blocks.2.attn.qkv.weight"]
    three = timm["pos_embed"][:, :3]
    for change, options, message in [
        ({"norm.bias": None}, {}, "missing Transformer/encoder_norm/bias"),
        ({"blocks.0.extra.weight": fused}, {}, "unused blocks.0.extra.weight"),
        (
            {"blocks.2.attn.qkv.weight": fused[1:]},
            {},
            "unused blocks.2.attn.qkv.weight",
        ),
        (
            {"norm.bias": fused[0, :5]},
            {},
            r"norm.bias has shape \(5,\), expected \(128,",
        ),
        ({"norm.bias": fused[0][None]}, {}, r"norm.bias has shape \(1, 128\)"),
        ({"pos_embed": three}, {}, "expected .1, n . n, d. or .1, 1"),
        ({"cls_token": None}, {}, "the file has no class token"),
        ({"fc_norm.bias": fused[0]}, {}, "twice, as norm.bias and fc_norm.bias"),
        ({}, {"skip": ("nrom",)}, "skip names 'nrom', which is neither"),
        (
            {f"a.{n}": a for n, a in timm.items()},
            {},
            "holds 2 networks, below '', 'a.'",
        ),
        (dict.fromkeys(timm) | {"x": fused}, {}, "holds no ViT or Swin.*1 arrays: x"),
    ]:
        arrays = {n: a for n, a in (timm | change).items() if a is not None}
        with pytest.raises(vpt_jax.CheckpointError, match=message):
            load(tmp_path, arrays, **options)


def test_only_what_is_no_part_of_the_features_can_be_skipped(flat, tmp_path):
    timm = pytorch(flat, NAMES["timm"])
    more = timm | {"my_head.weight": np.zeros((3, 128)), "fc_norm.bias": np.zeros(128)}
    with pytest.raises(vpt_jax.CheckpointError, match="twice, as norm.bias and fc_no"):
        load(tmp_path, more)
    with pytest.raises(
        vpt_jax.CheckpointError, match=r"unused my_head.weight\. .*skip="
    ):
        load(tmp_path, more, skip=("fc_norm",))
    _, backbone = load(tmp_path, more, skip=("fc_norm", "my_head"))
    assert_same(backbone, flat)
    more["blocks.0.extra.weight"] = more.pop("my_head.weight")
    with pytest.raises(vpt_jax.CheckpointError) as error:
        load(tmp_path, more, skip=("fc_norm",))
    assert "unused blocks.0.extra.weight" in str(error.value)
    assert "skip" not in str(error.value)
    for skip in ("extra", "encoder_norm", "embedding/bias", "patch_embed.proj.bias"):
        with pytest.raises(vpt_jax.CheckpointError, match="function needs|missing emb"):
            load(tmp_path, more, skip=("fc_norm", "extra", skip))


def test_other_dtypes_in_file_and_out(flat, tmp_path):
    half = {n: a.astype(np.float16) for n, a in flat.items()}
    _, backbone = load(tmp_path, half)
    assert_same(backbone, {n: a.astype(np.float32) for n, a in half.items()})
    _, backbone = load(tmp_path, flat, param_dtype=jnp.bfloat16, image_size=64)
    assert {x.dtype for x in jax.tree.leaves(backbone)} == {jnp.dtype(jnp.bfloat16)}


KNOWN = """
a/vit-s-300ep.pth.tar                                                   | MoCo
0123456789abcdef-vit-b-300ep.pth                                        | MoCo
mocov3_linear-vit-b-300ep.pth.tar                                       | MoCo
models--timm--vit_base_patch16_224.mae/snapshots/25/model.safetensors   | MAE
/c/models--facebook--vit-mae-base/snapshots/25/w/model.safetensors      | MAE
vit-mae-large/pytorch_model.bin                                         | MAE
https://huggingface.co/facebook/vit-mae-base/resolve/main/w.safetensors | MAE
mae_pretrain_vit_base.pth                                               | MAE
google--vit-base-patch16-224-in21k/model.safetensors    | ViT, ImageNet-21k (orig
gs://vit_models/imagenet21k/ViT-B_16.npz                | ViT, ImageNet-21k (orig
imagenet21k_ViT-B_16.npz                                | ViT, ImageNet-21k (orig
a/B_16-i21k-300ep-lr_0.001-aug_medium1.npz              | ViT, ImageNet-21k (Aug
hf://timm/vit_base_patch16_224.augreg_in21k@main/x.bin  | ViT, ImageNet-21k (Aug
swin-tiny-patch4-window7-224/model.safetensors          | Swin
swin_base_patch4_window7_224_22k.pth                    | Swin
vit_small_patch16_224.dino/model.safetensors            | DINO,
dinov2_vits14_reg4_pretrain.pth                         | DINOv2 with
hf://facebook/dinov2-base/model.safetensors             | DINOv2,
deit_small_patch16_224-cd65a155.pth                     | DeiT
deit_small_distilled_patch16_224-649709d9.pth           | DeiT
"""

# A path, the beginning of its row's name, and facts of its card.
NEW = """
siglip2_b16_224.npz | SigLIP | half map gelu_tanh
webli_en_b16_224_63724782.npz | SigLIP | half map gelu_tanh
hf://google/siglip2-so400m-patch14-384/model.safetensors | SigLIP | half map gelu_tanh
timm/vit_base_patch16_siglip_224.v2_webli/model.safetensors | SigLIP | half map gelu
timm/vit_base_patch32_siglip_256.v2_webli/x.bin | SigLIP | half map gelu_tanh
timm/vit_large_patch16_siglip_512.v2_webli/x.bin | SigLIP | half map gelu_tanh
dinov3_vits16_pretrain_lvd1689m-08c60483.pth | DINOv3 | imagenet cls 1e-05
hf://facebook/dinov3-vith16plus-pretrain-lvd1689m/model.safetensors | DINOv3 | cls 1e-05
vit_small_patch16_dinov3.lvd1689m/model.safetensors | DINOv3 | imagenet cls 1e-05
vit_7b_patch16_dinov3.sat493m/model.safetensors |  | gelu
vit_base_patch16_clip_224.openai/open_clip_model.safetensors | CLIP | clip quick_gelu
vit_base_patch16_clip_224.openai_ft_in1k/model.safetensors |  | gelu
vit_base_patch16_clip_224.metaclip_400m/model.safetensors |  | quick_gelu
vit_large_patch14_clip_224.dfn2b_s39b/model.safetensors |  | gelu
hf://openai/clip-vit-large-patch14/model.safetensors | CLIP | clip quick_gelu 1e-05
vit_base_patch32_clip_224.laion2b/model.safetensors | OpenCLIP | clip gelu 1e-05
vit_large_patch14_clip_224.laion2b/model.safetensors |  | gelu
hf://laion/CLIP-ViT-B-32-laion2B-s34B-b79K/model.safetensors | OpenCLIP | clip gelu
hf://google/tipsv2-b14/model.safetensors | TIPSv2 | none cls half_pixel_antialias
vit_base_patch14_reg1_tipsv2.webli/model.safetensors | TIPSv2 | none bicubic_antialias
gs://tips_data/v2_0/scenic/tips_v2_so14_vision.npz | TIPSv2 | none gelu_tanh
tips_v2_oss_g14_vision.npz | TIPSv2 (Google's PyTorch | none half_pixel_antialias
hf://microsoft/swin-tiny-patch4-window7-224/model.safetensors | Swin | Apache-2.0
"""


@pytest.mark.parametrize("line", NEW.strip().splitlines())
def test_known_files_of_newer_families(line):
    path, start, facts = (part.strip() for part in line.split("|"))
    known = known_backbone(path)
    assert (known.name if known else "").startswith(start) and bool(known) == bool(
        start
    )
    told = architecture(path) | (known.card() if known else {})
    assert set(facts.split()) <= set(map(str, told.values()))


@pytest.mark.parametrize("line", KNOWN.strip().splitlines())
def test_known_files(line):
    path, start = (part.strip() for part in line.split("|"))
    known = known_backbone(path)
    assert known is not None and known.name.startswith(start)
    half, mean = start.startswith("ViT"), start in ("MAE", "Swin")
    assert known.normalisation == ("half" if half else "imagenet")
    assert known.readout == ("mean_with_prompts" if mean else "cls")
    assert known.card()["normalisation"] == known.normalisation
    assert known.card().get("num_heads") == (12 if start == "MoCo" else None)


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("dinov2_vits14_pretrain.pth", "bicubic_offset"),
        ("hf://facebook/dinov2-small/model.safetensors", "bicubic"),
        ("models--facebook--dinov2-base/snapshots/1/model.safetensors", "bicubic"),
        ("vit_small_patch14_dinov2.lvd142m/model.safetensors", "bicubic_antialias"),
        ("dinov2_vits14_reg4_pretrain.pth", "bicubic_antialias"),
        ("facebook/dinov2-with-registers-small/x", "bicubic_antialias"),
    ],
)
def test_every_project_resizes_dinov2s_table_in_its_own_way(path, rule):
    known = known_backbone(path)
    assert known is not None and known.resize == rule


def test_the_table_of_backbones_is_consistent():
    assert known_backbone("mae_pretrain_vit_base.pth/mine.npz") is not None
    assert known_backbone("mae_pretrain_vit_base.pth/run/mine.npz") is None
    assert known_backbone("weights.npz") is None
    for row in BACKBONES:
        assert row.normalisation in NORMALISATIONS
        assert row.readout in READOUTS and row.norm in NORMS
        assert row.resize in ("", *RESIZES)


@pytest.mark.parametrize("kind", ["google", "timm", "Dinov2Model", "swin", "scan"])
def test_hostile_names_and_shapes_are_our_error(kind, flat_dinov2, flat_swin):
    """Whatever names and shapes a file claims: an error of ours, or a model."""
    arrays = {
        "google": lambda: flat_dinov2,
        "timm": lambda: pytorch(flat_dinov2, NAMES["timm"]),
        "Dinov2Model": lambda: pytorch(flat_dinov2, NAMES["Dinov2Model"]),
        "swin": lambda: swin_names(flat_swin, True),
        "scan": lambda: {
            "embedding/kernel": flat_dinov2["embedding/kernel"],
            "Transformer/encoderblock/LayerNorm_0/bias": np.zeros((6, 128)),
        },
    }[kind]()
    shapes = {name: a.shape for name, a in arrays.items()}
    wanted = vpt_jax.Swin("T") if kind == "swin" else vpt_jax.ViT("demo/16")
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


def test_the_docs_print_the_table():
    docs = Path(__file__).parents[2] / "docs" / "backbones.md"
    text = docs.read_text(encoding="utf-8")
    for row in BACKBONES:
        assert row.row() in text
