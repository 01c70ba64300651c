# SPDX-License-Identifier: Apache-2.0
"""Strict JAX for every test, and the tiny model that most of them use."""

import contextlib
import os
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

# Before JAX starts: eight devices, so that sharding is tested for real.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Of pytest's workers, which start after this: threads of NumPy's would only wait.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# XLA's older way to write loops compiles unoptimised programs twice as fast and more;
# 0.11.2 no longer has it, and a flag that XLA does not know ends the process.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_use_fusion_emitters=false"
    if version("jaxlib").startswith(("0.9.", "0.10."))
    else "",
)

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vpt_jax
from vpt_jax import parallel
from vpt_jax.models import vit
from vpt_jax.models.scores import example_values
from vpt_jax.weights.checkpoint import save_backbone

# Of this process alone, whose backend starts here: what tests start has one device, as
# users' CPUs do, and compiles as theirs unless it is given `QUICK`.
jax.devices()
del os.environ["JAX_NUM_CPU_DEVICES"]
QUICK = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": os.environ.pop("XLA_FLAGS"),
}

# No test fails because the machine is busy.
hypothesis.settings.register_profile("vpt_jax", deadline=None)
hypothesis.settings.load_profile("vpt_jax")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of the tests' time is LLVM's.
jax.config.update("jax_disable_most_optimizations", True)


@contextlib.contextmanager
def optimised():
    """Programs as users' are, where tests look at what they cost."""
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def standard_promotion():
    """For tests that run optax's Adam: its bias correction mixes float and int."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True, scope="module")
def what_a_module_has(request):
    """One device unless many are meant.

    Whole runs would use all eight devices, and two cores take twice as long for them.
    Compiled programs of all files together would take many GB: they are forgotten.
    """
    with pytest.MonkeyPatch.context() as patch:
        parallel._mesh.cache_clear()
        if request.module.__name__ != "test_parallel":
            patch.setattr(jax, "device_count", lambda: 1)
        yield
    parallel._mesh.cache_clear()
    jax.clear_caches()


# For whole runs: four tokens of a picture of the demo's size. Half their time would be
# the demo's other three layers, compiled again and again.
SMALL = "little/16"  # no name that another project has
vit.VARIANTS["little"] = {
    "width": 32,
    "depth": 3,
    "num_heads": 2,
    "mlp_dim": 64,
    "image_size": 32,
}


def save_small_backbone(path, variant=SMALL):
    """A file of random weights, of a normalisation as the demo's."""
    model = vpt_jax.ViT(variant)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    save_backbone(
        path, randomised(params["params"], scale=0.05), {"normalisation": "half"}
    )
    return path


@pytest.fixture(scope="module")
def few_pictures():
    """A fifth of the tasks that are drawn: what is not optimised computes slowly."""
    from vpt_jax.bench import jobs
    from vpt_jax.data import tasks

    with pytest.MonkeyPatch.context() as patch:
        for name, num in (("NUM_TRAIN", 160), ("NUM_VAL", 40), ("MAX_TEST", 100)):
            patch.setattr(tasks, name, num)
        jobs._load_pictures.cache_clear()
        yield
    jobs._load_pictures.cache_clear()


ROOT = Path(__file__).parent.parent


def load_config(path, arg=""):
    """The ConfigDict of a config file."""
    return runpy.run_path(str(ROOT / path))["get_config"](arg)


def start_command(*args, python=("-m", "vpt_jax.main"), cwd=ROOT, **environment):
    """A command in a process of its own, on one device as users' are."""
    own = {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1", **QUICK, **environment}
    return subprocess.Popen(
        [sys.executable, *python, *args],
        cwd=cwd,
        env=os.environ | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(*args, **options):
    """`start_command` until it ends."""
    process = start_command(*args, **options)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(args, process.returncode, out, err)


@pytest.fixture
def getkey():
    """A function that returns a fresh random key at every call."""
    keys = iter(jax.random.split(jax.random.key(5678), 200))
    return lambda: next(keys)


def randomised(tree, seed=0, scale=0.2):
    """Adds noise to every leaf: fresh models have zero biases and unit scales."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [
        x + scale * jax.random.normal(k, x.shape, x.dtype)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(treedef, noisy)


def make_tiny(dtype=jnp.float32, param_dtype=jnp.float32, **sizes):
    sizes = {
        "width": 16,
        "depth": 3,
        "num_heads": 2,
        "mlp_dim": 24,
        "patch": 4,
        "image_size": 8,
        **sizes,
    }
    model = vpt_jax.ViT(dtype=dtype, param_dtype=param_dtype, **sizes)
    side = model.image_size
    images = jnp.zeros((1, side, side, 3), dtype)
    params = jax.jit(model.init)(jax.random.key(0), images)
    return model, randomised(params["params"])


def check_gates(model, backbone, trainable, batch):
    """The score `key_gate` is the central difference of a gate, in float64."""
    prompts, num = trainable["prompts"], vpt_jax.counts(trainable["prompts"])

    @jax.jit
    def losses(prompts, prompt_gate=None, prompt_mask=None):
        given = {"prompts": prompts, "prompt_gate": prompt_gate}
        given["prompt_mask"] = prompt_mask
        features, out = model.apply({"params": backbone}, batch["image"], **given)
        logits = vpt_jax.apply_head(trainable["head"], features)
        return vpt_jax.cross_entropy(logits, batch), out

    values = jax.jit(lambda p: example_values("key_gate", losses, p))(prompts)
    assert {v.dtype for v in values} == {jnp.dtype(jnp.float64)}
    eps = 1e-5
    for i, n in enumerate(num):
        for j in range(n):
            at = []
            for sign in (1, -1):
                gate = [jnp.ones(m) for m in num]
                gate[i] = gate[i].at[j].add(sign * eps)
                at.append(losses(prompts, prompt_gate=tuple(gate))[0])
            numeric = -(at[0] - at[1]) / (2 * eps)
            # Central differences: error of order eps**2 and rounding / eps.
            np.testing.assert_allclose(values[i][:, j], numeric, atol=1e-9)


@pytest.fixture(scope="session")
def tiny():
    """A ViT of depth 3 and width 16 with random parameters: `(model, backbone)`."""
    return make_tiny()
