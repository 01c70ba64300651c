# SPDX-License-Identifier: Apache-2.0
import io
import json
import shutil
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL, load_config
from ml_collections import ConfigDict
from PIL import Image

import vpt_jax
from scripts import pretrain
from vpt_jax.models.inputs import normalise

DEMO = Path(vpt_jax.__file__).parent / "assets" / "demo_vit.safetensors"

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A zip in the layout of the real one: two classes, noise."""
    path = tmp_path_factory.mktemp("zip") / "pictures.zip"
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as out:
        for split, num in (("train", 8), ("test", 3)):
            for name in ("cat", "dog"):
                for i in range(num):
                    picture = rng.integers(0, 256, (32, 32, 3), np.uint8)
                    data = io.BytesIO()
                    Image.fromarray(picture).save(data, "JPEG")
                    out.writestr(f"{split}/{name}/{i:04d}.jpg", data.getvalue())
    return path


def smoke(archive) -> ConfigDict:
    config = load_config("configs/pretrain_demo.py", "smoke")
    config.data, config.variant = str(archive), SMALL
    return config


def test_pretraining_writes_weights_that_load_and_resumes_exactly(archive, tmp_path):
    card = pretrain.run(smoke(archive), tmp_path / "a")
    path = tmp_path / "a" / "backbone.safetensors"
    model, backbone = vpt_jax.load_backbone(SMALL, path)
    assert model.image_size == 32  # the position table of the last stage
    assert card["hash"] == vpt_jax.backbone_hash(backbone)
    assert card == json.loads((tmp_path / "a" / "model_card.json").read_text())
    assert 0 <= card["test_accuracy"] <= 1
    # Stopped after the first epoch: only its checkpoint is there.
    source = tmp_path / "a" / "checkpoints" / "1"
    shutil.copytree(source, tmp_path / "b" / "checkpoints" / "1")
    assert pretrain.run(smoke(archive), tmp_path / "b")["hash"] == card["hash"]


def test_a_teacher_trains_the_backbone_and_labels_the_head_alone(
    archive, tmp_path, monkeypatch
):
    config = smoke(archive)
    config.teacher, config.teacher_variant = str(DEMO), "demo/4"
    config.stages, config.teacher_side = ((32, 2),), 32
    first = pretrain.run(config, tmp_path / "a")
    images, labels, classes = pretrain.read_zip(archive, "train")
    swapped = (images, 1 - labels, classes)
    monkeypatch.setattr(pretrain, "read_zip", lambda *_: swapped)
    assert first["hash"] == pretrain.run(config, tmp_path / "b")["hash"]
    targets = np.load(tmp_path / "a" / "teacher.npy").astype(np.float32)
    assert targets.shape == (16, 128)
    np.testing.assert_allclose(targets.mean(0), 0, atol=1e-3)  # float16
    np.testing.assert_allclose(targets.std(0), 1, atol=1e-3)
    model, params = vpt_jax.load_backbone("demo/4")
    batch = normalise(jnp.asarray(images), "imagenet")
    features = np.asarray(model.apply({"params": params}, batch)[0])
    features = (features - features.mean(0)) / features.std(0)
    np.testing.assert_allclose(targets, features, atol=4e-3)  # float16, up to 4


def test_the_state_is_resized_with_its_moments(archive):
    config = smoke(archive)
    tx = pretrain.optimiser(config, 2)
    model = vpt_jax.ViT("demo/4", image_size=16)

    def fresh():
        params = {
            "backbone": model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))[
                "params"
            ]
        }
        return pretrain.State(jnp.zeros((), jnp.int32), params, tx.init(params))

    state = jax.eval_shape(lambda: pretrain.resized_state(fresh(), 8))
    tables = [x.shape for x in jax.tree.leaves(state) if x.shape[1:2] == (65,)]
    assert tables == [(1, 65, 128)] * 3  # parameter, first and second moment


def test_a_missing_or_empty_zip_says_what_to_pass(tmp_path):
    with pytest.raises(ValueError, match="pass --config.data=ZIP"):
        pretrain.read_zip(tmp_path / "absent.zip", "train")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(ValueError, match="holds no pictures"):
        pretrain.read_zip(tmp_path / "empty.zip", "train")
