# SPDX-License-Identifier: Apache-2.0
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import vpt_jax
from vpt_jax import parallel
from vpt_jax.condense import (
    REDUCTIONS,
    SCORES,
    _batch_values,
    example_values,
)
from vpt_jax.models.layers import Attention

NUM = (3, 0, 5)
DATA_SCORES = [s for s in SCORES if s not in ("l2_norm", "random")]


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


def loss_of(problem, **kwargs):
    """Mean loss, straight from the model."""
    model, backbone, trainable, batch = problem
    prompts = kwargs.pop("prompts", trainable["prompts"])
    features, _ = model.apply(
        {"params": backbone}, batch["image"], prompts=prompts, **kwargs
    )
    logits = vpt_jax.apply_head(trainable["head"], features)
    return vpt_jax.cross_entropy(logits, batch)


def flat(scores):
    return np.concatenate([np.asarray(s, np.float64) for s in scores])


def test_cross_entropy_of_equal_logits_is_log_k():
    loss = vpt_jax.cross_entropy(jnp.zeros((2, 8)), {"label": jnp.array([0, 7])})
    np.testing.assert_allclose(loss, np.log(8), rtol=1e-6)


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

        @jax.jit
        def losses(prompts, prompt_gate=None, prompt_mask=None):
            features, out = model.apply(
                {"params": backbone},
                image,
                prompts=prompts,
                prompt_gate=prompt_gate,
                prompt_mask=prompt_mask,
            )
            return vpt_jax.cross_entropy(vpt_jax.apply_head(head, features), batch), out

        values = example_values("key_gate", losses, prompts)
        assert {v.dtype for v in values} == {jnp.dtype(jnp.float64)}
        eps = 1e-5
        for i, n in enumerate(NUM):
            for j in range(n):
                at = []
                for sign in (1, -1):
                    gate = [jnp.ones(m) for m in NUM]
                    gate[i] = gate[i].at[j].add(sign * eps)
                    at.append(losses(prompts, prompt_gate=tuple(gate))[0])
                numeric = -(at[0] - at[1]) / (2 * eps)
                # Central differences: error of order eps**2 and rounding / eps.
                np.testing.assert_allclose(values[i][:, j], numeric, atol=1e-9)
        batch_grad = jax.grad(lambda g: losses(prompts, prompt_gate=g)[0].mean())(
            tuple(jnp.ones(n) for n in NUM)
        )
        for v, g in zip(values, batch_grad, strict=True):
            np.testing.assert_allclose(v.mean(0), -g, atol=1e-12)


def attention_that_loses(factors, call, args, kwargs, context):
    """An attention without a factor of what each prompt's removal takes away.

    Written from q, k and v: the oracle of the score `removal`.
    """
    module = context.module
    if not isinstance(module, Attention) or context.method_name != "__call__":
        return call(*args, **kwargs)
    queries, x, extra, _ = args
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
    for j in range(n):
        share = a[..., -n + j] / (1 - a[..., -n + j])
        lost = share[..., None] * (o - v[:, :, None, -n + j])
        o = o + factor[:, j, None, None, None] * lost
    return module.out(o), a


def test_removal_is_the_derivative_of_what_attention_loses(problem):
    trainable, b = problem[2], 7

    def losses(factors):
        with nn.intercept_methods(
            functools.partial(attention_that_loses, list(factors))
        ):
            return loss_of(problem)

    factors = tuple(jnp.zeros((b, n)) for n in NUM)
    expected = jax.grad(lambda f: losses(f).sum())(factors)
    got = vpt_jax.importance(*problem[:3], [problem[3]], reduction="mean")
    for s, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(s, e.mean(0), rtol=1e-4, atol=1e-6)
    # And the whole factor is the removal itself.
    mask = (jnp.array([True, False, True]), jnp.ones(0, bool), jnp.ones(5, bool))
    one = (factors[0].at[:, 1].set(1.0), *factors[1:])
    without = vpt_jax.condense(trainable["prompts"], mask)
    np.testing.assert_allclose(
        losses(one), loss_of(problem, prompts=without), atol=1e-5
    )


