# SPDX-License-Identifier: Apache-2.0
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomised
from test_naming import flat_vit

import vpt_jax
from vpt_jax.files import states, workdirs
from vpt_jax.weights import release
from vpt_jax.weights.checkpoint import save_backbone
from vpt_jax.weights.naming import unflatten
from vpt_jax.weights.release import flatten


@pytest.fixture(scope="module")
def small():
    """The demo's architecture with a large patch: quick, and a named variant."""
    return vpt_jax.ViT("demo/16"), jax.tree.map(jnp.asarray, unflatten(flat_vit()))


def google_names(flat):
    """The names of Google's files, which predate Linen."""
    for name in (
        ("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1"),
        ("LayerNorm_1", "LayerNorm_2"),
        ("MlpBlock_0", "MlpBlock_3"),
    ):
        flat = {n.replace(*name): value for n, value in flat.items()}
    return flat


@pytest.mark.parametrize("kind", ["linen.npz", "google.npz", "linen.safetensors"])
def test_backbones_load_exactly(small, tmp_path, kind):
    model, backbone = small
    path, flat = tmp_path / kind, flatten(backbone)
    if kind.startswith("google"):
        flat = google_names(flat)
        flat |= {"head/kernel": np.zeros((128, 9)), "head/bias": np.zeros(9)}
        flat |= {"pre_logits/kernel": np.zeros((128, 128))}
    if kind.endswith("npz"):
        np.savez(path, **flat)
    else:
        save_backbone(path, backbone, {"normalisation": "half"})
        assert vpt_jax.weights.checkpoint.read_card(path) == {"normalisation": "half"}
    loaded, params = vpt_jax.load_backbone("demo/16", path)
    assert loaded == model
    jax.tree.map(np.testing.assert_array_equal, params, backbone)
    assert vpt_jax.backbone_hash(params) == vpt_jax.backbone_hash(backbone)


def test_the_position_table_is_resized_for_another_image_size(small, tmp_path):
    model, backbone = small
    np.savez(tmp_path / "a.npz", **flatten(backbone))
    for how in ("corner_aligned", "half_pixel"):
        loaded, params = vpt_jax.load_backbone(
            "demo/16", tmp_path / "a.npz", image_size=64, resize=how
        )
        assert loaded.image_size == 64
        table = params["Transformer"]["posembed_input"]["pos_embedding"]
        expected = vpt_jax.resize_pos_embedding(
            backbone["Transformer"]["posembed_input"]["pos_embedding"], 4, how
        )
        np.testing.assert_array_equal(table, expected)
        pictures = jnp.zeros((1, 64, 64, 3))
        features, _ = jax.eval_shape(loaded.apply, {"params": params}, pictures)
        assert features.shape == (1, 128)


def test_the_shipped_backbone_is_the_one_of_its_model_card():
    model, backbone = vpt_jax.load_backbone("demo/4")
    card = vpt_jax.weights.checkpoint.read_card()
    assert card["hash"] == vpt_jax.backbone_hash(backbone)
    assert card["parameters"] == sum(x.size for x in jax.tree.leaves(backbone))
    assert card["image_size"] == model.image_size == 32
    assert vpt_jax.weights.checkpoint.DEMO_BACKBONE.stat().st_size < 4e6


def test_the_hash_sees_every_value_name_and_shape(small):
    flat = flatten(small[1])
    cls = flat.pop("cls")
    others = [{"cls": np.nextafter(cls, 9)}, {"cls_token": cls}, {"cls": cls[0]}]
    trees = [unflatten(flat | own) for own in ({"cls": cls}, *others)]
    assert len({vpt_jax.backbone_hash(tree) for tree in trees}) == 4


def released(small, path, num=(3, 0, 2, 0, 0, 1)):
    model, backbone = small
    prompts = vpt_jax.init_prompts(jax.random.key(1), model, num)
    head = vpt_jax.init_head(jax.random.key(2), model.width, 2)
    told = {"backbone_name": "small", "normalisation": "half"}
    told |= {"model": model, "backbone": backbone, "class_names": ["cat", "dog"]}
    vpt_jax.save_prompts(path, prompts, head, **told)
    return prompts, head


def test_prompts_come_back_bit_for_bit_with_their_header(small, tmp_path):
    path = tmp_path / "p.safetensors"
    prompts, head = released(small, path)
    got = vpt_jax.load_prompts(path, backbone=small[1])
    jax.tree.map(np.testing.assert_array_equal, got.prompts, prompts)
    jax.tree.map(np.testing.assert_array_equal, got.head, head)
    assert got.header == {
        "version": 1,
        "backbone": "small",
        "backbone_hash": vpt_jax.backbone_hash(small[1]),
        "variant": "demo/16",
        "image_size": 32,
        "readout": "cls",
        "normalisation": "half",
        "class_names": ["cat", "dog"],
        "counts": [3, 0, 2, 0, 0, 1],
        "deep": True,
        "model": release.fields_of(small[0]),
        "load": {},
        "source": "",
        "resize": "",
    }
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]
    with pytest.raises(ValueError, match="no such file"):
        vpt_jax.load_prompts(tmp_path / "absent.safetensors")


def test_another_backbone_is_refused_and_both_hashes_are_shown(small, tmp_path):
    released(small, tmp_path / "p.safetensors")
    other = randomised(small[1], seed=9)
    with pytest.raises(ValueError, match="another backbone") as error:
        vpt_jax.load_prompts(tmp_path / "p.safetensors", backbone=other)
    assert vpt_jax.backbone_hash(small[1]) in str(error.value)
    assert vpt_jax.backbone_hash(other) in str(error.value)


# --- the workdir ----------------------------------------------------------------------


def test_checkpoints_keep_ragged_trees_bit_for_bit(tmp_path):
    tree = {
        "a": (jnp.arange(6.0).reshape(2, 3), jnp.zeros((0, 3))),
        "n": jnp.int32(7),
        "empty": (),
    }
    states.save_checkpoint(tmp_path / "3", tree)
    states.save_checkpoint(tmp_path / "12", tree)
    (tmp_path / "13.orbax-checkpoint-tmp").mkdir()  # killed while writing
    assert states.newest_checkpoint(tmp_path) == (12, tmp_path / "12")
    got = states.restore_checkpoint(tmp_path / "12", tree)
    jax.tree.map(np.testing.assert_array_equal, got, tree)
    assert got["a"][1].shape == (0, 3) and got["n"].dtype == np.int32
    states.remove_checkpoints(tmp_path, keep=1)
    assert (tmp_path / "12").exists() and not (tmp_path / "3").exists()
    assert states.newest_checkpoint(tmp_path / "absent") is None


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    workdirs.write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        workdirs.write_json(path, {"x": float("nan")})
    with pytest.raises(RuntimeError), workdirs.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
