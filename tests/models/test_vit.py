# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from conftest import make_tiny
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import vpt_jax
from vpt_jax.models.attention import attend
from vpt_jax.models.xla import gelu, swiglu, weighted_exp

# Float32 sums in another order: 1e-5 relative to the largest value.
close = functools.partial(np.testing.assert_allclose, rtol=0)


NUM, SHALLOW = (3, 0, 4), (4, 0, 0)  # the same everywhere, so that little is compiled


def make_run(model, backbone):
    """The compiled model: `run(images, prompts=...)`."""
    run = jax.jit(model.apply, static_argnames=("deep", "formulation"))
    # What one call leaves out and another gives would be compiled twice.
    given = dict.fromkeys(("prompts", "prompt_mask", "prompt_gate"))
    given |= {"deep": True, "formulation": "kv"}
    return functools.partial(run, {"params": backbone}, **given)


@pytest.fixture(scope="module")
def run(tiny):
    return make_run(*tiny)


def big_prompts(key, model, num):
    """Prompts large enough to change the answer visibly."""
    prompts = vpt_jax.init_prompts(key, model, num)
    return jax.tree.map(lambda p: 5 * p, prompts)


def some_mask(prompts):
    return tuple(jnp.arange(p.shape[0]) % 2 == 0 for p in prompts)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.fixture
def images(getkey):
    return jax.random.normal(getkey(), (5, 8, 8, 3))


def test_formulations_report_the_same_prompt_attention(tiny, run, images, getkey):
    model, backbone = tiny
    prompts = big_prompts(getkey(), model, NUM)
    run = functools.partial(run, images, prompts=prompts)
    kv = run()[1]["blocks"]
    tokens = run(formulation="tokens")[1]["blocks"]
    for i, n in enumerate(NUM):
        q = 1 if i == 2 else 5  # the last key-value block only computes the class token
        assert kv[i]["prompt_attention"].shape == (5, 2, q, n)
        close(
            kv[i]["prompt_attention"],
            tokens[i]["prompt_attention"][:, :, :q],
            atol=1e-6,
        )
        close(kv[i]["tokens"], tokens[i]["tokens"][:, :q], atol=1e-5)


@pytest.mark.parametrize("deep", [True, False])
def test_a_gate_of_zero_removes_and_one_of_one_or_a_zero_prompt_does_not(
    tiny, run, images, getkey, deep
):
    num = NUM if deep else SHALLOW
    prompts = big_prompts(getkey(), tiny[0], num)
    run = functools.partial(run, images, deep=deep)
    plain, whole = run()[0], run(prompts=prompts)[0]
    zeros, ones = (tuple(jnp.full(n, x) for n in num) for x in (0.0, 1.0))
    assert relative(run(prompts=prompts, prompt_gate=zeros)[0], plain) < 1e-5
    assert relative(run(prompts=prompts, prompt_gate=ones)[0], whole) < 1e-6
    zeroed, _ = run(prompts=jax.tree.map(jnp.zeros_like, prompts))
    assert relative(zeroed, plain) > 1e-2


def test_no_prompts_and_empty_prompts_are_the_plain_model_exactly(run, images):
    empty = tuple(jnp.zeros((0, 16)) for _ in range(3))
    plain, _ = run(images)
    prompted, _ = run(images, prompts=empty)
    np.testing.assert_array_equal(plain, prompted)


def test_order_of_prompts_within_a_layer_does_not_matter(tiny, run, images, getkey):
    model, backbone = tiny
    prompts = big_prompts(getkey(), model, NUM)
    order = tuple(jax.random.permutation(getkey(), p) for p in prompts)
    a, _ = run(images, prompts=prompts)
    b, _ = run(images, prompts=order)
    assert relative(a, b) < 1e-5