@pytest.mark.parametrize("formulation", ["kv", "tokens"])
def test_a_gate_by_head_and_query_weighs_as_one_for_all_if_all_are_equal(
    problem, formulation
):
    model, backbone, trainable, batch = problem

    def run(gate):
        return model.apply(
            {"params": backbone},
            batch["image"],
            prompts=trainable["prompts"],
            prompt_gate=gate,
            prompt_mask=mask,
            formulation=formulation,
        )

    mask = tuple(jnp.arange(n) != 1 for n in NUM)
    plain = tuple(jnp.linspace(0.3, 1.2, n) for n in NUM)
    features, out = run(plain)
    shapes = [block["prompt_attention"].shape for block in out["blocks"]]
    fine = tuple(
        jnp.zeros(s) + g[None, None, None] for s, g in zip(shapes, plain, strict=True)
    )
    np.testing.assert_allclose(run(fine)[0], features, atol=1e-6)


def test_second_order_removal_comes_closer_to_leave_one_out(problem):
    """Where a prompt's removal changes little; the oracle is exact."""
    model, backbone, trainable, batch = problem
    pictures = jax.random.normal(jax.random.key(7), (400, 8, 8, 3))
    features, _ = model.apply(
        {"params": backbone}, pictures, prompts=trainable["prompts"]
    )
    logits = vpt_jax.apply_head(trainable["head"], features)
    # Labels drawn from the model's own prediction: then the mean square of derivatives
    # is the curvature, and the mean derivative about 0.
    labels = jax.random.categorical(jax.random.key(8), logits)
    given = (*problem[:3], [{"image": pictures, "label": labels}])
    exact = flat(vpt_jax.importance(*given, score="leave_one_out"))
    errors = [
        np.abs(flat(vpt_jax.importance(*given, reduction=reduction)) - exact).mean()
        for reduction in ("mean", "second_order")
    ]
    assert errors[1] < 0.6 * errors[0]


def test_leave_one_out_is_the_loss_without_each_prompt(problem):
    model, backbone, trainable, batch = problem
    got = vpt_jax.importance(*problem[:3], [batch], score="leave_one_out")
    whole = loss_of(problem).mean()
    for i, n in enumerate(NUM):
        for j in range(n):
            mask = [jnp.ones(m, bool) for m in NUM]
            mask[i] = mask[i].at[j].set(False)
            without = vpt_jax.condense(trainable["prompts"], tuple(mask))
            change = loss_of(problem, prompts=without).mean() - whole
            # Differences of two losses near 1: float32 leaves 1e-6.
            np.testing.assert_allclose(got[i][j], change, atol=3e-6)


def test_taylor_is_minus_the_product_of_prompt_and_gradient(problem):
    model, backbone, trainable, batch = problem
    got = vpt_jax.importance(*problem[:3], [batch], score="taylor", reduction="mean")
    grads = jax.grad(lambda p: loss_of(problem, prompts=p).mean())(trainable["prompts"])
    for s, p, g in zip(got, trainable["prompts"], grads, strict=True):
        np.testing.assert_allclose(s, -(p * g).sum(-1), atol=1e-6)


def test_taylor_is_degenerate_for_deep_prompts(problem):
    """LayerNorm does not see a prompt's scale: the reason for key_gate."""
    model, backbone, trainable, batch = problem
    taylor = vpt_jax.importance(*problem[:3], [batch], score="taylor")
    norms = vpt_jax.importance(*problem[:3], [batch], score="grad_norm")
    for t, g, p in zip(taylor, norms, trainable["prompts"], strict=True):
        if p.size:
            bound = g * jnp.linalg.norm(p, axis=-1)
            assert (t < 1e-3 * bound).all()


def test_grad_norm_is_the_norm_of_every_examples_own_gradient(problem):
    model, backbone, trainable, batch = problem
    got = vpt_jax.importance(*problem[:3], [batch], score="grad_norm")
    jacobian = jax.jacrev(lambda p: loss_of(problem, prompts=p))(trainable["prompts"])
    for s, j in zip(got, jacobian, strict=True):
        expected = jnp.linalg.norm(j, axis=-1).mean(0)
        np.testing.assert_allclose(s, expected, rtol=1e-4, atol=1e-6)


