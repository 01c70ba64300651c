# SPDX-License-Identifier: Apache-2.0
"""What weights cannot say is told, said or asked; other networks have their names."""

import json
import logging
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_naming import NAMES, flat_vit, pytorch

import vpt_jax
from vpt_jax.models.variants import canonical
from vpt_jax.models.xla import ACTIVATIONS
from vpt_jax.weights import facts, torch_files
from vpt_jax.weights.families import FAMILIES, refuse_families
from vpt_jax.weights.naming import Entry, Named
from vpt_jax.weights.release import flatten


@pytest.fixture(scope="module")
def timm():
    """The demo's sizes by timm's names."""
    return pytorch(flat_vit(), NAMES["timm"])


def save(arrays, path, card=None):
    save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, path, card)
    return path


@pytest.fixture
def file(timm, tmp_path):
    (tmp_path / "mine").mkdir()
    return save(timm, tmp_path / "mine" / "w.pt")


def facts_of(path, **options):
    model, _ = vpt_jax.load_backbone("demo/16", path, **options)
    return model.num_heads, model.activation, model.epsilon


def refused(path, message, variant="demo/16", **options):
    with pytest.raises(vpt_jax.CheckpointError, match=message):
        vpt_jax.load_backbone(variant, path, **options)


def beside(file, name="config.json", **content):
    (file.parent / name).write_text(json.dumps(content))


VIT = {
    "model_type": "vit",
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-3,
}
TIMM = {
    "architecture": "vit_small_patch16_224",
    "model_args": {"num_heads": 2, "act_layer": "gelu_tanh", "embed_dim": 128},
    "pretrained_cfg": {"tag": "mine", "mean": [0.5] * 3, "std": [0.5] * 3},
}


# --- facts ----------------------------------------------------------------------------


def test_config_json_comes_before_the_table_and_the_caller_before_both(file):
    model, backbone = vpt_jax.load_backbone("demo/16", file)
    assert (model.num_heads, model.activation, model.epsilon) == (4, "gelu", 1e-6)
    beside(file, **VIT)
    told, same = vpt_jax.load_backbone("demo/16", file)
    facts = {"num_heads": 8, "activation": "quick_gelu", "epsilon": 1e-3}
    assert told == vpt_jax.ViT("demo/16", **facts)
    # The same numbers in the same order, in other heads.
    for a, b in zip(jax.tree.leaves(backbone), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(np.ravel(a), np.ravel(b))
    own = {"num_heads": 2, "activation": "gelu_tanh", "epsilon": 1e-4}
    assert facts_of(file, **own) == (2, "gelu_tanh", 1e-4)


def test_timms_config_names_the_family_and_the_normalisation(file):
    beside(file, **TIMM)
    card = vpt_jax.read_card(file)
    assert (card["num_heads"], card["activation"]) == (2, "gelu_tanh")
    assert card["normalisation"] == "half"
    mae = TIMM | {"pretrained_cfg": {"tag": "mae"}, "global_pool": "token"}
    beside(file, **mae)
    model, _ = vpt_jax.load_backbone("demo/16", file)
    assert (model.num_heads, model.readout) == (2, "mean_with_prompts")
    assert vpt_jax.read_card(file)["normalisation"] == "imagenet"  # the row's


def test_transformers_normalisation_lies_in_a_file_of_its_own(file):
    beside(file, **VIT)
    assert "normalisation" not in vpt_jax.read_card(file)
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    beside(file, "preprocessor_config.json", **imagenet)
    assert vpt_jax.read_card(file)["normalisation"] == "imagenet"
    beside(file, "preprocessor_config.json", do_normalize=False)
    assert vpt_jax.read_card(file)["normalisation"] == "none"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, r"width 64 \(the file has 128\).*Move it away"),
        ({"num_hidden_layers": 5}, r"depth 5 \(the file has 6\)"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'; expected one of gelu,"),
        ({"num_attention_heads": "8"}, "num_attention_heads '8'; expected a pos"),
        ({"num_attention_heads": 7}, "num_heads is 7, by the config.json beside it"),
        ({"layer_norm_eps": -1}, "layer_norm_eps -1; expected a positive"),
    ],
)
def test_a_config_that_is_not_the_files_is_an_error(file, change, message):
    beside(file, **VIT | change)
    with pytest.raises(ValueError, match=message):
        vpt_jax.load_backbone("demo/16", file)


