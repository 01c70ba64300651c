# SPDX-License-Identifier: Apache-2.0
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import check_gates, make_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import vpt_jax
from vpt_jax.condense import REDUCTIONS, _batch_values
from vpt_jax.models.layers import Attention

NUM = (3, 0, 5)
# One of each branch: the others differ in what is made of the same derivatives.
BRANCHES = ["removal", "grad_norm", "attention", "leave_one_out"]


@pytest.fixture(scope="module")
def problem(tiny):
    """`(model, backbone, trainable, batch)` with prompts that matter."""
    model, backbone = tiny
    keys = jax.random.split(jax.random.key(1), 4)
    prompts = vpt_jax.init_prompts(keys[0], model, NUM)
    trainable = {
        "prompts": jax.tree.map(lambda p: 5 * p, prompts),
        "head": vpt_jax.init_head(keys[1], model.width, 4),
    }
    batch = {
        "image": jax.random.normal(keys[2], (7, 8, 8, 3)),
        "label": jax.random.randint(keys[3], (7,), 0, 4),
    }
    return model, backbone, trainable, batch


@pytest.fixture(scope="module")
def shallow(problem):
    """The same with prompts of the first layer alone."""
    model, backbone, trainable, batch = problem
    prompts = (trainable["prompts"][2], jnp.zeros((0, 16)), jnp.zeros((0, 16)))
    return model, backbone, {**trainable, "prompts": prompts}, batch


@functools.partial(jax.jit, static_argnames=("model", "formulation", "deep"))
def apply(model, backbone, image, **kwargs):
    return model.apply({"params": backbone}, image, **kwargs)


def loss_of(problem, apply=apply, **kwargs):
    """Losses, straight from the model."""
    model, backbone, trainable, batch = problem
    kwargs = {"prompts": trainable["prompts"], **kwargs}
    features, _ = apply(model, backbone, batch["image"], **kwargs)
    logits = vpt_jax.apply_head(trainable["head"], features)
    return vpt_jax.cross_entropy(logits, batch)


def scored(problem, batches=None, **options):
    batches = [problem[3]] if batches is None else batches
    return vpt_jax.importance(*problem[:3], batches, **options)


def flat(scores):
    return np.concatenate([np.asarray(s, np.float64) for s in scores])


# --- scores against independent formulations -----------------------------------------


def test_key_gate_gradient_is_the_central_difference_in_float64():
    with jax.enable_x64(True):
        as64 = functools.partial(
            jax.tree.map, lambda x: jnp.asarray(np.asarray(x), jnp.float64)
        )
        model, backbone = make_tiny(dtype=jnp.float64, param_dtype=jnp.float64)
        prompts = as64(vpt_jax.init_prompts(jax.random.key(1), model, NUM))
        prompts = jax.tree.map(lambda p: 5 * p, prompts)
        head = as64(vpt_jax.init_head(jax.random.key(2), model.width, 4))
        image = jax.random.normal(jax.random.key(3), (3, 8, 8, 3), jnp.float64)
        batch = {"image": image, "label": jnp.array([0, 3, 1])}
        check_gates(model, backbone, {"prompts": prompts, "head": head}, batch)


def attention_that_loses(factors, call, args, kwargs, context):
    """An attention without a factor of what each prompt's removal takes away.

    Written from q, k and v: the oracle of the score `removal`.
    """
    module = context.module
    if not isinstance(module, Attention) or context.method_name != "__call__":
        return call(*args, **kwargs)
    queries, x, extra, *_ = args
    factor = factors.pop(0)  # [b, n]
    if extra is None:
        return call(*args, **kwargs)
    b, n = factor.shape
    q = module.query(queries) / np.sqrt(module.query(queries).shape[-1])
    own = module.key_value(x)
    k, v = (
        jnp.concatenate([o, jnp.repeat(e[None], b, axis=0)], axis=2)
        for o, e in zip(own, extra, strict=True)
    )
    a = jax.nn.softmax(jnp.einsum("bhqc,bhtc->bhqt", q, k))
    o = jnp.einsum("bhqt,bhtc->bhqc", a, v)
    share = a[..., -n:] / (1 - a[..., -n:])
    lost = share[..., None] * (o[..., None, :] - v[:, :, None, -n:])
    return module.out(o + jnp.einsum("bn,bhqnc->bhqc", factor, lost)), a


