# SPDX-License-Identifier: Apache-2.0
"""SigLIP, DINOv3, CLIP, TIPSv2, distilled DeiT, transformers' Swin against PyTorch.

The classes of timm and transformers, narrow and of two blocks, with random weights in
all parameters; what a width changes there is no code of ours. Both image sizes are run
by the other side too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
import transformers
from test_pytorch import DINOV2, assert_same, noisy, pictures, save, to_jax, with_table
from timm.models import eva, vision_transformer

import vpt_jax
from vpt_jax.models.layers import KeyValue
from vpt_jax.weights.release import flatten

NARROW = {"embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 0}
CLASS_TOKEN = {"global_pool": "token"}  # as upstream reads DINOv3; timm takes the mean
TIMM = {
    # timm's architecture, the published file, what differs
    "siglip": ("vit_base_patch16_siglip_224", ".v2_webli", {}),
    "siglip tanh": ("vit_base_patch32_siglip_256", ".v2_webli", {}),
    "dinov3": ("vit_small_patch16_dinov3", ".lvd1689m", CLASS_TOKEN),
    "dinov3 bias": ("vit_small_patch16_dinov3_qkvb", ".lvd1689m", CLASS_TOKEN),
    "dinov3 gated": ("vit_small_plus_patch16_dinov3", ".lvd1689m", CLASS_TOKEN),
    "clip": ("vit_base_patch16_clip_quickgelu_224", ".openai", {}),
    "openclip": ("vit_base_patch32_clip_224", ".laion2b", {}),
    "tipsv2": ("vit_base_patch14_reg1_tipsv2", ".webli", {}),
    "tipsv2 giant": ("vit_giant_patch14_reg1_tipsv2", ".webli", {}),
    "distilled": ("deit_small_distilled_patch16_224", ".fb_in1k", {}),
}
PATCHES = (4, 6)  # a side, as in the file and resized


def timm_model(case, side, **options):
    name, _, more = TIMM[case]
    return timm.create_model(name, img_size=side, **NARROW, **more, **options)


def timm_file(case, folder):
    """A file as the hub has it, of `PATCHES[0]`, and timm's model."""
    name, tag, _ = TIMM[case]
    patch = int(name.partition("_patch")[2][:2])
    model = noisy(timm_model(case, patch * PATCHES[0]))
    file = name.replace("_quickgelu", "") + tag
    return save(model.state_dict(), folder / file / "model.safetensors"), model, patch


def ours(path, images, **options):
    side = images.shape[-1]
    model, backbone = vpt_jax.load_backbone(
        path, image_size=side, num_heads=2, **options
    )
    return model, backbone, jax.jit(model.apply)({"params": backbone}, to_jax(images))


@pytest.mark.parametrize("grid", PATCHES)
@pytest.mark.parametrize("case", TIMM)
def test_timm(case, grid, tmp_path):
    path, torch_model, patch = timm_file(case, tmp_path)
    images = pictures(grid * patch)
    if grid != PATCHES[0]:
        state, torch_model = torch_model.state_dict(), timm_model(case, grid * patch)
        if "pos_embed" in state:
            how = {"mode": "bilinear", "align_corners": True}
            how = how if case == "distilled" else DINOV2
            state = with_table(state, "pos_embed", PATCHES[0], grid, **how)
        torch_model.load_state_dict(state)
        torch_model.eval()
    with torch.no_grad():
        expected = torch_model(images)
        if case == "distilled":  # timm's mean is of both tokens
            expected = torch_model.forward_features(images)[:, 0]
    options = {"posemb": "rotary"} if "dinov3" in case else {}
    model, _, (features, _) = ours(path, images, **options)
    assert_same(features, expected)
    assert model.readout == ("map" if "siglip" in case else "cls")
    assert model.epsilon == (1e-5 if "clip" in case or "dinov3" in case else 1e-6)


SIZES = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
SIZES |= {"intermediate_size": 256, "image_size": 64, "patch_size": 16}
GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
TRANSFORMERS = {
    # its class; the published file; what differs; the rule of its table
    "siglip": ("SiglipVision", "siglip2-base-patch16-224", {}, "bicubic"),
    "dinov3": (
        "DINOv3ViT",
        "dinov3-vits16-pretrain-lvd1689m",
        {"num_register_tokens": 4},
        "",
    ),
    "dinov3 gated": (
        "DINOv3ViT",
        "dinov3-vits16plus-pretrain-lvd1689m",
        {"num_register_tokens": 4, **GATED},
        "",
    ),
    "clip": ("CLIPVision", "clip-vit-base-patch16", {}, "bicubic"),
    "openclip": (
        "CLIPVision",
        "CLIP-ViT-B-32-laion2B-s34B-b79K",
        {"hidden_act": "gelu"},
        "bicubic",
    ),
    "tipsv2": ("Tipsv2Vision", "tipsv2-b14", {}, "half_pixel_antialias"),
    "distilled": (
        "DeiT",
        "deit-small-distilled-patch16-224",
        {"layer_norm_eps": 1e-6},
        "bicubic",
    ),
}