def test_a_config_of_no_known_kind_counts_as_far_as_it_goes(file, caplog):
    own = {"num_attention_heads": 8}
    for content in (own, {"vision_config": own, "model_type": "somebodys"}):
        beside(file, **content)
        assert facts_of(file) == (8, "gelu", 1e-6)
    (said,) = {record.getMessage() for record in caplog.records}
    assert "nor a config.json says more; assumed activation=" in said
    assert "epsilon=" in said and "num_heads" not in said
    beside(file, num_heads=2, act_layer="quick_gelu", layer_norm_eps=1e-4)
    assert facts_of(file) == (2, "quick_gelu", 1e-4)
    beside(file, act_layer="relu")
    refused(file, "act_layer 'relu'; expected one")
    # One of something else tells nothing.
    beside(file, learning_rate=0.1, vision_config=7)
    assert vpt_jax.read_card(file) == {}


def test_a_variant_of_another_family_is_named():
    for name, family in (
        ("swinv2_tiny_window8_256", "a Swin V2"),
        ("google/siglip2-base-patch16-naflex", "a NaFlexViT"),
        ("facebook/PE-Core-B16-224", "a Perception Encoder"),
        ("vit_small_patch16_rope_224.naver_in1k", "a ViT with rotary positions"),
        ("microsoft/beit-base-patch16-224", "a BEiT"),
    ):
        message = rf"is {family}\b.* not supported.*Take "
        for args in ((name,), (name, "weights.safetensors"), ("B/16", name)):
            with pytest.raises(ValueError, match=message):
                vpt_jax.load_backbone(*args)


def test_a_broken_config_is_named(file):
    for text in ("{", "[1]", "[" * 200_000):
        (file.parent / "config.json").write_text(text)
        refused(file, "config.json lies beside")


def test_a_model_card_is_checked(timm, tmp_path):
    def with_card(**card):
        card = {"model_card": json.dumps(card)}
        return save(timm, tmp_path / "w.safetensors", card)

    for name, value in {"num_heads": "8", "activation": "relu", "epsilon": 2}.items():
        refused(with_card(**{name: value}), f"has {name} .* model card")
    # Its sizes do not count: they are in the arrays.
    assert facts_of(with_card(num_heads=8, depth=3)) == (8, "gelu", 1e-6)


def test_what_is_assumed_is_said_in_one_line(file, caplog):
    vpt_jax.load_backbone("demo/16", file, image_size=64)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith(
        "assumed num_heads=4, activation='gelu', epsilon=1e-06, readout='cls',"
        " norm='before', resize='corner_aligned'."
    )
    assert "\n" not in line and caplog.records[0].levelno == logging.WARNING
    caplog.clear()
    told = {"num_heads": 4, "activation": "gelu", "epsilon": 1e-6, "norm": "before"}
    vpt_jax.load_backbone("demo/16", file, readout="cls", **told)
    beside(file, **VIT)
    vpt_jax.load_backbone("demo/16", file)
    vpt_jax.load_backbone("demo/4")
    assert not caplog.records


def vit(**attributes):
    plain = {"width": 768, "class_token": True, "layer_scale": False}
    plain |= {"norm": "before", "readout": "", "pre_norm": False}
    return types.SimpleNamespace(**plain | attributes)