def test_removal_is_the_derivative_of_what_attention_loses(problem):
    @jax.jit
    def losses(factors):
        lossy = functools.partial(attention_that_loses, list(factors))
        with nn.intercept_methods(lossy):
            return loss_of(problem, apply=apply.__wrapped__)

    factors = tuple(jnp.zeros((7, n)) for n in NUM)
    expected = jax.grad(lambda f: losses(f).sum())(factors)
    got = scored(problem, reduction="mean")
    for s, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(s, e.mean(0), rtol=1e-4, atol=1e-6)
    # And the whole factor is the removal itself.
    mask = (jnp.array([True, False, True]), jnp.ones(0, bool), jnp.ones(5, bool))
    one = (factors[0].at[:, 1].set(1.0), *factors[1:])
    without = loss_of(problem, prompts=vpt_jax.condense(problem[2]["prompts"], mask))
    np.testing.assert_allclose(losses(one), without, atol=1e-5)


@pytest.mark.parametrize("formulation", ["kv", "tokens"])
def test_a_gate_by_head_and_query_weighs_as_one_for_all_if_all_are_equal(
    problem, formulation
):
    model, backbone, trainable, batch = problem
    given = {"prompts": trainable["prompts"], "formulation": formulation}
    given["prompt_mask"] = tuple(jnp.arange(n) != 1 for n in NUM)

    def run(gate):
        return apply(model, backbone, batch["image"], prompt_gate=gate, **given)

    plain = tuple(jnp.linspace(0.3, 1.2, n) for n in NUM)
    features, out = run(plain)
    shapes = [block["prompt_attention"].shape for block in out["blocks"]]
    pairs = zip(shapes, plain, strict=True)
    fine = tuple(jnp.zeros(shape) + g[None, None, None] for shape, g in pairs)
    np.testing.assert_allclose(run(fine)[0], features, atol=1e-6)


@pytest.mark.slow
def test_second_order_removal_comes_closer_to_leave_one_out(problem):
    """Where a prompt's removal changes little; the oracle is exact."""
    model, backbone, trainable, batch = problem
    pictures = jax.random.normal(jax.random.key(7), (400, 8, 8, 3))
    features, _ = apply(model, backbone, pictures, prompts=trainable["prompts"])
    logits = vpt_jax.apply_head(trainable["head"], features)
    # Labels drawn from the model's own prediction: then the mean square of derivatives
    # is the curvature, and the mean derivative about 0.
    labels = jax.random.categorical(jax.random.key(8), logits)
    given = (*problem[:3], {"image": pictures, "label": labels})
    exact = flat(scored(given, score="leave_one_out"))
    errors = [
        np.abs(flat(scored(given, reduction=reduction)) - exact).mean()
        for reduction in ("mean", "second_order")
    ]
    assert errors[1] < 0.6 * errors[0]


def test_leave_one_out_is_the_loss_without_each_prompt(problem):
    prompts = problem[2]["prompts"]
    got = scored(problem, score="leave_one_out")
    whole = loss_of(problem).mean()
    for i, n in enumerate(NUM):
        for j in range(n):
            mask = [jnp.ones(m, bool) for m in NUM]
            mask[i] = mask[i].at[j].set(False)
            without = vpt_jax.condense(prompts, tuple(mask))
            change = loss_of(problem, prompts=without).mean() - whole
            # Differences of two losses near 1: float32 leaves 1e-6.
            np.testing.assert_allclose(got[i][j], change, atol=3e-6)


def test_taylor_is_minus_the_product_of_prompt_and_gradient(shallow):
    """Of shallow prompts: of deep ones it is about 0 (the next test)."""
    prompts = shallow[2]["prompts"]
    got, *_ = scored(shallow, score="taylor", reduction="mean", deep=False)
    slope = jax.grad(lambda p: loss_of(shallow, prompts=p, deep=False).mean())(prompts)
    np.testing.assert_allclose(got, -(prompts[0] * slope[0]).sum(-1), rtol=1e-4)