def test_attention_is_the_mean_weight_received(problem):
    model, backbone, trainable, batch = problem
    got = vpt_jax.importance(*problem[:3], [batch], score="attention")
    _, out = model.apply(
        {"params": backbone}, batch["image"], prompts=trainable["prompts"]
    )
    for s, block in zip(got, out["blocks"], strict=True):
        expected = block["prompt_attention"].mean((0, 1, 2))
        np.testing.assert_allclose(s, expected, atol=1e-6)
        assert 0 <= float(s.sum()) < 1


def test_signed_is_key_gate_with_its_sign(problem):
    batch = problem[3]
    signed = vpt_jax.importance(*problem[:3], [batch], score="signed")
    kept = vpt_jax.importance(
        *problem[:3], [batch], score="key_gate", reduction="abs_mean"
    )
    np.testing.assert_allclose(np.abs(flat(signed)), flat(kept), atol=1e-7)
    assert flat(signed).min() < 0 < flat(signed).max()


def test_scores_without_data(problem):
    prompts = problem[2]["prompts"]
    norms = vpt_jax.importance(*problem[:3], [], score="l2_norm")
    for s, p in zip(norms, prompts, strict=True):
        np.testing.assert_allclose(s, jnp.linalg.norm(p, axis=-1), rtol=1e-6)
    random = [
        flat(
            vpt_jax.importance(
                *problem[:3], [], score="random", key=jax.random.key(seed)
            )
        )
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(random[0], random[1])
    assert not np.array_equal(random[0], random[2])


# --- streaming ------------------------------------------------------------------------


@pytest.mark.parametrize("score", DATA_SCORES)
def test_scores_do_not_depend_on_how_examples_are_batched(problem, score):
    batch, done = problem[3], []
    parts = [{k: v[i : i + 3] for k, v in batch.items()} for i in (0, 3, 6)]
    whole = vpt_jax.importance(*problem[:3], [batch], score=score)
    streamed = vpt_jax.importance(
        *problem[:3], iter(parts), score=score, progress=done.append
    )
    assert done == [1, 2, 3]
    assert tuple(s.shape[0] for s in streamed) == NUM
    np.testing.assert_allclose(flat(streamed), flat(whole), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(problem, reduction):
    model, backbone, trainable, batch = problem
    got = vpt_jax.importance(
        *problem[:3], [batch], score="key_gate", reduction=reduction
    )

    def losses(prompts, **kwargs):
        return loss_of(problem, prompts=prompts, **kwargs), {}

    values = example_values("key_gate", losses, trainable["prompts"])
    by_hand = {
        "mean_abs": lambda v: np.abs(v).mean(0),
        "abs_mean": lambda v: np.abs(v.mean(0)),
        "mean_square": lambda v: (v**2).mean(0),
        "mean": lambda v: v.mean(0),
        "second_order": lambda v: v.mean(0) + (v**2).mean(0) / 2,
    }[reduction]
    expected = np.concatenate([by_hand(np.asarray(v)) for v in values])
    np.testing.assert_allclose(flat(got), expected, rtol=1e-4, atol=1e-7)


def test_padding_does_not_count_even_if_it_is_not_finite(problem):
    batch = parallel.pad_batch(problem[3], 9)
    batch["image"] = batch["image"].at[7:].set(jnp.nan)
    got = vpt_jax.importance(*problem[:3], [batch], score="attention")
    expected = vpt_jax.importance(*problem[:3], [problem[3]], score="attention")
    np.testing.assert_allclose(flat(got), flat(expected), atol=1e-6)


def test_a_smaller_last_batch_does_not_compile_again(problem):
    parts = [{k: v[i : i + 2] for k, v in problem[3].items()} for i in (0, 2, 4, 6)]
    before = _batch_values._cache_size()
    vpt_jax.importance(*problem[:3], parts, score="signed")
    vpt_jax.importance(*problem[:3], parts, score="signed")
    assert _batch_values._cache_size() == before + 1


@pytest.mark.parametrize("score", ["removal", "key_gate", "leave_one_out", "l2_norm"])
def test_masked_prompts_are_out_and_the_rest_is_scored_without_them(problem, score):
    model, backbone, trainable, batch = problem
    mask = tuple(jnp.arange(n) != 1 for n in NUM)
    small = {
        **trainable,
        "prompts": vpt_jax.condense(trainable["prompts"], mask),
    }
    masked = vpt_jax.importance(*problem[:3], [batch], score=score, prompt_mask=mask)
    alone = vpt_jax.importance(model, backbone, small, [batch], score=score)
    for m, s, a in zip(mask, masked, alone, strict=True):
        assert np.isneginf(np.asarray(s)[~np.asarray(m)]).all()
        np.testing.assert_allclose(np.asarray(s)[np.asarray(m)], a, atol=3e-6)


@pytest.mark.parametrize("score", DATA_SCORES)
def test_shallow_prompts_are_scored_too(problem, score):
    model, backbone, trainable, batch = problem
    prompts = (*trainable["prompts"][2:], jnp.zeros((0, 16)), jnp.zeros((0, 16)))
    shallow = {**trainable, "prompts": prompts}
    got = vpt_jax.importance(model, backbone, shallow, [batch], score=score, deep=False)
    assert tuple(s.shape[0] for s in got) == (5, 0, 0)
    assert np.ptp(np.asarray(got[0])) > 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"score": "magic"}, "unknown score 'magic'; choose one of 'removal'"),
        ({"reduction": "sum"}, "unknown reduction 'sum'"),
        ({"score": "random"}, "needs key="),
        ({"score": "l2_norm", "reduction": "mean"}, "reads no examples"),
        ({"score": "signed", "reduction": "mean_abs"}, "reduction 'mean'"),
        ({"batches": []}, "held no examples"),
    ],
)
def test_wrong_importance(problem, kwargs, message):
    batches = kwargs.pop("batches", [problem[3]])
    with pytest.raises(ValueError, match=message):
        vpt_jax.importance(*problem[:3], batches, **kwargs)