def test_shallow_prompts_evolve_and_deep_ones_are_replaced(tiny, run, images, getkey):
    model, backbone = tiny
    prompts = big_prompts(getkey(), model, SHALLOW)
    shallow, _ = run(images, prompts=prompts, deep=False)
    deep, _ = run(images, prompts=prompts)
    assert relative(shallow, deep) > 1e-3


def test_with_one_layer_shallow_is_deep(getkey):
    model, backbone = make_tiny(depth=1)
    run = make_run(model, backbone)
    images = jax.random.normal(getkey(), (2, 8, 8, 3))
    prompts = big_prompts(getkey(), model, 4)
    shallow, _ = run(images, prompts=prompts, deep=False)
    deep, _ = run(images, prompts=prompts)
    assert relative(shallow, deep) < 1e-5


@pytest.mark.parametrize("formulation", ["kv", "tokens"])
def test_prompts_may_differ_from_example_to_example(
    tiny, run, images, getkey, formulation
):
    sets = [big_prompts(getkey(), tiny[0], NUM) for _ in images]
    own = jax.tree.map(lambda *p: jnp.stack(p), *sets)
    together, _ = run(images, prompts=own, formulation=formulation)
    alone = [run(images, prompts=p)[0][i] for i, p in enumerate(sets)]
    assert relative(together, alone) < 1e-5


def test_bfloat16_follows_float32(tiny, run, images, getkey):
    model, backbone = tiny
    half = model.clone(dtype=jnp.bfloat16)
    prompts = big_prompts(getkey(), model, NUM)
    a, _ = run(images, prompts=prompts)
    b, out = make_run(half, backbone)(images, prompts=prompts)
    assert b.dtype == jnp.bfloat16 and out["blocks"][0]["tokens"].dtype == jnp.bfloat16
    # bfloat16 has 8 bits: 2**-8 per operation, a few tens of operations deep.
    assert relative(b.astype(jnp.float32), a) < 0.05


def test_param_dtype_is_that_of_the_parameters():
    model = vpt_jax.ViT("demo/4", param_dtype=jnp.bfloat16)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_removed_keys_cannot_starve_or_overflow_the_softmax():
    q = jnp.full((1, 1, 1, 4), 30.0)
    k = jnp.stack([jnp.full(4, -1.0), jnp.full(4, 2.0)])[None, None]
    v = jnp.array([[1.0], [5.0]])[None, None]
    weight = jnp.array([[1.0, 0.0]])

    def out(weight):
        return attend(q, k, v, weight)[0].sum()

    assert out(weight) == 1.0
    assert np.isfinite(jax.grad(out)(weight)).all()


@pytest.mark.parametrize("activation", [gelu, swiglu])
def test_a_backward_pass_keeps_the_input_of_an_activation_alone(activation):
    with jax.enable_x64(True):
        x = 2 * jax.random.normal(jax.random.key(0), (5, 8), jnp.float64)
        check_grads(activation, (x,), order=2, rtol=1e-6)
        kept = jax.tree.leaves(jax.vjp(activation, x)[1])
    assert sum(value.size for value in kept) == x.size


BLOCK = """LayerNorm_0/bias LayerNorm_0/scale LayerNorm_1/bias LayerNorm_1/scale
MlpBlock_0/Dense_0/bias MlpBlock_0/Dense_0/kernel
MlpBlock_0/Dense_1/bias MlpBlock_0/Dense_1/kernel
MultiHeadDotProductAttention_0/key/bias MultiHeadDotProductAttention_0/key/kernel
MultiHeadDotProductAttention_0/out/bias MultiHeadDotProductAttention_0/out/kernel
MultiHeadDotProductAttention_0/query/bias MultiHeadDotProductAttention_0/query/kernel
MultiHeadDotProductAttention_0/value/bias MultiHeadDotProductAttention_0/value/kernel
""".split()