@pytest.mark.parametrize(
    ("model", "asked"),
    [
        (vit(), ()),
        (vit(width=384), ("num_heads",)),
        (vit(width=384, layer_scale=True), ()),
        (vit(width=384, norm="after"), ()),  # fine-tuned MAE
        (vit(class_token=False), ("num_heads", "activation")),
        (vit(class_token=False, width=1152), ("activation",)),
        (vit(class_token=False, readout="map"), ("activation",)),  # SigLIP
        (vit(pre_norm=True), ("activation",)),  # CLIP
    ],
)
def test_what_published_files_have_differently_is_asked_for(model, asked):
    entry = Entry("blocks.0.attn.qkv.weight", (), (), None, list)
    named = Named("vit", [entry], [], [], [])
    facts.ask(model, named, {"name": "known"}, {}, "w.pth")
    facts.ask(model, named, {}, {"num_heads": 6, "activation": "gelu"}, "w.pth")
    if asked:
        with pytest.raises(ValueError, match="; and ".join(f"{a}=.*" for a in asked)):
            facts.ask(model, named, {}, {}, "w.pth")
    else:
        facts.ask(model, named, {}, {}, "w.pth")
    # Google's and transformers' names: all that is published agrees.
    entry = entry._replace(source="encoder.layer.0.attention.attention.query.weight")
    named = named._replace(entries=[entry])
    if model.pre_norm:  # there too CLIP's activation is not known
        return
    facts.ask(model, named, {}, {}, "w.pth")


def test_which_of_several_networks_was_taken_is_said(timm, tmp_path, caplog):
    both = {f"module.base_encoder.{n}": a for n, a in timm.items()}
    both |= {f"module.momentum_encoder.{n}": a for n, a in timm.items()}
    vpt_jax.load_backbone("demo/16", save(both, tmp_path / "w.pt"))
    assert "took module.base_encoder, not its moving average;" in caplog.text
    storage = torch_files.Storage("0", np.dtype(np.float32), 1)
    tensor = torch_files.Tensor(storage, 0, (1,), (1,))
    state = {"a.weight": tensor}
    for value, said in [
        ({"state_dict": state, "state_dict_ema": state}, "'state_dict', not 'state_d"),
        ({"model_ema": state, "model": state, "epoch": 3}, "'model', not 'model_ema'"),
        ({"student": state, "teacher": state}, "'teacher', not 'student'"),
        ({"state_dict": state, "optimizer": {"state": {}, "step": tensor}}, ""),
        (state, ""),
    ]:
        tensors, networks = torch_files.state_dict(value)
        assert tensors == state and networks.startswith(said)
        assert bool(networks) == bool(said)


def test_gelu_tanh():
    """`tests/models` has the other activations."""
    x = np.linspace(-6, 6, 101)
    expected = x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2
    got = ACTIVATIONS["gelu_tanh"](jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


# --- families -------------------------------------------------------------------------

PLAIN = "patch_embed.proj.weight blocks.0.norm1.weight pos_embed cls_token"
REFUSED = f"""
{PLAIN} attn_pool.latent attn_pool.q_norm.weight  | another kind | siglip
params/img/MAPHead_0/probe params/img/MAPHead_1/probe | another kind | siglip
patch_embed.proj.weight blocks.0.gamma_1 reg_token | no DINOv3 | dinov3
patch_embed.proj.weight cls_token rope.freqs      | no DINOv3 | dinov3
{PLAIN} blocks.0.attn.q_bias blocks.0.gamma_1     | EVA | plain ViT
{PLAIN} blocks.0.attn.relative_position_bias_table | BEiT | MAE
{PLAIN} patch_embed.backbone.stem.conv.weight     | hybrid | plain ViT
conv_root/kernel embedding/kernel                 | hybrid | plain ViT
layers.0.blocks.0.attn.logit_scale                | Swin V2 | swin_base_patch4
base_model.model.blocks.0.attn.qkv.lora_A.weight  | LoRA | merge_and_unload
blocks.0.attn.qkv.weight_scale                    | quantised | before the quantisation
stages.0.blocks.0.norm1.weight stem.conv.weight   | hierarch | plain
{PLAIN} blocks.0.attn.q_norm.weight               | normalised queries | plain ViT
{PLAIN} neck.0.weight blocks.0.attn.rel_pos_h     | SAM | plain ViT
vision_model.encoder.layers.0.self_attn.qkv.weight x | BLIP | plain ViT
conv_proj.weight encoder.layers.encoder_layer_0.ln_1.weight | ViT of torchvision | plain
features.0.0.weight features.1.0.attn.qkv.weight  | Swin of torchvision | swin_base
"""


@pytest.mark.parametrize("line", REFUSED.strip().splitlines())
def test_other_families_are_refused_by_name(line):
    names, family, instead = (part.strip() for part in line.split("|"))
    with pytest.raises(vpt_jax.CheckpointError) as error:
        refuse_families(names.split(), "w.pth")
    text = str(error.value)
    assert text.startswith("w.pth holds a") and "which is not supported: it has" in text
    assert family in text.partition(",")[0] and instead in text
    assert "skip" not in text and "\n" not in text


def test_every_family_says_what_to_take():
    for family in FAMILIES:
        assert family.name.startswith(("a ", "an ")) and family.instead and family.why


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        (r"blocks.*\.norm\d\.bias", "norms have no bias"),
        (r".*\.attn\.qkv\.bias", "without a bias of queries"),
        (r"norm\.", "without a final norm"),
    ],
)
def test_vits_that_lack_something_are_refused_by_name(timm, tmp_path, lacks, message):
    arrays = {n: a for n, a in timm.items() if not re.match(lacks, n)}
    path = save(arrays, tmp_path / "w.pt")
    for variant in ("demo/16", "B/16"):  # before sizes are compared
        refused(path, message, variant)