def test_growing_batches_and_overflowing_losses_are_errors(problem):
    batch = problem[3]
    small = {k: v[:2] for k, v in batch.items()}
    with pytest.raises(ValueError, match="7 examples after one of 2"):
        vpt_jax.importance(*problem[:3], [small, batch])
    broken = {**batch, "image": batch["image"] * jnp.inf}
    with pytest.raises(ValueError, match="not finite"):
        vpt_jax.importance(*problem[:3], [broken])


# --- keep_mask and condense -----------------------------------------------------------

ragged_scores = st.lists(
    st.integers(0, 6).flatmap(
        lambda n: hnp.arrays(
            np.float32, n, elements=st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0])
        )
    ),
    min_size=1,
    max_size=5,
).filter(lambda layers: sum(map(len, layers)) > 0)
ratios = st.floats(0.01, 1.0)
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
@given(layers=ragged_scores, scope=scopes)
def test_a_ratio_of_one_is_the_identity(layers, scope):
    scores = tuple(map(jnp.asarray, layers))
    prompts = tuple(jnp.arange(2.0 * len(s)).reshape(-1, 2) for s in layers)
    mask = vpt_jax.keep_mask(scores, keep_ratio=1.0, scope=scope)
    for a, b in zip(vpt_jax.condense(prompts, mask), prompts, strict=True):
        np.testing.assert_array_equal(a, b)


@settings(deadline=None, max_examples=30)
@given(layers=ragged_scores, data=st.data(), scope=scopes)
def test_keeping_more_never_drops_a_kept_one(layers, data, scope):
    scores = tuple(map(jnp.asarray, layers))
    few, many = sorted((data.draw(ratios), data.draw(ratios)))
    a = vpt_jax.keep_mask(scores, keep_ratio=few, scope=scope)
    b = vpt_jax.keep_mask(scores, keep_ratio=many, scope=scope)
    assert all(bool((~x | y).all()) for x, y in zip(a, b, strict=True))


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