def test_parameter_paths_and_shapes_are_those_of_vit_jax(tiny):
    _, backbone = tiny
    flat = vpt_jax.weights.release.flatten(backbone)
    expected = {f"Transformer/encoderblock_{i}/{n}" for i in range(3) for n in BLOCK}
    expected |= {
        "Transformer/encoder_norm/bias",
        "Transformer/encoder_norm/scale",
        "Transformer/posembed_input/pos_embedding",
        "cls",
        "embedding/bias",
        "embedding/kernel",
    }
    assert set(flat) == expected
    block = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0"
    assert flat[f"{block}/query/kernel"].shape == (16, 2, 8)
    assert flat[f"{block}/query/bias"].shape == (2, 8)
    assert flat[f"{block}/out/kernel"].shape == (2, 8, 16)
    assert flat["embedding/kernel"].shape == (4, 4, 3, 16)
    assert flat["cls"].shape == (1, 1, 16)
    assert flat["Transformer/posembed_input/pos_embedding"].shape == (1, 5, 16)


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [  # without head, as timm and the VPT paper count them
        ("Ti/16", 5_524_416),
        ("S/16", 21_665_664),
        ("B/16", 85_798_656),
        ("B/32", 87_455_232),
        ("L/16", 303_301_632),
        ("H/14", 630_764_800),
        ("demo/4", 1_204_608),
    ],
)
def test_parameter_counts(variant, parameters):
    model = vpt_jax.ViT(variant)
    side = model.image_size
    params = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, side, side, 3))
    )
    assert sum(x.size for x in jax.tree.leaves(params)) == parameters


@pytest.mark.parametrize(("variant", "millions"), [("S+/16", 29), ("7B/16", 6716)])
def test_parameter_counts_of_dinov3(variant, millions):
    """As its authors round them; of the smallest and the largest gated one."""
    options = {"posemb": "rotary", "registers": 4, "layer_scale": True}
    model = vpt_jax.ViT(variant, **options)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    assert abs(sum(x.size for x in jax.tree.leaves(params)) / 1e6 - millions) < 1


def test_eight_devices_agree_with_one(tiny, getkey):
    """Under the caller's mesh; the command's own is in `test_parallel.py`."""
    model, backbone = tiny
    images = jax.random.normal(getkey(), (16, 8, 8, 3))
    prompts = big_prompts(getkey(), model, NUM)

    @jax.jit
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
    assert together[1][0].sharding.is_fully_replicated
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        if a.size:
            assert relative(b, a) < 1e-5


# --- prompts and head ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "bound"),
    [("B/16", 0.0625), ("B/32", 0.03953), ("L/16", 0.05786), ("H/14", 0.05667)],
)
def test_prompts_start_uniform_within_the_reference_bound(variant, bound):
    model = vpt_jax.ViT(variant)
    prompts = vpt_jax.init_prompts(jax.random.key(0), model, 20)
    values = np.concatenate([np.ravel(p) for p in prompts])
    assert vpt_jax.counts(prompts) == (20,) * model.depth
    assert np.abs(values).max() <= bound * 1.0005
    assert np.abs(values).max() > 0.999 * bound
    # Standard deviation of a uniform: bound / sqrt(3); 1 % at 200,000 numbers.
    np.testing.assert_allclose(values.std(), bound / 3**0.5, rtol=0.01)
    assert not np.array_equal(prompts[0], prompts[1])


def test_head_starts_as_the_reference_does():
    head = vpt_jax.init_head(jax.random.key(0), 768, 100)
    np.testing.assert_allclose(head["bias"], -4.59512, rtol=1e-6)
    np.testing.assert_allclose(np.std(head["kernel"]), 0.02**0.5, rtol=0.02)