# --- values ---------------------------------------------------------------------------


def test_values_that_are_no_numbers_are_refused_by_the_arrays_name(timm, tmp_path):
    name = "blocks.3.mlp.fc1.bias"
    for value in (np.nan, -np.inf, 1e300):  # the last one is none in float32
        bias = timm[name].astype(np.float64)
        bias[5] = value
        path = save(timm | {name: bias}, tmp_path / "w.pt")
        refused(path, f"{name} with 1 of 512 values that are NaN")
    # What is not loaded is not looked at.
    path = save(timm | {"head.weight": np.full((3, 128), np.nan)}, tmp_path / "w.pt")
    vpt_jax.load_backbone("demo/16", path)


def test_values_beyond_a_dtype_are_told_from_diverged_ones(timm, tmp_path):
    large = timm | {"norm.weight": np.full(128, 1e6, np.float32)}
    path = save(large, tmp_path / "w.pt")
    refused(path, "beyond what float16 holds", param_dtype=jnp.float16)
    vpt_jax.load_backbone("demo/16", path)


def test_whole_numbers_are_no_weights(timm, tmp_path):
    name = "blocks.0.attn.qkv.weight"
    path = save(timm | {name: timm[name].astype(np.int8)}, tmp_path / "w.pt")
    refused(path, f"quantised.*{name}")


def test_facts_that_no_network_has_are_refused(file):
    for name, value in [("epsilon", -1.0), ("epsilon", 2.0), ("num_heads", -2)]:
        with pytest.raises(ValueError, match=f"{name} is .*; expected a"):
            vpt_jax.load_backbone("demo/16", file, **{name: value})


# --- shards, paths, variants ----------------------------------------------------------


