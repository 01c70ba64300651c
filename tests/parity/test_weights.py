# SPDX-License-Identifier: Apache-2.0
"""Files that once loaded as another function: the right one now, or refused by name.

References are the models of the projects that publish such files; what they have that
weights cannot say is written here.
"""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import transformers
from test_pytorch import assert_same, noisy, ours, pictures, save, to_jax

import vpt_jax

SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "intermediate_size": 1536}
TINY = {"hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 192}


def loaded(path, images, **options):
    """The model of the file and its features, where the path stands alone."""
    model, backbone = vpt_jax.load_backbone(path, **options)
    return model, model.apply({"params": backbone}, to_jax(images))[0]


def plain(**options):
    sizes = {"patch_size": 16, "embed_dim": 96, "depth": 2, "num_heads": 3}
    sizes |= {"num_classes": 0, **options}
    return noisy(timm.models.vision_transformer.VisionTransformer(**sizes))


def small_with_12_heads():
    """As moco-v3's vits.py has it: 12 heads at width 384."""
    return plain(embed_dim=384, depth=12, num_heads=12)


def test_a_small_vit_with_12_heads(tmp_path):
    net, images = small_with_12_heads(), pictures(224)
    state = {f"module.{n}": t for n, t in net.state_dict().items()}
    path = save(state, tmp_path / "vit-s-300ep.pth.tar", "state_dict")
    model, features = ours("S/16", path, images)
    assert model.num_heads == 12
    assert_same(features, net(images))
    # Under a name that tells nothing it is asked for.
    path = path.rename(tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"pass num_heads=6 .* or 12 \(MoCo v3\)"):
        vpt_jax.load_backbone("S/16", path)
    assert_same(ours("S/16", path, images, num_heads=12)[1], net(images))


def test_one_mae_under_two_paths(tmp_path):
    small = {**SMALL, "num_attention_heads": 6, "decoder_hidden_size": 64}
    small |= {"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = transformers.ViTMAEConfig(**small, decoder_intermediate_size=64)
    noisy(transformers.ViTMAEForPreTraining(config)).save_pretrained(tmp_path / "mae")
    images, found = pictures(224), []
    for place in (
        "vit_small_patch16_224.mae",
        "models--facebook--vit-mae-base/snapshots/25ecba7",
    ):
        path = tmp_path / place / "model.safetensors"
        path.parent.mkdir(parents=True)
        shutil.copy(tmp_path / "mae" / "model.safetensors", path)
        model, features = ours("S/16", path, images)
        assert (model.readout, model.norm) == ("mean_with_prompts", "after")
        found.append(features)
    # Of its own config.json, the same.
    model, features = ours("S/16", tmp_path / "mae" / "model.safetensors", images)
    assert (model.readout, model.norm) == ("mean_with_prompts", "after")
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(features, found[0], atol=1e-4)  # epsilon 1e-12


def test_transformers_config_says_how_many_heads(tmp_path):
    config = transformers.ViTConfig(**SMALL, num_attention_heads=12)
    net = noisy(transformers.ViTModel(config, add_pooling_layer=False))
    net.save_pretrained(tmp_path)
    images = pictures(224)
    model, features = ours("S/16", tmp_path / "model.safetensors", images)
    assert model.num_heads == 12
    assert_same(features, net(images).last_hidden_state[:, 0])


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu"])
@pytest.mark.parametrize("kind", ["ViT", "Dinov2"])
def test_transformers_config_says_activation_and_epsilon(kind, act, tmp_path):
    sizes = {**TINY, "mlp_ratio": 2} if kind == "Dinov2" else TINY
    config = getattr(transformers, f"{kind}Config")(
        **sizes,
        num_attention_heads=4,
        hidden_act=act,
        layer_norm_eps=1e-2,
        image_size=224,
        patch_size=16,
    )
    net = noisy(getattr(transformers, f"{kind}Model")(config))
    net.save_pretrained(tmp_path)
    images = pictures(224)
    model, features = loaded(tmp_path / "model.safetensors", images)
    assert (model.num_heads, model.epsilon) == (4, 1e-2)
    assert_same(features, net(images).last_hidden_state[:, 0])


@pytest.mark.parametrize("act", ["gelu_tanh", "quick_gelu"])
def test_timms_config_says_heads_and_activation(act, tmp_path):
    net, images = plain(num_heads=6, act_layer=act), pictures(224)
    path = save(net.state_dict(), tmp_path / "hub" / "model.safetensors")
    args = {"embed_dim": 96, "depth": 2, "num_heads": 6, "act_layer": act}
    content = {"architecture": "vit_small_patch16_224", "model_args": args}
    content["pretrained_cfg"] = {"tag": "mine", "mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(content))
    model, features = loaded(path, images)
    assert (model.num_heads, model.activation) == (6, act)
    assert_same(features, net(images))
    assert vpt_jax.read_card(path)["normalisation"] == "half"


@pytest.mark.parametrize(
    ("name", "variant", "family"),
    [
        ("vit_pe_core_tiny_patch16_384", "Ti/16", "Perception Encoder"),
        ("beit_base_patch16_224", "B/16", "BEiT"),
        ("vit_small_r26_s32_224", "S/16", "hybrid"),
        ("swinv2_tiny_window8_256", "Swin-T", "Swin V2"),
        ("vit_base_patch16_rpn_224", "B/16", "without a bias of queries"),
    ],
)
def test_timms_other_families(name, variant, family, tmp_path):
    net = timm.create_model(name, num_classes=0)
    path = save(net.state_dict(), tmp_path / "mine.safetensors")
    for first in (variant, "Ti/16"):  # the family comes before the sizes
        with pytest.raises(vpt_jax.CheckpointError) as error:
            vpt_jax.load_backbone(first, path)
        text = str(error.value)
        assert family in text and "which is not supported" in text and "Take " in text
        assert "skip" not in text
    # Nor does it load in part.
    for skip in (("norm_pre", "embedding/bias"), ("attn_pool",), ("dist_token",)):
        with pytest.raises(vpt_jax.CheckpointError, match=family):
            vpt_jax.load_backbone(variant, path, skip=skip)


SIZES = {**TINY, "num_attention_heads": 4}
OTHERS = {
    "Beit": (SIZES, "BEiT"),
    "Data2VecVision": (SIZES, "Data2Vec"),
    "Swinv2": ({"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4]}, "Swin V2"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_transformers_other_families(kind, tmp_path):
    sizes, family = OTHERS[kind]
    config = getattr(transformers, f"{kind}Config")(**sizes)
    net = getattr(transformers, f"{kind}Model")(config)
    net.save_pretrained(tmp_path / "saved")
    in_memory = save(net.state_dict(), tmp_path / "mine.safetensors")
    for path in (tmp_path / "saved" / "model.safetensors", in_memory):
        with pytest.raises(vpt_jax.CheckpointError) as error:
            vpt_jax.load_backbone("S/16", path)
        assert family in str(error.value) and "skip" not in str(error.value)


@pytest.mark.parametrize("names", ["saved", "in memory"])
def test_transformers_swin(names, tmp_path):
    net = noisy(transformers.SwinModel(transformers.SwinConfig()))
    net.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    if names == "in memory":
        path = save(net.state_dict(), tmp_path / "memory" / "pytorch_model.bin")
    images = pictures(224, 1)
    _, features = ours("Swin-T", path, images)
    with torch.no_grad():
        assert_same(features, net(images).pooler_output)


def test_shards(tmp_path):
    config = transformers.ViTConfig(**SMALL, num_attention_heads=6)
    net = noisy(transformers.ViTModel(config, add_pooling_layer=False))
    net.save_pretrained(tmp_path, max_shard_size="40MB")
    images = pictures(224)
    expected = net(images).last_hidden_state[:, 0]
    names = sorted(p.name for p in tmp_path.glob("model*"))
    assert len(names) > 2
    for name in names:
        assert_same(ours("S/16", tmp_path / name, images)[1], expected)


def test_a_backbone_with_nan(tmp_path):
    state = timm.create_model("vit_small_patch16_224", num_classes=0).state_dict()
    state["blocks.3.mlp.fc1.bias"][5] = float("nan")
    path = save(state, tmp_path / "nan.safetensors")
    with pytest.raises(
        vpt_jax.CheckpointError, match=r"blocks\.3\.mlp\.fc1\.bias with 1"
    ):
        vpt_jax.load_backbone("S/16", path)


def test_a_network_and_its_average(tmp_path, caplog):
    net, images = plain(), pictures(224)
    state = net.state_dict()
    average = {n: 0.9 * t for n, t in state.items()}
    torch.save({"state_dict_ema": average, "state_dict": state}, tmp_path / "w.pth")
    _, features = loaded(tmp_path / "w.pth", images, num_heads=3)
    assert "took 'state_dict', not 'state_dict_ema'" in caplog.text
    assert_same(features, net(images))


@pytest.mark.parametrize("heads", [12, 16])
def test_a_vit_without_a_class_token_is_asked_for_its_heads(heads, tmp_path):
    """SigLIP's without its pooling has 12, `vit_base_patch16_gap_224` 16."""
    sizes = {"embed_dim": 768, "depth": 12, "num_heads": heads, "class_token": False}
    net = plain(**sizes, global_pool="avg", fc_norm=False)
    images = pictures(224, 1)
    path = save(net.state_dict(), tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match=r"pass num_heads=12 .* or 16 .*activation="):
        vpt_jax.load_backbone("B/16", path)
    told = {"num_heads": heads, "activation": "gelu"}
    assert_same(ours("B/16", path, images, **told)[1], net(images))
    name = {12: "vit_base_patch16_siglip_gap_224", 16: "vit_base_patch16_gap_224"}[
        heads
    ]
    path = path.rename(tmp_path / f"{name}.safetensors")
    assert_same(ours("B/16", path, images)[1], net(images))


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_dinov2s_table_as_transformers_resizes_it(kind, tmp_path):
    sizes = {**TINY, "num_attention_heads": 2, "patch_size": 14, "image_size": 518}
    net = noisy(
        getattr(transformers, f"{kind}Model")(
            getattr(transformers, f"{kind}Config")(**sizes, mlp_ratio=2)
        )
    )
    repo = {"Dinov2": "dinov2-small"}.get(kind, "dinov2-with-registers-small")
    path = save(net.state_dict(), tmp_path / f"facebook--{repo}" / "model.safetensors")
    images = pictures(224)
    expected = net(images).last_hidden_state[:, 0]
    assert_same(loaded(path, images, image_size=224, num_heads=2)[1], expected)


def test_dinov2s_table_as_timm_resizes_it():
    """timm's own function; Meta's offset is in `test_position_tables`."""
    table = torch.randn(1, 1 + 37 * 37, 8)
    expected = timm.layers.resample_abs_pos_embed(table, [16, 16])
    known = vpt_jax.weights.backbones.known_backbone(
        "vit_small_patch14_dinov2.lvd142m/w"
    )
    got = vpt_jax.resize_pos_embedding(jax.numpy.asarray(table), 16, known.resize)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)


def test_safetensors_is_what_torch_wrote(tmp_path):
    """bfloat16, as many publish: the same numbers, widened."""
    net = plain()
    state = {n: t.to(torch.bfloat16) for n, t in net.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    _, backbone = vpt_jax.load_backbone(tmp_path / "w.safetensors", num_heads=3)
    bias = state["norm.bias"].to(torch.float32).numpy()
    np.testing.assert_array_equal(backbone["Transformer"]["encoder_norm"]["bias"], bias)