@pytest.mark.parametrize("batch", [(20,), ()], ids=["per example", "shared"])
def test_dropout_keeps_the_mean_and_every_step_and_example_has_its_own(batch):
    """Shared dropout has no batch axis: one mask for all examples."""
    prompts = (jnp.ones((40, 500)), jnp.ones((0, 50)))

    def dropped(seed):
        batch_size = batch[0] if batch else None
        return vpt_jax.prompt_dropout(jax.random.key(seed), prompts, 0.1, batch_size)

    some, again = dropped(0), dropped(1)
    assert [p.shape for p in some] == [(*batch, 40, 500), (*batch, 0, 50)]
    values = np.asarray(some[0])
    assert set(np.unique(values)) == {np.float32(0), np.float32(1 / 0.9)}
    # At least 20,000 draws: standard error 0.0024 of the mean.
    np.testing.assert_allclose(values.mean(), 1, atol=0.01)
    assert not np.array_equal(values, again[0])
    assert not batch or not np.array_equal(values[0], values[1])


@pytest.mark.parametrize("batch_size", [2, None])
def test_what_a_prompt_drops_does_not_depend_on_the_others(batch_size):
    def dropped(*shapes):
        prompts = tuple(map(jnp.ones, shapes))
        return vpt_jax.prompt_dropout(jax.random.key(0), prompts, 0.5, batch_size)

    # Layers of two widths, and more prompts than a CPU draws at a time.
    some = dropped((3, 24), (0, 24), (90, 16), (5, 24))
    more = dropped((0, 24), (7, 16), (70, 16), (9, 24))
    np.testing.assert_array_equal(some[2][..., :70, :], more[2])
    np.testing.assert_array_equal(some[3], more[3][..., :5, :])
    rows = [r.tobytes() for p in some for r in np.moveaxis(p, -2, 0)]
    assert len(set(rows)) == len(rows) == 98


def test_dropout_draws_the_same_on_every_platform(monkeypatch):
    """Not a CPU alone draws 64 prompts at a time."""
    prompts = (jnp.ones((90, 16)), jnp.ones((3, 8)))
    drop = functools.partial(vpt_jax.prompt_dropout, jax.random.key(0), prompts, 0.5, 3)
    ours, taken = drop(), []

    def elsewhere(*args, cpu, default):
        taken.append(default)
        return default(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", elsewhere)
    for a, b in zip(ours, drop(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(taken) == 2


# --- position table -----------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (14, 24), (3, 3), (2, 5)])
def test_corner_aligned_resize_is_scipy_zoom(getkey, old, new):
    table = jax.random.normal(getkey(), (1, 1 + old * old, 6))
    got = vpt_jax.resize_pos_embedding(table, new)
    grid = np.asarray(table[0, 1:]).reshape(old, old, 6)
    expected = scipy.ndimage.zoom(grid, (new / old, new / old, 1), order=1)
    np.testing.assert_array_equal(got[:, 0], table[:, 0])
    np.testing.assert_allclose(got[0, 1:].reshape(new, new, 6), expected, atol=2e-6)


def test_half_pixel_resize_by_two_is_quarters():
    column = jnp.array([0.0, 1.0, 2.0, 3.0]).reshape(2, 2, 1)
    table = jnp.concatenate([jnp.zeros((1, 1, 1)), column.reshape(1, 4, 1)], axis=1)
    got = vpt_jax.resize_pos_embedding(table, 4, "half_pixel")[0, 1:, 0].reshape(4, 4)
    np.testing.assert_allclose(got[0], [0, 0.25, 0.75, 1.0], atol=1e-6)
    np.testing.assert_allclose(got[:, 0], [0, 0.5, 1.5, 2.0], atol=1e-6)


# --- errors: got, expected, what to do ----------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vpt_jax.ViT("Q16"), "unknown variant 'Q16'"),
        (lambda: vpt_jax.ViT("XL/16"), "unknown variant 'XL/16'"),
        (lambda: vpt_jax.ViT(width=8), "needs depth, num_heads, mlp_dim, patch"),
        (lambda: vpt_jax.ViT("B/16", image_size=230), "not a multiple of patch 16"),
        (lambda: vpt_jax.ViT("B/16", num_heads=7), "not a multiple of num_heads 7"),
    ],
)
def test_wrong_models(make, message):
    with pytest.raises(ValueError, match=message):
        make()


PROMPTS, MASK = (jnp.zeros((2, 16)),) * 3, (jnp.ones(2, bool),) * 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"images": jnp.zeros((2, 9, 8, 3))}, r"\(2, 9, 8, 3\).*\[b, 8, 8, 3\]"),
        ({"prompts": PROMPTS[:2]}, "have 2 layers.*depth 3"),
        (
            {"prompts": (*PROMPTS[:2], jnp.zeros((2, 12)))},
            r"prompts\[2\] has shape \(2, 12\).*width 16.*another backbone",
        ),
        (
            {"prompts": PROMPTS, "prompt_mask": (*MASK[:2], jnp.ones(1, bool))},
            r"prompt_mask has \(2, 2, 1\).*\(2, 2, 2\)",
        ),
        ({"prompts": PROMPTS, "deep": False}, r"counts \(2, 2, 2\) with deep=False"),
        ({"prompts": PROMPTS, "formulation": "kw"}, "unknown formulation 'kw'"),
        ({"prompt_mask": MASK}, "need prompts; got None"),
    ],
)
def test_wrong_calls(tiny, kwargs, message):
    model, backbone = tiny
    given = {"images": jnp.zeros((2, 8, 8, 3)), **kwargs}
    with pytest.raises(ValueError, match=message):
        model.apply({"params": backbone}, **given)