@pytest.fixture
def shards(timm, tmp_path):
    names = sorted(timm)
    parts, weight_map = (names[::2], names[1::2]), {}
    for i, part in enumerate(parts, start=1):
        name = f"model-{i:05d}-of-00002.safetensors"
        save({n: timm[n] for n in part}, tmp_path / name)
        weight_map |= dict.fromkeys(part, name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def test_shards_are_one_file(file, shards):
    _, expected = vpt_jax.load_backbone("demo/16", file)
    first, second, index = sorted(shards.glob("model*"))
    for path in (first, index):
        _, backbone = vpt_jax.load_backbone("demo/16", path)
        jax.tree.map(np.testing.assert_array_equal, backbone, expected)
    assert vpt_jax.read_card(index) == {}
    second.unlink()
    refused(first, "no such file: .*-00002-of-00002")


def test_hostile_shards(shards):
    first, second, index = sorted(shards.glob("model*"))
    second.write_bytes(first.read_bytes())
    refused(first, "and in another shard")
    for content in (
        {"weight_map": {"a": "../model-00001-of-00002.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": 3, "b": "x"}},
        {"weight_map": {}},
        [1],
    ):
        index.write_text(json.dumps(content))
        refused(index, "no index of shards|folders")


def test_the_path_alone(timm, file, tmp_path):
    # README's, of another size.
    np.savez(tmp_path / "ViT-B_16.npz", **flat_vit())
    model, backbone = vpt_jax.load_backbone(str(tmp_path / "ViT-B_16.npz"))
    assert (model.variant, model.image_size) == ("demo/16", 32)
    assert flatten(backbone).keys() == flat_vit().keys()
    named, same = vpt_jax.load_backbone(tmp_path / "ViT-B_16.npz")
    assert named == model
    jax.tree.map(np.testing.assert_array_equal, backbone, same)
    # A size that is none of ours: heads are what is missing.
    save({n: a for n, a in timm.items() if "s.5." not in n}, file)
    with pytest.raises(vpt_jax.CheckpointError, match=r"depth 5.*pass num_heads="):
        vpt_jax.load_backbone(file)
    model, _ = vpt_jax.load_backbone(file, num_heads=2)
    assert (model.depth, model.num_heads, model.width) == (5, 2, 128)


def test_one_name_to_skip_may_be_a_text():
    with pytest.raises(vpt_jax.CheckpointError, match="skip names 'my_head', which is"):
        vpt_jax.load_backbone("demo/4", skip="my_head")


# `test_published` has the names of published files.
OTHERS = """
S/16: facebook/dino-vits16 vit_small_patch16_224
B/16: ViT-B/16 B16 b/16 vitb16 deit_base_distilled_patch16_224
L/32: ViT-L_32
B/32: laion/CLIP-ViT-B-32-laion2B-s34B-b79K
S/14: dinov2_vits14
H+/16: dinov3_vith16plus_pretrain_lvd1689m vit_huge_plus_patch16_dinov3_qkvb
7B/16: facebook/dinov3-vit7b16-pretrain-lvd1689m vit_7b_patch16_dinov3
So400m/14: google/siglip2-so400m-patch14-384
Swin-T: swin-t
"""


@pytest.mark.parametrize("line", OTHERS.strip().splitlines())
def test_other_peoples_names_of_variants_are_understood(line):
    variant, names = line.split(": ")
    kind = vpt_jax.Swin if variant.startswith("Swin") else vpt_jax.ViT
    for name in names.split():
        assert canonical(name) == variant == canonical(variant)
        assert kind(name) == kind(variant)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("B/16s", "B/16"),
        ("G/14", "g/14"),
        ("Swin-BB", "Swin-B"),
        ("vit_smal_patch16_224", "vit_small_patch16_224"),
    ],
)
def test_a_misspelt_variant(name, meant):
    message = f"unknown variant '{name}'; did you mean '{meant}'"
    with pytest.raises(ValueError, match=message):
        vpt_jax.load_backbone(name, "w.npz")
    # timm's giant is another size than DINOv2's: not guessed.
    assert canonical("vit_giant_patch14_224") == "vit_giant_patch14_224"


def test_a_missing_checkpoint_says_where_to_get_it():
    for args, places in [
        (("B/16",), ("imagenet21k/ViT-B_16.npz", "backbone.checkpoint=")),
        (("vit_base_patch16_224",), ("no checkpoint given for 'B/16'",)),
        (("B/16", "a/ViT-B_16.npz"), ("no such file: a/ViT-B_16.npz", "gs://vit_mod")),
        (("a/mae_pretrain_vit_base.pth",), ("https://dl.fbaipublicfiles.com/mae/",)),
        (("S/14", "mine.pth"), ("hf://facebook/dinov2-small", "docs/backbones.md")),
    ]:
        with pytest.raises(ValueError) as error:
            vpt_jax.load_backbone(*args)
        text = str(error.value)
        assert all(place in text for place in places) and "\n" not in text, text
        assert "\\n" not in text