@pytest.mark.parametrize("side", [64, 96])
@pytest.mark.parametrize("names", ["saved", "in memory"])
@pytest.mark.parametrize("case", TRANSFORMERS)
def test_transformers(case, names, side, tmp_path):
    kind, published, more, rule = TRANSFORMERS[case]
    config = getattr(transformers, f"{kind}Config")(**SIZES | more)
    torch_model = noisy(getattr(transformers, f"{kind}Model")(config))
    folder = tmp_path / published
    if names == "saved":
        torch_model.save_pretrained(folder)
        (folder / "config.json").unlink()  # the name alone has to tell
        path = folder / "model.safetensors"
    else:
        path = save(torch_model.state_dict(), folder / "pytorch_model.bin")
    images = pictures(side)
    extra = {"interpolate_pos_encoding": True}
    extra = extra if case in ("siglip", "clip", "openclip", "distilled") else {}
    with torch.no_grad():
        out = torch_model(images, **extra)
    expected = out.last_hidden_state[:, 0]
    if case in ("siglip", "clip", "openclip"):
        expected = out.pooler_output
    options = {"posemb": "rotary"} if "dinov3" in case else {}
    _, _, (features, _) = ours(path, images, resize=rule, **options)
    assert_same(features, expected)


@pytest.mark.parametrize("side", [64, 128])
@pytest.mark.parametrize("names", ["saved", "in memory"])
def test_transformers_swin(names, side, tmp_path):
    sizes = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    config = transformers.SwinConfig(image_size=64, **sizes)
    torch_model = noisy(transformers.SwinModel(config))
    if names == "saved":  # with its config.json
        torch_model.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
    else:
        path = save(torch_model.state_dict(), tmp_path / "pytorch_model.bin")
    images = pictures(side)
    with torch.no_grad():
        expected = torch_model(images, interpolate_pos_encoding=True).pooler_output
    model, backbone = vpt_jax.load_backbone(path, image_size=side)
    features, _ = jax.jit(model.apply)({"params": backbone}, to_jax(images))
    assert_same(features, expected)