def test_prefilled_prompts_are_not_tokens(tiny):
    model, backbone = tiny
    how = {"prompts": vpt_jax.prefill(*tiny, PROMPTS), "formulation": "tokens"}
    with pytest.raises(ValueError, match="pass the prompts themselves"):
        model.apply({"params": backbone}, jnp.zeros((2, 8, 8, 3)), **how)


start = functools.partial(vpt_jax.init_prompts, jax.random.key(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: start(m, (1, 2)), "2 entries"),
        (lambda m: start(m, -1), "num_prompts is -1; expected an integer >= 0"),
        (lambda m: start(m, (1, 2, 0), deep=False), "later counts must be 0"),
        (lambda m: vpt_jax.init_head(jax.random.key(0), 8, 1), "integer >= 2"),
        (
            lambda m: vpt_jax.prompt_dropout(jax.random.key(0), (), 1.0, 2),
            r"must be in \[0, 1\)",
        ),
        (
            lambda m: vpt_jax.resize_pos_embedding(jnp.zeros((1, 4, 2)), 2),
            r"\(1, 4, 2\); expected \[1, 1 \+ n \* n, d\]",
        ),
        (
            lambda m: vpt_jax.resize_pos_embedding(jnp.zeros((1, 5, 2)), 2, "cubic"),
            "unknown method 'cubic'",
        ),
    ],
)
def test_wrong_arguments(tiny, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny[0])


def test_weighted_exp_has_the_derivatives_of_its_formula():
    """By weight, by argument and by both; and removed keys far above are exactly 0."""
    rng = np.random.default_rng(0)
    w, x = rng.uniform(0.5, 2.0, (2, 1, 1, 5)), -rng.uniform(0.0, 3.0, (2, 3, 4, 5))
    with jax.enable_x64(True):
        w, x = jnp.asarray(w), jnp.asarray(x)
        for f, args in (
            (weighted_exp, (w, x)),
            (lambda w: weighted_exp(jnp.asarray(w), x), (w,)),
            (lambda x: weighted_exp(w, jnp.asarray(x)), (x,)),
        ):
            check_grads(lambda *a, f=f: f(*map(jnp.asarray, a)), args, order=2)
        np.testing.assert_allclose(weighted_exp(w, x), w * np.exp(x), rtol=1e-12)
    far = jnp.array([1000.0])
    value, slope = jax.value_and_grad(lambda x: weighted_exp(jnp.zeros(1), x)[0])(far)
    assert value == 0 and slope == 0