def test_grad_norm_is_that_of_every_example_and_taylor_is_degenerate(problem):
    """LayerNorm does not see a prompt's scale: the reason for key_gate."""
    prompts = problem[2]["prompts"]
    norms, taylor = (scored(problem, score=name) for name in ("grad_norm", "taylor"))
    jacobian = jax.jacrev(lambda p: loss_of(problem, prompts=p))(prompts)
    for s, j, t, p in zip(norms, jacobian, taylor, prompts, strict=True):
        expected = jnp.linalg.norm(j, axis=-1).mean(0)
        np.testing.assert_allclose(s, expected, rtol=1e-4, atol=1e-6)
        assert (t < 1e-3 * s * jnp.linalg.norm(p, axis=-1)).all()


def test_attention_is_the_mean_weight_received(problem):
    model, backbone, trainable, batch = problem
    _, out = apply(model, backbone, batch["image"], prompts=trainable["prompts"])
    for s, block in zip(scored(problem, score="attention"), out["blocks"], strict=True):
        expected = block["prompt_attention"].mean((0, 1, 2))
        np.testing.assert_allclose(s, expected, atol=1e-6)
        assert 0 <= float(s.sum()) < 1


def of_gates(losses, prompts, prompt_mask, deep):
    """`signed`, written as a user would write a score of his own."""
    b = losses(prompts)[0].shape[0]
    gates = tuple(jnp.ones((b, len(p)), p.dtype) for p in prompts)
    grads = jax.grad(lambda g: losses(prompts, prompt_gate=g)[0].sum())(gates)
    return [-g for g in grads]


def test_signed_is_key_gate_with_its_sign_and_may_be_ones_own(problem):
    signed, own = (flat(scored(problem, score=score)) for score in ("signed", of_gates))
    kept = flat(scored(problem, score="key_gate", reduction="abs_mean"))
    np.testing.assert_allclose(np.abs(signed), kept, atol=1e-7)
    np.testing.assert_array_equal(own, signed)
    assert signed.min() < 0 < signed.max()


