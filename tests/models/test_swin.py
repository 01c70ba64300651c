# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import check_gates
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference_swin import features as reference_features
from test_vit import relative, some_mask

import vpt_jax
from vpt_jax.models.layers import KeyValue
from vpt_jax.models.swin import Swin
from vpt_jax.models.windows import exponentials, from_windows, to_windows

NUM = (3, 0, 4)  # most tests use these counts, so that little is compiled
SHALLOW = (4, 0, 0)
READOUTS = ("mean", "mean_with_prompts")
# 16 windows in the first stage, 4 in the second, whose last block is shifted.
SIZES = {
    "embed_dim": 8,
    "depths": (1, 2),
    "num_heads": (2, 4),
    "window": 4,
    "patch": 2,
    "image_size": 32,
    "mlp_ratio": 2,
}


def make_swin(dtype=jnp.float32, param_dtype=jnp.float32, **sizes):
    """A Swin with random parameters, also where fresh ones are 0 or 1."""
    model = Swin(**{**SIZES, **sizes}, dtype=dtype, param_dtype=param_dtype)
    images = jnp.zeros((1, model.image_size, model.image_size, 3), dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = 0.3 * rng.normal(size=leaf.shape)
        return jnp.asarray(noise + (path[-1].key == "scale"), leaf.dtype)

    return model, jax.tree.map_with_path(draw, shapes)


# Compiling is what takes time here; unoptimised it takes half.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make_run(model, backbone):
    """The compiled model's features: `run(images, prompts=...)`."""

    def features(*args, **kwargs):
        return model.apply(*args, **kwargs)[0]

    run = jit(features, static_argnames=("deep", "formulation"))
    # What one call leaves out and another gives would be compiled twice.
    given = dict.fromkeys(("prompts", "prompt_mask", "prompt_gate"))
    given |= {"deep": True, "formulation": "kv"}
    return functools.partial(run, {"params": backbone}, **given)


def make_prompts(model, num=NUM, seed=1):
    """Prompts large enough to change the answer visibly."""
    prompts = vpt_jax.init_prompts(jax.random.key(seed), model, num)
    return jax.tree.map(lambda p: 5 * p, prompts)


@pytest.fixture(scope="module")
def backbone():
    return make_swin()[1]


@pytest.fixture(scope="module", params=READOUTS)
def swin(request, backbone):
    """`(model, run)` for either read-out."""
    model = Swin(**SIZES, readout=request.param)
    return model, make_run(model, backbone)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(2), (3, 32, 32, 3))


as64 = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))


def reference(backbone, images, *args):
    """Features of each picture by the reference."""
    backbone = as64(backbone)
    return [reference_features(backbone, image, *args) for image in as64(images)]


# --- the network ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num", "deep"), [(None, True), (NUM, True), ((0, 2, 0), True), (SHALLOW, False)]
)
def test_agrees_with_a_float64_reference_in_numpy(swin, backbone, images, num, deep):
    model, run = swin
    prompts = None if num is None else make_prompts(model, num)
    got = run(images, prompts=prompts, deep=deep)
    how = 4, as64(prompts), deep, model.readout == "mean_with_prompts"
    assert relative(got[:1], reference(backbone, images[:1], *how)) < 1e-5


def test_a_stage_smaller_than_a_window_is_one_window():
    """Sides 4 and 2 with windows of 4: no shift, and a smaller table."""
    model, backbone = make_swin(image_size=8)
    shapes = [
        backbone[f"blocks_{i}_0"]["attention"]["relative_position_bias_table"].shape
        for i in (0, 1)
    ]
    assert shapes == [(49, 2), (9, 4)]
    images = jax.random.normal(jax.random.key(2), (2, 8, 8, 3))
    prompts = make_prompts(model)
    got = make_run(model, backbone)(images, prompts=prompts)
    assert relative(got, reference(backbone, images, 4, as64(prompts))) < 1e-5


def test_bigger_pictures_take_the_same_parameters(backbone):
    model = Swin(**{**SIZES, "image_size": 0})
    assert model.image_size == 16  # the last stage fills a window
    images = jax.random.normal(jax.random.key(2), (2, 16, 16, 3))
    got = make_run(model, backbone)(images)
    assert relative(got, reference(backbone, images, 4)) < 1e-5


def test_windows_are_squares_of_the_rolled_picture():
    x = jnp.arange(16.0).reshape(1, 16, 1)
    windows = to_windows(x, 2, 1)
    assert windows[0, 0, :, 0].tolist() == [5, 6, 9, 10]
    assert windows[0, 3, :, 0].tolist() == [15, 12, 3, 0]
    np.testing.assert_array_equal(from_windows(windows, 1), x)


# --- prompts --------------------------------------------------------------------------


