# SPDX-License-Identifier: Apache-2.0
"""What the command asks of a model: a Swin spares memory too, and has one kernel."""

import jax
import jax.numpy as jnp
import pytest

import vpt_jax
from vpt_jax.run.config import BackboneConfig
from vpt_jax.run.experiment import load_model
from vpt_jax.weights.checkpoint import save_backbone


def test_a_swin_takes_remat_and_no_other_kernel(tmp_path):
    sizes = {"embed_dim": 8, "depths": (1, 1), "num_heads": (2, 4), "window": 4}
    model = vpt_jax.Swin(**sizes, image_size=32)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    backbone = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
    path = tmp_path / "mine.safetensors"
    save_backbone(path, backbone, {"normalisation": "half"})
    loaded = load_model(BackboneConfig(variant=str(path), remat="block")).model
    assert (loaded.remat, loaded.depths) == ("block", (1, 1))
    fused = BackboneConfig(variant=str(path), attention="cudnn", dtype="bfloat16")
    with pytest.raises(ValueError, match="'cudnn'; expected 'products' for a Swin"):
        load_model(fused)