def test_scores_without_data(problem):
    norms = scored(problem, [], score="l2_norm")
    for s, p in zip(norms, problem[2]["prompts"], strict=True):
        np.testing.assert_allclose(s, jnp.linalg.norm(p, axis=-1), rtol=1e-6)
    one, same, other = (
        flat(scored(problem, [], score="random", key=jax.random.key(seed)))
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


# --- streaming ------------------------------------------------------------------------


def parts_of(batch, size):
    return [
        {k: v[i : i + size] for k, v in batch.items()}
        for i in range(0, len(batch["label"]), size)
    ]


@pytest.mark.parametrize("score", BRANCHES)
def test_scores_do_not_depend_on_how_examples_are_batched(problem, score):
    done, parts = [], iter(parts_of(problem[3], 3))
    whole = scored(problem, score=score)
    streamed = scored(problem, parts, score=score, progress=done.append)
    assert done == [1, 2, 3]
    assert tuple(s.shape[0] for s in streamed) == NUM
    np.testing.assert_allclose(flat(streamed), flat(whole), rtol=1e-4, atol=1e-6)


BY_HAND = {
    "mean_abs": lambda v: np.abs(v).mean(0),
    "abs_mean": lambda v: np.abs(v.mean(0)),
    "mean_square": lambda v: (v**2).mean(0),
    "mean": lambda v: v.mean(0),
    "second_order": lambda v: v.mean(0) + (v**2).mean(0) / 2,
}


VALUES = [np.random.default_rng(n).normal(size=(7, n)).astype("f4") for n in NUM]


def known(losses, prompts, prompt_mask, deep):
    """A score that computes nothing: what is left is the reduction."""
    return list(map(jnp.asarray, VALUES))


def test_reductions(problem):
    assert BY_HAND.keys() == REDUCTIONS.keys()
    for reduction, by_hand in BY_HAND.items():
        got = scored(problem, score=known, reduction=reduction)
        expected = np.concatenate([by_hand(v) for v in VALUES])
        np.testing.assert_allclose(flat(got), expected, rtol=1e-5, atol=1e-7)


def test_padding_does_not_count_even_if_it_is_not_finite(problem):
    batch = problem[3]
    (first, *_) = parts_of(batch, 5)
    image = batch["image"].at[5:].set(jnp.nan)
    padded = {**batch, "image": image, "mask": jnp.arange(7) < 5}
    got = scored(problem, [padded], score="attention")
    expected = scored(problem, parts_of(first, 3), score="attention")
    np.testing.assert_allclose(flat(got), flat(expected), atol=1e-6)


def test_a_smaller_last_batch_does_not_compile_again(problem):
    before = _batch_values._cache_size()
    for _ in range(2):
        scored(problem, parts_of(problem[3], 2), score="signed")
    assert _batch_values._cache_size() == before + 1


@pytest.mark.parametrize("score", ["removal", "leave_one_out", "l2_norm"])
def test_masked_prompts_are_out_and_the_rest_is_scored_without_them(problem, score):
    model, backbone, trainable, batch = problem
    mask = tuple(jnp.arange(n) != 1 for n in NUM)
    small = {**trainable, "prompts": vpt_jax.condense(trainable["prompts"], mask)}
    masked = flat(scored(problem, score=score, prompt_mask=mask))
    kept = np.concatenate(mask)
    assert np.isneginf(masked[~kept]).all()
    alone = flat(scored((model, backbone, small, batch), score=score))
    np.testing.assert_allclose(masked[kept], alone, atol=3e-6)


@pytest.mark.parametrize("score", BRANCHES)
def test_shallow_prompts_are_scored_too(shallow, score):
    got = scored(shallow, score=score, deep=False)
    assert tuple(s.shape[0] for s in got) == (5, 0, 0)
    assert np.ptp(np.asarray(got[0])) > 0


def no_value_for_each(losses, prompts, prompt_mask, deep):
    return [jnp.zeros(len(p)) for p in prompts]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "magic"}, "unknown score 'magic'; choose one of 'removal'"),
        ({"score": no_value_for_each}, r"returned shapes .*expected \[\("),
        ({"reduction": "sum"}, "unknown reduction 'sum'"),
        ({"score": "random"}, "needs key="),
        ({"score": "l2_norm", "reduction": "mean"}, "reads no examples"),
        ({"score": "signed", "reduction": "mean_abs"}, "reduction 'mean'"),
        ({"batches": []}, "held no examples"),
    ],
)
def test_wrong_importance(problem, options, message):
    with pytest.raises(ValueError, match=message):
        scored(problem, **options)


def test_growing_batches_and_overflowing_losses_are_errors(problem):
    batch = problem[3]
    with pytest.raises(ValueError, match="7 examples after one of 2"):
        scored(problem, [parts_of(batch, 2)[0], batch], score="signed")
    with pytest.raises(ValueError, match="not finite"):
        scored(problem, [{**batch, "image": batch["image"] * jnp.inf}], score="signed")


# --- keep_mask and condense -----------------------------------------------------------

ragged_scores = st.lists(
    st.sampled_from([0, 1, 4]).flatmap(  # few shapes: each is compiled
        lambda n: hnp.arrays(
            np.float32, n, elements=st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0])
        )
    ),
    min_size=1,
    max_size=5,
).filter(lambda layers: sum(map(len, layers)) > 0)
ratios = st.floats(0.01, 1.0) | st.just(1.0)
scopes = st.sampled_from(["global", "layer"])


def expected_number(ratio, n):
    return min(n, max(1, int(np.floor(ratio * n + 0.5))))


