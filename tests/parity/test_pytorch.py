# SPDX-License-Identifier: Apache-2.0
"""The same numbers as PyTorch: timm's and transformers' models with the same weights.

Random weights, written to a file as their users have it, loaded by `load_backbone`.
Run by `.ci/parity`, which installs torch; the plain test line does not need it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import transformers

import vpt_jax

torch.manual_seed(0)
resize = torch.nn.functional.interpolate


def noisy(model):
    """Random values everywhere: zeros and ones would hide what is swapped."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.05 if p.ndim > 1 else 0.2))
    return model.eval()


def save(state, path, wrapped=None):
    path.parent.mkdir(exist_ok=True)
    state = {n: t.contiguous() for n, t in state.items()}
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({wrapped: state, "epoch": 300} if wrapped else state, path)
    return path


def pictures(side, num=2):
    return torch.randn(num, 3, side, side)


def ours(variant, path, images, **options):
    side = images.shape[-1]
    model, backbone = vpt_jax.load_backbone(variant, path, image_size=side, **options)
    features, _ = jax.jit(model.apply)({"params": backbone}, to_jax(images))
    return model, features


def to_jax(images):
    return jnp.asarray(images.permute(0, 2, 3, 1).numpy())


def assert_same(features, expected):
    """To 1e-4 of the largest feature: float32 through twelve layers twice."""
    expected = expected.detach().numpy()
    assert np.abs(np.asarray(features) - expected).max() < 1e-4 * np.abs(expected).max()