def test_metas_names_of_dinov3(tmp_path):
    """timm's converter of Meta's files takes them to the model that ours is held to."""
    path, torch_model, _ = timm_file("dinov3 bias", tmp_path)
    state = torch_model.state_dict()
    renamed = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma"}
    renamed |= {"gamma_2": "ls2.gamma"}
    metas = {}
    for name, tensor in state.items():
        for theirs, metas_name in renamed.items():
            name = name.replace(theirs, metas_name)
        if "_bias" not in name:
            metas[name] = tensor
    for i in range(2):
        q, v = (state[f"blocks.{i}.attn.{n}_bias"] for n in "qv")
        # What Meta masks is not zero in a file.
        metas[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.ones_like(q), v])
        mask = torch.ones(3, len(q))
        mask[1] = 0
        metas[f"blocks.{i}.attn.qkv.bias_mask"] = mask.flatten()
    metas |= {"rope_embed.periods": torch.ones(16), "mask_token": torch.ones(1, 128)}
    metas |= {f"local_cls_norm.{n}": torch.ones(128) for n in ("weight", "bias")}
    converted = eva.checkpoint_filter_fn(dict(metas), torch_model)
    torch_model.load_state_dict(converted)  # as it was
    mine = save(metas, tmp_path / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth")
    _, expected = vpt_jax.load_backbone(path, num_heads=2)
    _, backbone = vpt_jax.load_backbone(mine, num_heads=2)
    jax.tree.map(np.testing.assert_array_equal, backbone, expected)


def test_openais_names_of_clip(tmp_path):
    """Both towers; timm's converter takes the one of pictures to timm's model."""
    path, torch_model, _ = timm_file("clip", tmp_path)
    renamed = {"cls_token": "class_embedding", "pos_embed": "positional_embedding"}
    renamed |= {"patch_embed.proj": "conv1", "norm_pre": "ln_pre", "norm.": "ln_post."}
    renamed |= {"blocks": "transformer.resblocks", "norm1": "ln_1", "norm2": "ln_2"}
    renamed |= {"attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj"}
    renamed |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    openais = {}
    for name, tensor in torch_model.state_dict().items():
        for theirs, new in renamed.items():
            if not (theirs == "norm." and name.startswith("blocks")):
                name = name.replace(theirs, new)
        openais[f"visual.{name}"] = tensor
    openais["visual.class_embedding"] = openais["visual.class_embedding"][0, 0]
    openais["visual.positional_embedding"] = openais["visual.positional_embedding"][0]
    openais["visual.proj"] = torch.zeros(128, 64)
    tower = {n: t for n, t in openais.items() if n != "visual.proj"}
    convert = vision_transformer._convert_openai_clip
    torch_model.load_state_dict(convert(tower, torch_model))
    openais["transformer.resblocks.0.ln_1.weight"] = torch.zeros(64)
    openais["positional_embedding"] = torch.zeros(77, 64)
    openais["token_embedding.weight"] = torch.zeros(9, 64)
    openais["ln_final.bias"] = torch.zeros(64)
    mine = save(openais, tmp_path / "ViT-B-16.pt")
    _, expected = vpt_jax.load_backbone(path, num_heads=2)
    with pytest.raises(ValueError, match="activation='quick_gelu' "):
        vpt_jax.load_backbone(mine, num_heads=2)
    model, backbone = vpt_jax.load_backbone(mine, num_heads=2, activation="quick_gelu")
    assert (model.epsilon, model.activation) == (1e-5, "quick_gelu")
    jax.tree.map(np.testing.assert_array_equal, backbone, expected)


def test_big_visions_siglip(tmp_path):
    """An `.npz` that timm's reader of big_vision's files takes, and so do we."""
    path, torch_model, _ = timm_file("siglip", tmp_path)
    model, backbone = vpt_jax.load_backbone(path, num_heads=2)
    noise = np.random.default_rng(0)
    flat = {
        f"params/img/{n}": a + 0.1 * noise.standard_normal(a.shape, np.float32)
        for n, a in flatten(backbone).items()
    }
    place = "params/img/Transformer/posembed_input/pos_embedding"
    flat["params/img/pos_embedding"] = flat.pop(place)
    flat["params/txt/Encoder_0/pos_embedding"] = np.zeros((1, 64, 128), np.float32)
    flat["params/t"] = np.zeros(1, np.float32)
    file = tmp_path / "siglip2_b16_224.npz"
    np.savez(file, **flat)
    tanh = timm_model("siglip", 64, act_layer="gelu_tanh")  # as Flax's default has it
    vision_transformer._load_weights(tanh, str(file), prefix="params/img/")
    images = pictures(64)
    with torch.no_grad():
        expected = tanh.eval()(images)
    mine, _, (features, _) = ours(file, images)
    assert (mine.activation, mine.readout) == ("gelu_tanh", "map")
    assert_same(features, expected)


def with_prompts(torch_model, images, prompts):
    """timm's own blocks with the prompts as tokens before the patches."""
    x = torch_model.patch_embed(images)
    x = torch_model._pos_embed(x)
    x, rope = x if isinstance(x, tuple) else (x, None)
    x = torch_model.norm_pre(x)
    first = torch_model.num_prefix_tokens
    for block, p in zip(torch_model.blocks, prompts, strict=True):
        own = p.expand(len(x), -1, -1)
        x = torch.cat([x[:, :first], own, x[:, first:]], 1)
        if rope is None:
            x = block(x)
        else:
            block.attn.num_prefix_tokens = first + len(p)
            x = block(x, rope=rope)
        x = torch.cat([x[:, :first], x[:, first + len(p) :]], 1)
    return torch_model.forward_head(torch_model.norm(x))


@pytest.mark.parametrize("case", ["siglip", "dinov3", "dinov3 gated", "clip"])
def test_gradients_of_prompts(case, tmp_path):
    path, torch_model, patch = timm_file(case, tmp_path)
    images = pictures(patch * PATCHES[0])
    options = {"posemb": "rotary"} if "dinov3" in case else {}
    model, backbone, _ = ours(path, images, **options)
    prompts = tuple(
        jax.random.normal(jax.random.key(i), (n, 128)) for i, n in enumerate((3, 5))
    )
    leaves = [torch.tensor(np.asarray(p)).requires_grad_() for p in prompts]
    expected = with_prompts(torch_model, images, leaves)
    expected.sin().sum().backward()

    @functools.partial(jax.jit, static_argnames="formulation")
    def gradients(prompts, formulation):
        def loss(prompts):
            given = {"prompts": prompts, "formulation": formulation}
            out, _ = model.apply({"params": backbone}, to_jax(images), **given)
            return jnp.sin(out).sum(), out

        return jax.grad(loss, has_aux=True)(prompts)

    for formulation in ("kv", "tokens"):
        grads, features = gradients(prompts, formulation)
        assert_same(features, expected)
        for ours_grad, leaf in zip(grads, leaves, strict=True):
            assert_same(ours_grad, leaf.grad)
    ready = vpt_jax.prefill(model, backbone, prompts)
    assert all(isinstance(p, KeyValue) for p in ready)
    assert_same(
        model.apply({"params": backbone}, to_jax(images), prompts=ready)[0], expected
    )