def test_key_value_formulation_equals_token_formulation(swin, backbone, images):
    """In features, gradients, and what is reported of the blocks."""
    model, _ = swin
    prompts = make_prompts(model)

    def loss(prompts, mask, formulation):
        given = {"prompt_mask": mask, "formulation": formulation}
        variables = {"params": backbone}
        features, out = model.apply(variables, images, prompts=prompts, **given)
        return jnp.sin(features).sum(), (features, out["blocks"])

    grad = jit(jax.grad(loss, has_aux=True), static_argnums=2)
    everything = tuple(jnp.ones(n, bool) for n in NUM)
    for mask in (everything, some_mask(prompts)):
        kv, tokens = (grad(prompts, mask, name) for name in ("kv", "tokens"))
        assert relative(kv[1][0], tokens[1][0]) < 1e-5
        for a, b in zip(kv[0], tokens[0], strict=True):
            if a.size:
                assert np.abs(b).max() > 0
                assert relative(a, b) < 1e-5
    blocks, others = kv[1][1], tokens[1][1]
    sizes = zip((2, 4, 4), (256, 64, 64), NUM, strict=True)
    for i, (h, t, n) in enumerate(sizes):
        assert blocks[i]["tokens"].shape == (3, t, model.widths[i])
        assert blocks[i]["prompt_attention"].shape == (3, h, t, n)
        assert others[i]["prompts"].shape == (3, n, model.widths[i])
        for name in ("tokens", "prompt_attention"):
            np.testing.assert_allclose(blocks[i][name], others[i][name], atol=2e-5)
    with_outputs = [i for i, block in enumerate(blocks) if "prompts" in block]
    assert with_outputs == ([] if model.readout == "mean" else [2])


@pytest.fixture(scope="module")
def gradient(backbone, images):
    """By `remat` and formulation: a gradient, and how often its program has a remat."""

    @functools.cache
    def found(remat, formulation):
        model = Swin(**SIZES, remat=remat)
        prompts = make_prompts(model, (2, 1, 3))

        def loss(prompts):
            given = {"prompts": prompts, "formulation": formulation}
            return jnp.sin(model.apply({"params": backbone}, images, **given)[0]).sum()

        traced = jax.jit(jax.grad(loss)).trace(prompts)
        return traced.lower().compile()(prompts), str(traced.jaxpr).count("remat")

    return found


@pytest.mark.parametrize("remat", ["attention", "block"])
@pytest.mark.parametrize(
    "formulation", ["kv", pytest.param("tokens", marks=pytest.mark.slow)]
)
def test_remat_changes_no_number_and_keeps_less(gradient, remat, formulation):
    plain, before = gradient("none", formulation)
    again, after = gradient(remat, formulation)
    assert after > before
    for a, b in zip(plain, again, strict=True):
        # The same sums, which XLA may fuse in another order.
        assert np.abs(a).max() > 0 and relative(b, a) < 1e-5


@pytest.mark.parametrize("deep", [True, False])
def test_mask_equals_condense_and_a_zero_gate_is_no_prompt(swin, images, deep):
    model, run = swin
    num = NUM if deep else SHALLOW
    prompts = make_prompts(model, num)
    plain = run(images)
    run = functools.partial(run, images, deep=deep)
    some, every = some_mask(prompts), tuple(jnp.ones(n, bool) for n in num)
    zeros, ones = (tuple(jnp.full((3, n), x) for n in num) for x in (0.0, 1.0))
    masked = run(prompts=prompts, prompt_mask=some, prompt_gate=ones)
    gated = run(prompts=prompts, prompt_mask=every, prompt_gate=zeros)
    untouched = run(prompts=prompts, prompt_mask=every, prompt_gate=ones)
    assert relative(masked, run(prompts=vpt_jax.condense(prompts, some))) < 1e-5
    assert relative(gated, plain) < 1e-5
    assert relative(untouched, run(prompts=prompts)) < 1e-6
    assert relative(masked, untouched) > 1e-3


def test_no_prompts_and_empty_prompts_are_the_plain_model_exactly(swin, images):
    model, run = swin
    empty = tuple(jnp.zeros((0, width)) for width in model.widths)
    np.testing.assert_array_equal(run(images), run(images, prompts=empty))


def test_prefilled_keys_and_values_replace_prompts(swin, backbone, images):
    model, run = swin
    prompts = make_prompts(model)
    prefill = jit(functools.partial(model.apply, method="prefill"))
    ready = prefill({"params": backbone}, prompts)
    kinds = [isinstance(p, KeyValue) for p in ready]
    assert kinds == [True, True, model.readout == "mean"]
    assert ready[0].key.shape == (2, 3, 4)
    mask = some_mask(prompts)
    expected = run(images, prompts=prompts, prompt_mask=mask)
    assert relative(run(images, prompts=ready, prompt_mask=mask), expected) < 1e-6