@settings(deadline=None, max_examples=80)
@given(layers=ragged_scores, ratio=ratios, scope=scopes)
def test_the_best_are_kept_and_ties_go_by_position(layers, ratio, scope):
    scores = tuple(map(jnp.asarray, layers))
    mask = vpt_jax.keep_mask(scores, keep_ratio=ratio, scope=scope)
    assert [m.shape for m in mask] == [s.shape for s in scores]
    groups = [layers] if scope == "global" else [[layer] for layer in layers]
    masks = [mask] if scope == "global" else [[m] for m in mask]
    for group, kept in zip(groups, masks, strict=True):
        s, m = np.concatenate(group), np.concatenate([np.asarray(k) for k in kept])
        if not len(s):
            continue
        # An independent ranking: Python's stable sort, best first.
        best = sorted(range(len(s)), key=lambda j: -s[j])
        assert set(np.flatnonzero(m)) == set(best[: expected_number(ratio, len(s))])


@settings(deadline=None, max_examples=30)
@given(layers=ragged_scores, data=st.data())
def test_condense_keeps_the_rows_in_order(layers, data):
    prompts = tuple(
        jnp.asarray(np.random.default_rng(i).normal(size=(len(s), 3)), jnp.float32)
        for i, s in enumerate(layers)
    )
    mask = tuple(jnp.asarray(data.draw(hnp.arrays(bool, len(s))), bool) for s in layers)
    small = vpt_jax.condense(prompts, mask)
    assert vpt_jax.counts(small) == tuple(int(m.sum()) for m in mask)
    for s, p, m in zip(small, prompts, mask, strict=True):
        rows = [row for row, keep in zip(p, m, strict=True) if keep]
        np.testing.assert_array_equal(s, np.reshape(rows, (-1, 3)))


RANKED = (jnp.array([1.0, 5.0]), jnp.zeros(0), jnp.array([4.0, 3.0, 2.0]))


def test_keep_mask_runs_under_jit():
    for scope in ("global", "layer"):
        select = functools.partial(vpt_jax.keep_mask, keep_ratio=0.4, scope=scope)
        for a, b in zip(select(RANKED), jax.jit(select)(RANKED), strict=True):
            np.testing.assert_array_equal(a, b)


def test_numbers_and_scopes_by_hand():
    def kept(**kwargs):
        return [np.flatnonzero(m).tolist() for m in vpt_jax.keep_mask(RANKED, **kwargs)]

    assert kept(keep=2) == [[1], [], [0]]
    assert kept(keep=4) == [[1], [], [0, 1, 2]]
    assert kept(keep=2, scope="layer") == [[0, 1], [], [0, 1]]
    assert kept(keep_ratio=0.01) == [[1], [], []]
    assert kept(keep_ratio=0.01, scope="layer") == [[1], [], [0]]
    assert kept(keep_ratio=0.3) == [[1], [], [0]]  # 1.5 rounds up
    with_nan = (jnp.array([jnp.nan, -9.0]),)
    assert vpt_jax.keep_mask(with_nan, keep=1)[0].tolist() == [False, True]


def select(*sizes, **kwargs):
    return vpt_jax.keep_mask(tuple(map(jnp.zeros, sizes)), **kwargs)


def remove(*masks):
    return vpt_jax.condense((jnp.zeros((2, 3)), jnp.zeros((1, 3))), masks)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: select(2, 1), "exactly one"),
        (lambda: select(2, 1, keep=1, keep_ratio=0.5), "exactly one"),
        (lambda: select(2, 1, keep_ratio=0.0), r"is 0.0; expected a number"),
        (lambda: select(2, 1, keep_ratio=1.5), r"number in \(0, 1\]"),
        (lambda: select(2, 1, keep=0), "must be in 1..3"),
        (lambda: select(2, 1, keep=4), "must be in 1..3"),
        (lambda: select(2, 1, keep=1, scope="local"), "unknown scope 'local'"),
        (lambda: select(0, keep_ratio=0.5), "every layer has 0"),
        (lambda: remove(jnp.ones(2, bool)), r"counts \(2, 1\)"),
        (lambda: remove(*2 * [jnp.ones(2, bool)]), "one boolean per prompt"),
        (
            lambda: jax.jit(remove)(jnp.ones(2, bool), jnp.ones(1, bool)),
            "pass prompt_mask= to the model",
        ),
    ],
)
def test_what_cannot_be_selected_or_removed(call, message):
    with pytest.raises(ValueError, match=message):
        call()