def test_keep_mask_runs_under_jit():
    scores = (jnp.array([1.0, 5.0]), jnp.zeros(0), jnp.array([4.0, 3.0, 2.0]))
    for scope in ("global", "layer"):
        select = functools.partial(vpt_jax.keep_mask, keep_ratio=0.4, scope=scope)
        for a, b in zip(select(scores), jax.jit(select)(scores), strict=True):
            np.testing.assert_array_equal(a, b)


def test_numbers_and_scopes_by_hand():
    scores = (jnp.array([1.0, 5.0]), jnp.zeros(0), jnp.array([4.0, 3.0, 2.0]))

    def kept(**kwargs):
        return [np.flatnonzero(m).tolist() for m in vpt_jax.keep_mask(scores, **kwargs)]

    assert kept(keep=2) == [[1], [], [0]]
    assert kept(keep=4) == [[1], [], [0, 1, 2]]
    assert kept(keep=2, scope="layer") == [[0, 1], [], [0, 1]]
    assert kept(keep_ratio=0.01) == [[1], [], []]
    assert kept(keep_ratio=0.01, scope="layer") == [[1], [], [0]]
    assert kept(keep_ratio=0.3) == [[1], [], [0]]  # 1.5 rounds up
    with_nan = (jnp.array([jnp.nan, -9.0]),)
    assert vpt_jax.keep_mask(with_nan, keep=1)[0].tolist() == [False, True]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "exactly one"),
        ({"keep": 1, "keep_ratio": 0.5}, "exactly one"),
        ({"keep_ratio": 0.0}, r"keep_ratio is 0.0; it must be in \(0, 1\]"),
        ({"keep_ratio": 1.5}, r"must be in \(0, 1\]"),
        ({"keep": 0}, "must be in 1..3"),
        ({"keep": 4}, "must be in 1..3"),
        ({"keep": 1, "scope": "local"}, "unknown scope 'local'"),
    ],
)
def test_wrong_keep_mask(kwargs, message):
    with pytest.raises(ValueError, match=message):
        vpt_jax.keep_mask((jnp.zeros(2), jnp.zeros(1)), **kwargs)


def test_nothing_to_select_from():
    with pytest.raises(ValueError, match="every layer has 0"):
        vpt_jax.keep_mask((jnp.zeros(0),), keep_ratio=0.5)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ((jnp.ones(2, bool),), r"counts \(2, 1\)"),
        ((jnp.ones(2, bool), jnp.ones(2, bool)), "one boolean per prompt"),
    ],
)
def test_wrong_condense(mask, message):
    with pytest.raises(ValueError, match=message):
        vpt_jax.condense((jnp.zeros((2, 3)), jnp.zeros((1, 3))), mask)


def test_condense_under_jit_says_what_to_do_instead():
    prompts = (jnp.zeros((2, 3)),)
    with pytest.raises(ValueError, match="pass prompt_mask= to the model"):
        jax.jit(vpt_jax.condense)(prompts, (jnp.ones(2, bool),))


def of_gates(losses, prompts, prompt_mask, deep):
    """`key_gate`, written as a user would write a score of his own."""
    b = losses(prompts)[0].shape[0]
    gates = tuple(jnp.ones((b, len(p)), p.dtype) for p in prompts)
    grads = jax.grad(lambda g: losses(prompts, prompt_gate=g)[0].sum())(gates)
    return [-g for g in grads]


def test_a_score_of_ones_own(problem):
    model, backbone, trainable, batch = problem
    args = model, backbone, trainable, [batch]
    got = vpt_jax.importance(*args, score=of_gates, reduction="mean_abs")
    want = vpt_jax.importance(*args, score="key_gate")
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    signed = vpt_jax.importance(*args, score=of_gates)
    for a, b in zip(signed, vpt_jax.importance(*args, score="signed"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_score_of_ones_own_has_a_value_for_each_prompt(problem):
    def wrong(losses, prompts, prompt_mask, deep):
        return [jnp.zeros(len(p)) for p in prompts]

    with pytest.raises(ValueError, match=r"returned shapes .*expected \[\("):
        vpt_jax.importance(*problem[:3], [problem[3]], score=wrong)