def with_table(state, rows, old, new, **how):
    """The state with its position table resized by PyTorch."""
    table = state["pos_embed"]
    first = table.shape[1] - old * old
    grid = table[:, first:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = resize(grid, size=(new, new), **how).permute(0, 2, 3, 1)
    grid = grid.reshape(1, new * new, -1)
    return {**state, rows: torch.cat([table[:, :first], grid], 1)}


def timm_features(name, state, side, old, patch, images, how, **options):
    """Features of timm's model built for `side`; its table resized by PyTorch."""
    model = timm.create_model(name, num_classes=0, img_size=side, **options)
    if side // patch != old:
        state = with_table(state, "pos_embed", old, side // patch, **how)
    model.load_state_dict(state)
    with torch.no_grad():
        return model.eval()(images)


CORNERS = {"mode": "bilinear", "align_corners": True}
DINOV2 = {"mode": "bicubic", "antialias": True}
CASES = {
    # timm's name, its options, our variant, file name, wrapped in, sides, table
    "vit": (
        "vit_small_patch16_224",
        {},
        "S/16",
        "vit_small_patch16_224/model.safetensors",
        None,
        CORNERS,
    ),
    "deit": (
        "deit_small_patch16_224",
        {},
        "S/16",
        "deit_small_patch16_224-cd65a155.pth",
        "model",
        CORNERS,
    ),
    "dino": (
        "vit_small_patch16_224",
        {},
        "S/16",
        "dino_deitsmall16_pretrain.pth",
        None,
        CORNERS,
    ),
    "dinov2": (
        "vit_small_patch14_dinov2",
        {"img_size": 224},
        "S/14",
        "vit_small_patch14_dinov2/model.safetensors",
        None,
        DINOV2,
    ),
    "registers": (
        "vit_small_patch14_reg4_dinov2",
        {"img_size": 224},
        "S/14",
        "vit_small_patch14_reg4_dinov2/model.safetensors",
        None,
        DINOV2,
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("side", [224, 112])
def test_timm(case, side, tmp_path):
    name, options, variant, file, wrapped, how = CASES[case]
    state = noisy(timm.create_model(name, num_classes=0, **options)).state_dict()
    path = save(state, tmp_path / file, wrapped)
    images, patch = pictures(side), int(variant.split("/")[1])
    expected = timm_features(name, state, side, 224 // patch, patch, images, how)
    model, features = ours(variant, path, images)  # the table knows how it is resized
    assert model.registers == (4 if case == "registers" else 0)
    assert_same(features, expected)


@pytest.mark.parametrize("side", [224, 112])
def test_mae_reads_the_mean_and_drops_the_norm_of_tokens(side, tmp_path):
    name = "vit_small_patch16_224"
    state = noisy(timm.create_model(name, num_classes=0)).state_dict()
    path = save(state, tmp_path / "mae_pretrain_vit_small.pth", "model")
    images = pictures(side)
    pooled = {n: t for n, t in state.items() if not n.startswith("norm.")}
    width = torch.ones(384)
    pooled |= {"fc_norm.weight": width, "fc_norm.bias": 0 * width}
    expected = timm_features(
        name, pooled, side, 14, 16, images, CORNERS, global_pool="avg"
    )
    model, features = ours("S/16", path, images)
    assert (model.readout, model.norm) == ("mean_with_prompts", "after")
    assert_same(features, expected)


def test_a_fine_tuned_mae_keeps_its_own_norm(tmp_path):
    name = "vit_small_patch16_224"
    model = noisy(timm.create_model(name, num_classes=0, global_pool="avg"))
    path = save(model.state_dict(), tmp_path / "mine.safetensors")
    images = pictures(224)
    mine, features = ours("S/16", path, images)
    assert (mine.readout, mine.norm) == ("mean", "after")
    assert_same(features, model(images))


@pytest.mark.parametrize("side", [224, 112])
@pytest.mark.parametrize("trained", ["linear", "pretrained"])
def test_moco(side, trained, tmp_path):
    name = "vit_small_patch16_224"
    heads = {"num_heads": 12}  # of its vits.py, where timm's ViT-S has 6
    state = noisy(timm.create_model(name, num_classes=0, **heads)).state_dict()
    if trained == "linear":
        saved = {f"module.{n}": t for n, t in state.items()}
        saved["module.head.weight"] = torch.zeros(10, 384)
        file = "mocov3_linear-vit-s-300ep.pth.tar"
    else:
        saved = {f"module.base_encoder.{n}": t for n, t in state.items()}
        saved |= {f"module.momentum_encoder.{n}": 0 * t for n, t in state.items()}
        saved["module.base_encoder.head.0.weight"] = torch.zeros(10, 384)
        saved["module.predictor.0.weight"] = torch.zeros(10, 10)
        file = "vit-s-300ep.pth.tar"
    path = save(saved, tmp_path / file, "state_dict")
    images = pictures(side)
    expected = timm_features(name, state, side, 14, 16, images, CORNERS, **heads)
    assert_same(ours("S/16", path, images)[1], expected)


@pytest.mark.parametrize("side", [224, 448])
@pytest.mark.parametrize("names", ["timm", "original"])
def test_swin(side, names, tmp_path):
    name = "swin_tiny_patch4_window7_224"
    torch_model = noisy(timm.create_model(name, num_classes=0, img_size=side))
    state = torch_model.state_dict()
    if names == "original":  # merging at the end of a stage; buffers in the file
        moved = {}
        for n, t in state.items():
            parts = n.split(".")
            if "downsample" in parts:
                parts[1] = str(int(parts[1]) - 1)
            moved[".".join(parts)] = t
        moved["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
        moved["head.weight"] = torch.zeros(10, 768)
        path = save(moved, tmp_path / f"{name}.pth", "model")
    else:
        path = save(state, tmp_path / "mine.safetensors")
    images = pictures(side, 1)
    with torch.no_grad():
        expected = torch_model(images)
    model, features = ours("Swin-T", path, images)
    assert model.readout == "mean_with_prompts"  # without prompts the mean
    assert_same(features, expected)


SIZES = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12}


@pytest.mark.parametrize("side", [224, 112])
@pytest.mark.parametrize("names", ["saved", "in memory"])
@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "Dinov2WithRegisters"])
def test_transformers(kind, names, side, tmp_path):
    patch = 16 if kind == "ViT" else 14
    sizes = {**SIZES, "image_size": 224, "patch_size": patch}
    if kind == "ViT":
        sizes["intermediate_size"] = 1536
    config = getattr(transformers, f"{kind}Config")(**sizes)
    torch_model = noisy(getattr(transformers, f"{kind}Model")(config))
    if names == "saved":
        torch_model.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
    else:
        path = save(torch_model.state_dict(), tmp_path / "pytorch_model.bin")
    images = pictures(side)
    extra = {"interpolate_pos_encoding": True} if kind == "ViT" else {}
    with torch.no_grad():
        expected = torch_model(images, **extra).last_hidden_state[:, 0]
    how = "bicubic_antialias" if kind == "Dinov2WithRegisters" else "bicubic"
    _, features = ours(f"S/{patch}", path, images, resize=how)
    assert_same(features, expected)


def test_giant_dinov2s_swiglu(tmp_path):
    """One layer of the giant's width: the MLP is what is new."""
    torch_model = noisy(
        timm.create_model(
            "vit_giant_patch14_dinov2", num_classes=0, depth=1, img_size=56
        )
    )
    path = save(torch_model.state_dict(), tmp_path / "mine.safetensors")
    from vpt_jax.weights.matching import match_vit, parameters
    from vpt_jax.weights.naming import read_names
    from vpt_jax.weights.readers import open_arrays

    with open_arrays(path) as file:
        named = read_names(file.arrays, path, ())
        wanted = vpt_jax.ViT("g/14", depth=1)
        model = match_vit(wanted, named, path, readout="", norm="", posemb="learned")
        backbone = parameters(named, model, path, (), np.float32)
    images = pictures(56)
    features, _ = model.apply({"params": backbone}, to_jax(images))
    assert_same(features, torch_model(images))


@pytest.mark.parametrize(("old", "new"), [(14, 24), (37, 16), (14, 7), (7, 37), (3, 1)])
@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("corner_aligned", CORNERS),
        ("half_pixel", {"mode": "bilinear"}),
        ("bicubic", {"mode": "bicubic"}),
        ("bicubic_antialias", DINOV2),
        ("bicubic_offset", None),  # as DINOv2's code asks for it
    ],
)
def test_position_tables(method, how, old, new):
    table = torch.randn(1, 1 + old * old, 8)
    grid = table[:, 1:].reshape(1, old, old, 8).permute(0, 3, 1, 2)
    if how is None:
        scale = (new + 0.1) / old
        grid = resize(grid, scale_factor=(scale, scale), mode="bicubic")
    else:
        grid = resize(grid, size=(new, new), **how)
    expected = grid.permute(0, 2, 3, 1).reshape(new * new, 8)
    resized = vpt_jax.resize_pos_embedding(jnp.asarray(table.numpy()), new, method)
    np.testing.assert_array_equal(resized[:, :1], table[:, :1])
    # PyTorch computes the places in float32, up to 1e-6 of 37 rows away.
    np.testing.assert_allclose(resized[0, 1:], expected, rtol=0, atol=2e-5)