@pytest.mark.parametrize("formulation", ["kv", "tokens"])
def test_prompts_may_differ_from_example_to_example(swin, images, formulation):
    model, run = swin
    sets = [make_prompts(model, seed=seed) for seed in range(len(images))]
    own = jax.tree.map(lambda *p: jnp.stack(p), *sets)
    together = run(images, prompts=own, formulation=formulation)
    for i, prompts in enumerate(sets):
        alone = run(images, prompts=prompts)
        assert relative(together[i], alone[i]) < 1e-5


@pytest.mark.parametrize("deep", [True, False])
def test_examples_of_a_batch_do_not_meet(swin, images, deep):
    """The released code mixes them in VPT-Shallow when there are several windows."""
    model, run = swin
    prompts = make_prompts(model, NUM if deep else SHALLOW)
    run = functools.partial(run, prompts=prompts, deep=deep)
    before = run(images)
    after = run(images.at[1].multiply(-3.0))
    np.testing.assert_allclose(after[0], before[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(after[2], before[2], rtol=0, atol=1e-6)
    assert relative(after[1], before[1]) > 1e-2


def test_one_compilation_serves_every_mask(swin, images):
    model, run = swin
    prompts = make_prompts(model)
    compiled = run.func
    run(images, prompts=prompts, prompt_mask=some_mask(prompts))
    before = compiled._cache_size()
    for ratio in (0.2, 0.5, 1.0):
        scores = tuple(jnp.arange(float(n)) for n in NUM)
        mask = vpt_jax.keep_mask(scores, keep_ratio=ratio)
        run(images, prompts=prompts, prompt_mask=mask)
    assert compiled._cache_size() == before


def test_removed_keys_cannot_starve_or_overflow_the_softmax():
    own = jnp.full((1, 1, 1, 1, 2), -60.0)
    extra = jnp.array([500.0, -60.0]).reshape(1, 1, 1, 1, 2)

    def share(weight):
        (a, b), total = exponentials([(own, None), (extra, weight)])
        return (b / total).sum(), (a / total).ravel()

    weight = jnp.array([[0.0, 1.0]])
    given, kept = share(weight)
    np.testing.assert_allclose(kept, 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(given, 1 / 3, rtol=1e-6)
    assert np.isfinite(jax.grad(lambda w: share(w)[0])(weight)).all()


def test_bfloat16_follows_float32(backbone, images):
    model = Swin(**SIZES)
    prompts = make_prompts(model)
    half = jit(model.clone(dtype=jnp.bfloat16).apply)
    features, out = half({"params": backbone}, images, prompts=prompts)
    block = out["blocks"][2]
    assert features.dtype == block["tokens"].dtype == jnp.bfloat16
    assert block["prompt_attention"].dtype == jnp.float32
    # bfloat16 has 8 bits: 2**-8 per operation, a few tens of operations deep.
    expected = reference(backbone, images[:1], 4, as64(prompts))
    assert relative(features[:1].astype(jnp.float32), expected) < 0.05


def test_eight_devices_agree_with_one(backbone):
    model = Swin(**SIZES, readout="mean_with_prompts")
    images = jax.random.normal(jax.random.key(3), (8, 32, 32, 3))
    prompts = make_prompts(model)

    @jit
    def loss_and_grad(prompts, backbone, images):
        def loss(prompts):
            out = model.apply({"params": backbone}, images, prompts=prompts)
            return jnp.sin(out[0]).mean()

        return jax.value_and_grad(loss)(prompts)

    alone = loss_and_grad(prompts, backbone, images)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        everywhere = NamedSharding(mesh, P())
        spread = jax.device_put(images, NamedSharding(mesh, P("data")))
        together = loss_and_grad(
            *jax.device_put((prompts, backbone), everywhere), spread
        )
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        if a.size:
            assert relative(b, a) < 1e-5


# --- condensation ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem(backbone):
    """`(model, backbone, trainable, batch)` with prompts that matter."""
    model = Swin(**{**SIZES, "image_size": 16}, readout="mean_with_prompts")
    trainable = {
        "prompts": make_prompts(model),
        "head": vpt_jax.init_head(jax.random.key(4), model.width, 4),
    }
    batch = {
        "image": jax.random.normal(jax.random.key(5), (4, 16, 16, 3)),
        "label": jnp.array([0, 3, 1, 2]),
    }
    return model, backbone, trainable, batch


def test_key_gate_gradient_is_the_central_difference_in_float64(problem):
    _, backbone, trainable, batch = problem
    with jax.enable_x64(True):
        given = as64((backbone, trainable, batch["image"]))
        backbone, trainable, image = jax.tree.map(jnp.asarray, given)
        model = problem[0].clone(dtype=jnp.float64, param_dtype=jnp.float64)
        batch = {**batch, "image": image}
        check_gates(model, backbone, trainable, batch)


@pytest.mark.parametrize(
    ("score", "deep"),
    [
        ("removal", True),
        ("key_gate", False),
        ("attention", False),
    ],
)
def test_prompts_are_scored_kept_and_condensed(problem, score, deep):
    model, backbone, trainable, batch = problem
    num = NUM if deep else SHALLOW
    trainable = {**trainable, "prompts": make_prompts(model, num)}
    scores = vpt_jax.importance(
        model, backbone, trainable, [batch], score=score, deep=deep
    )
    assert tuple(s.shape[0] for s in scores) == num
    assert all(np.ptp(s) > 0 for s in scores if s.size)
    mask = vpt_jax.keep_mask(scores, keep_ratio=0.5)
    small = vpt_jax.condense(trainable["prompts"], mask)
    assert sum(vpt_jax.counts(small)) == sum(m.sum() for m in mask)


# --- sizes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [  # without head, as timm counts them
        ("T", 27_519_354),
        ("S", 48_837_258),
        ("Swin-B", 86_743_224),
        ("Swin-L", 194_995_476),
    ],
)
def test_parameter_counts(variant, parameters):
    model = Swin(variant)
    assert model.image_size == 224
    images = jnp.zeros((1, 224, 224, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    assert sum(x.size for x in jax.tree.leaves(params)) == parameters


def test_prompts_of_swin_b():
    model = Swin("B")
    assert (model.variant, model.depth, model.width) == ("Swin-B", 24, 1024)
    assert model.widths == (128,) * 2 + (256,) * 2 + (512,) * 18 + (1024,) * 2
    prompts = vpt_jax.init_prompts(jax.random.key(0), model, 10)
    assert sum(p.size for p in prompts) == 12_032 * 10
    for p in prompts:  # one bound for all stages
        assert 0.95 * 0.18464 < np.abs(p).max() < 1.0005 * 0.18464


def test_sizes_survive_clone_and_override_a_variant():
    model = Swin("T", window=12, readout="mean_with_prompts")
    assert (model.image_size, model.depths) == (384, (2, 2, 6, 2))
    assert model.clone() == model
    assert hash(model.clone()) == hash(model)
    assert model.clone(dtype=jnp.bfloat16).variant == "Swin-T"
    assert Swin("T", depths=[2, 2, 2, 2]).depth == 8
    assert Swin("T", image_size=448).image_size == 448


def test_tables_do_not_change_with_the_picture():
    def shapes(image_size):
        images = jnp.zeros((1, image_size, image_size, 3))
        model = Swin("T", depths=(2, 1, 1, 2), image_size=image_size)
        return jax.eval_shape(model.init, jax.random.key(0), images)

    assert shapes(224) == shapes(448)


def test_param_dtype_is_that_of_the_parameters():
    model = Swin(**SIZES, param_dtype=jnp.bfloat16)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


# --- errors: got, expected, what to do ------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"variant": "B/16"}, "unknown variant 'B/16'; known: Swin-T, Swin-S"),
        ({"embed_dim": 8}, "needs embed_dim, depths, num_heads"),
        ({"variant": "T", "window": -7}, "at least 1"),
        ({"variant": "T", "readout": "cls"}, "unknown readout 'cls'"),
        ({"variant": "T", "remat": "all"}, "unknown remat 'all'"),
        ({"variant": "T", "num_heads": (3, 6)}, r"\(3, 6\) but there are 4 stages"),
        ({"variant": "T", "num_heads": (3, 6, 12, 25)}, "stage 3 has width 768"),
        ({"variant": "T", "image_size": 256}, "image_size 256.*work: 224, 448"),
        ({"variant": "T", "image_size": 200}, "image_size 200.*work: 224"),
        ({**SIZES, "image_size": 34}, "image_size 34.*work: 32, 48"),
    ],
)
def test_wrong_models(sizes, message):
    with pytest.raises(ValueError, match=message):
        Swin(**sizes)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"images": jnp.zeros((2, 16, 16, 3))}, r"\(2, 16, 16, 3\).*\[b, 32, 32, 3\]"),
        ({"prompts": (jnp.zeros((2, 8)),) * 3}, r"prompts\[1\].*width 16"),
    ],
)
def test_wrong_calls(backbone, kwargs, message):
    images = kwargs.pop("images", jnp.zeros((2, 32, 32, 3)))
    with pytest.raises(ValueError, match=message):
        Swin(**SIZES).apply({"params": backbone}, images, **kwargs)


def test_prompts_that_are_read_are_not_prefilled(backbone):
    model = Swin(**SIZES)
    prompts = make_prompts(model)
    ready = model.apply({"params": backbone}, prompts, method="prefill")
    reads = model.clone(readout="mean_with_prompts")
    with pytest.raises(ValueError, match="reads their outputs"):
        reads.apply({"params": backbone}, jnp.zeros((1, 32, 32, 3)), prompts=ready)
