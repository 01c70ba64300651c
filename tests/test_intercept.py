# SPDX-License-Identifier: Apache-2.0
"""Prompts in models that are not ours.

The oracle is `vpt_jax.ViT` with `formulation="tokens"` on the same parameters, which
`test_vit.py` checks against NumPy. What is not differentiated runs without jit mostly:
operations are compiled once for all tests, where every jitted model compiles by itself.
"""

import functools
from typing import Any

import flax.linen as nn
import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import BigVision, BigVisionBlock, LayerNorm, VitJax, VitJaxBlock

import vpt_jax
from vpt_jax.intercept import ATTENTION, PromptedModel, first, prompted

WIDTH, DEPTH, BATCH = 16, 3, 4
NUM, SHALLOW = (3, 0, 3), (3, 0, 0)
# Without a class token: as many tokens as the others, nothing new to compile.
GAP_NUM = (4, 1, 4)
IMAGES = jax.random.normal(jax.random.key(3), (BATCH, 8, 8, 3))
SIZES = {
    "width": WIDTH,
    "depth": DEPTH,
    "num_heads": 2,
    "mlp_dim": 24,
    "patch": 4,
    "image_size": 8,
}
MODELS = {
    "vit_jax": VitJax(),
    "one block": VitJax(depth=1),
    "two blocks": VitJax(depth=2),
    "big_vision tok": BigVision(pool_type="tok"),
    "big_vision gap": BigVision(pool_type="gap"),
    "big_vision remat": BigVision(pool_type="tok", remat=True),
}


def random_params(module, x):
    """Parameters in the places of a module's own, and no initial value among them."""
    init = functools.partial(module.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), x).get("params", {})
    draw = np.random.default_rng(0).normal
    # `setting` keeps them, and what asks for them first may be a function under jit.
    with jax.ensure_compile_time_eval():
        return jax.tree.map(
            lambda s: jnp.asarray(draw(0, 0.4, s.shape), s.dtype), shapes
        )


@functools.cache
def setting(name):
    """`(foreign module, its parameters, our model, its parameters)`."""
    module = MODELS[name]
    params = random_params(module, IMAGES)
    if isinstance(module, VitJax):
        return module, params, vpt_jax.ViT(**{**SIZES, "depth": module.depth}), params
    gap = {"class_token": False, "readout": "mean"} if "gap" in name else {}
    return module, params, vpt_jax.ViT(**SIZES, **gap), foreign.to_vit(params)


def make_prompts(num=NUM, seed=1):
    """Prompts large enough to change the answer visibly."""
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(n, WIDTH)), jnp.float32) for n in num)


def some_mask(prompts):
    return tuple(jnp.arange(len(p)) % 2 == 0 for p in prompts)


def make_case(case, num=NUM):
    """Keyword arguments of a prompted call, by what stands in the case's name."""
    deep = "shallow" not in case
    prompts = make_prompts(num if deep else SHALLOW)
    given: dict[str, Any] = {"prompts": prompts, "deep": deep}
    if "masked" in case:
        given["prompt_mask"] = some_mask(prompts)
    if "gated" in case:
        shapes = [(BATCH, len(p)) for p in prompts]
        draw = np.random.default_rng(2).uniform
        gates = (jnp.asarray(draw(0.1, 2, shape), jnp.float32) for shape in shapes)
        given["prompt_gate"] = tuple(gates)
    return given


def run(module, params, images=IMAGES, *, prompts, **kwargs):
    """What the module returns, with prompts."""
    with prompted(prompts, **kwargs):
        return module.apply({"params": params}, images, train=False)


def features(*args, **kwargs):
    return first(run(*args, **kwargs))


def plain(module, params, images=IMAGES):
    return first(module.apply({"params": params}, images, train=False))


def check(*args, **kwargs):
    """Runs it without numbers: what is wrong is wrong when it is traced."""
    return jax.eval_shape(lambda: features(*args, **kwargs))


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / np.abs(b).max()


class AsTokens:
    """Our model as the others run: prompts are tokens."""

    def __init__(self, model):
        self.apply = functools.partial(model.apply, formulation="tokens")


def adapter(module, depth=DEPTH, **kwargs):
    return PromptedModel(module, depth=depth, width=WIDTH, patch=4, **kwargs)


def check_agreement(theirs, vit, params, given):
    """`theirs(**given)` and its gradients are our model's; returns the features."""
    fixed = {k: given[k] for k in ("deep", "prompt_mask") if k in given}
    free = {k: given[k] for k in given.keys() - fixed.keys()}

    def ours(**given):
        return AsTokens(vit).apply({"params": params}, IMAGES, **given)[0]

    def grad(function):
        def loss(free):
            out = function(**fixed, **free)
            return jnp.sin(out).sum(), out

        return jax.jit(jax.grad(loss, has_aux=True))(free)

    (got, a), (expected, b) = grad(theirs), grad(ours)
    assert relative(a, b) < 1e-5
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if x.size:
            assert np.abs(y).max() > 0
            assert relative(x, y) < 1e-5
    return a


# --- the same network as ours ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("vit_jax", "deep"),
        ("vit_jax", "masked"),
        ("vit_jax", "shallow masked gated"),
        ("big_vision remat", "gated"),
        ("big_vision gap", "gated"),
    ],
)
def test_agrees_with_our_model_forward_and_gradient(name, case):
    module, params, vit, vit_params = setting(name)
    given = make_case(case, GAP_NUM if "gap" in name else NUM)
    theirs = functools.partial(features, module, params)
    got = check_agreement(theirs, vit, vit_params, given)
    assert relative(got, plain(module, params)) > 1e-2


HEAD = vpt_jax.init_head(jax.random.key(4), WIDTH, 4)
LABELLED = {"image": IMAGES, "label": jnp.arange(BATCH) % 4}


@pytest.mark.parametrize(
    ("score", "deep"),
    [
        ("removal", True),
        ("key_gate", False),
        ("attention", False),
        ("leave_one_out", True),
        ("grad_norm", True),
    ],
)
def test_importance_agrees_with_our_model(score, deep):
    module, params, vit, vit_params = setting("two blocks")
    prompts = make_prompts((3, 2) if deep else (3, 0))
    given = {"prompts": prompts, "head": HEAD}, [LABELLED]
    score_of = functools.partial(vpt_jax.importance, score=score, deep=deep)
    got = score_of(adapter(module, depth=2), params, *given)
    # As keys where the score needs that: with tokens it cannot know who reads them.
    ours = vit if score == "removal" else AsTokens(vit)
    expected = score_of(ours, vit_params, *given)
    assert [s.shape[0] for s in got] == list(vpt_jax.counts(prompts))
    assert relative(np.concatenate(got), np.concatenate(expected)) < 1e-4


def test_scoring_selecting_and_condensing_work_unchanged():
    module, params, *_ = setting("one block")
    model, variables = adapter(module, depth=1), {"params": params}
    prompts = vpt_jax.init_prompts(jax.random.key(5), model, (4,))
    trainable = {"prompts": prompts, "head": HEAD}
    scores = vpt_jax.importance(model, params, trainable, [LABELLED])
    mask = vpt_jax.keep_mask(scores, keep_ratio=0.3)
    small = vpt_jax.condense(prompts, mask)
    assert vpt_jax.counts(small) == (1,)
    masked, _ = model.apply(variables, IMAGES, prompts=prompts, prompt_mask=mask)
    removed, _ = model.apply(variables, IMAGES, prompts=small)
    assert relative(masked, removed) < 1e-5


# --- masks and gates ------------------------------------------------------------------


@pytest.mark.parametrize("deep", [True, False])
def test_mask_equals_condense_and_gates_of_zero_and_one_are_its_ends(deep):
    module, params, *_ = setting("vit_jax")
    prompts = make_prompts(NUM if deep else SHALLOW)
    mask = some_mask(prompts)
    call = functools.partial(features, module, params, deep=deep)
    condensed = call(prompts=vpt_jax.condense(prompts, mask))
    gate = tuple(m.astype(jnp.float32) for m in mask)
    ones = tuple(jnp.ones((BATCH, len(p))) for p in prompts)
    assert relative(call(prompts=prompts, prompt_mask=mask), condensed) < 1e-5
    assert relative(call(prompts=prompts, prompt_gate=gate), condensed) < 1e-5
    assert relative(call(prompts=prompts), condensed) > 1e-2
    whole = call(prompts=prompts, prompt_gate=ones)
    np.testing.assert_array_equal(whole, call(prompts=prompts))


def test_removed_prompts_get_attention_of_exactly_zero():
    module, params, *_ = setting("big_vision remat")
    prompts, mask = make_prompts(), some_mask(make_prompts())
    with prompted(prompts, mask):
        _, state = module.apply(
            {"params": params}, IMAGES, train=False, mutable=[ATTENTION]
        )
    weights = jax.tree.leaves(state)
    assert [w.shape for w in weights] == [(BATCH, 2, 5, n) for n in NUM]
    for w, m in zip(weights, mask, strict=True):
        np.testing.assert_array_equal(w[..., ~m], 0)
        assert w[..., m].size == 0 or w[..., m].min() > 0


def test_gradients_at_gates_of_zero_and_one_are_finite():
    module, params, *_ = setting("vit_jax")
    prompts = make_prompts()
    gates = tuple(jnp.zeros((BATCH, len(p))).at[:, ::2].set(1.0) for p in prompts)

    def loss(gates, prompts):
        out = features(module, params, prompts=prompts, prompt_gate=gates)
        return jnp.sin(out).sum()

    for x in jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(gates, prompts)):
        assert np.isfinite(x).all()


def test_examples_do_not_see_each_other_and_may_have_their_own_prompts():
    module, params, *_ = setting("vit_jax")
    sets = [make_prompts(seed=seed) for seed in range(BATCH)]
    own = jax.tree.map(lambda *p: jnp.stack(p), *sets)
    together = features(module, params, prompts=own)
    for i, prompts in enumerate(sets):
        others = IMAGES.at[:i].set(0.0).at[i + 1 :].set(0.0)
        alone = features(module, params, others, prompts=prompts)
        assert relative(together[i], alone[i]) < 1e-5


class SelfAttentionBlock(VitJaxBlock):
    """`nn.SelfAttention` calls its parent's `__call__`: met twice, weighted once."""

    @nn.compact
    def __call__(self, inputs, *, deterministic):
        name = "MultiHeadDotProductAttention_0"
        attention = nn.SelfAttention(self.num_heads, name=name)
        x = inputs + attention(LayerNorm()(inputs), deterministic=deterministic)
        return x + foreign.MlpBlock(self.mlp_dim)(LayerNorm()(x), deterministic)


class NamedBlock(VitJaxBlock):
    """Is given its tokens by keyword, not as the first of its keywords."""

    @nn.compact
    def __call__(self, tokens, *, deterministic):
        return VitJaxBlock.__call__(self, tokens, deterministic=deterministic)


@pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")
@pytest.mark.parametrize(
    "module",
    [VitJax(block=SelfAttentionBlock), VitJax(block=NamedBlock, by_keyword="tokens")],
    ids=["self attention", "keyword"],
)
def test_other_ways_to_call_blocks_and_attention(module):
    _, params, *_ = setting("vit_jax")
    given = make_case("gated")
    a, b = features(module, params, **given), features(VitJax(), params, **given)
    assert relative(a, b) < 1e-5


def block_of(call):
    """A class of blocks that compute `call(self, x)`."""

    class Block(VitJaxBlock):
        @nn.compact
        def __call__(self, x, *, deterministic):
            return call(self, x)

    return Block


def causal(self, x):
    """Has a mask of its own, of numbers as Flax makes them."""
    y = LayerNorm()(x)
    attention = nn.MultiHeadDotProductAttention(self.num_heads)
    return x + attention(y, y, mask=nn.make_causal_mask(y[..., 0]))


def test_a_mask_of_the_block_stays():
    module = VitJax(block=block_of(causal))
    params = random_params(module, IMAGES)
    prompts = make_prompts()
    mask = some_mask(prompts)
    masked = features(module, params, prompts=prompts, prompt_mask=mask)
    small = features(module, params, prompts=vpt_jax.condense(prompts, mask))
    assert relative(masked, small) < 1e-5


def test_a_model_may_train_with_its_own_dropout():
    module, (_, params, *_) = VitJax(dropout=0.1), setting("vit_jax")

    def call(key):
        with prompted(**make_case("masked")):
            variables, rngs = {"params": params}, {"dropout": key}
            return module.apply(variables, IMAGES, train=True, rngs=rngs)

    assert jax.eval_shape(call, jax.random.key(0)).shape == (BATCH, WIDTH)


# --- what a block returns, and what stays as it was -----------------------------------


@pytest.mark.parametrize("deep", [True, False])
def test_other_results_of_a_block_pass_and_tokens_stay_in_order(deep):
    module, params, *_ = setting("big_vision tok")
    num = NUM if deep else SHALLOW
    prompts = make_prompts(num)
    _, out = run(module, params, prompts=prompts, deep=deep)
    for i in range(DEPTH):
        rows = 5 + num[i if deep else 0]
        block = out["encoder"][f"block{i:02d}"]
        assert {k: v.shape for k, v in block.items()} == dict.fromkeys(
            ("sa", "+sa", "mlp"), (BATCH, rows, WIDTH)
        )
    assert out["encoded"].shape == (BATCH, 5, WIDTH)
    tokens = out["encoder"]["block02"]
    n = num[2] if deep else num[0]
    own = np.delete(tokens["+sa"] + tokens["mlp"], range(1, 1 + n), axis=1)
    np.testing.assert_array_equal(out["encoder"]["pre_ln"], own)


def test_no_prompts_are_the_plain_model_exactly():
    module, params, *_ = setting("vit_jax")
    empty = tuple(jnp.zeros((0, WIDTH)) for _ in range(DEPTH))
    expected = plain(module, params)
    np.testing.assert_array_equal(features(module, params, prompts=empty), expected)
    alone, out = adapter(module).apply({"params": params}, IMAGES)
    np.testing.assert_array_equal(alone, expected)
    assert out["blocks"] == []


def test_a_model_may_run_several_times_in_one_context():
    module, params, *_ = setting("vit_jax")
    prompts = make_prompts()
    apply = functools.partial(module.apply, {"params": params}, train=False)
    with prompted(prompts, some_mask(prompts)):
        a, b = apply(IMAGES), apply(IMAGES[::-1])
    whole = features(module, params, prompts=prompts, prompt_mask=some_mask(prompts))
    np.testing.assert_array_equal(a, whole)
    assert relative(b[::-1], whole) < 1e-5


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_after_the_context(fails):
    module, params, *_ = setting("vit_jax")
    met = []

    def watch(call, args, kwargs, context):
        if isinstance(context.module, nn.MultiHeadDotProductAttention):
            met.append(context.module)
        return call(*args, **kwargs)

    before = plain(module, params)
    gate = make_case("gated")["prompt_gate"]
    if fails:  # inside the attention: gates of another batch size
        gate = tuple(g[:2] for g in gate)
    try:
        with nn.intercept_methods(watch):
            features(module, params, prompts=make_prompts(), prompt_gate=gate)
    except (TypeError, ValueError):
        assert fails
    assert {m.attention_fn for m in met} == {nn.dot_product_attention}
    assert len(met) == (1 if fails else DEPTH)
    np.testing.assert_array_equal(plain(module, params), before)


def test_init_inside_the_context_makes_the_same_parameters():
    module = MODELS["vit_jax"]
    init = functools.partial(module.init, jax.random.key(0), IMAGES, train=False)

    def inside():
        with prompted(**make_case("masked")):
            return init()

    assert jax.eval_shape(inside) == jax.eval_shape(init)


# --- jit ------------------------------------------------------------------------------


def loss_of(x):
    module, params, *_ = setting("one block")
    return jnp.sin(plain(module, params, x)).sum()


@functools.cache
def expected_of(seed):
    """By our model: each picture's own loss, and the gradient of their sum."""
    *_, vit, params = setting("one block")
    given = {"prompts": make_prompts((3,), seed), "formulation": "tokens"}

    def loss(x):
        each = jnp.sin(vit.apply({"params": params}, x, **given)[0]).sum(-1)
        return each.sum(), each

    grad, each = jax.jit(jax.grad(loss, has_aux=True))(IMAGES)
    return {"each": each, "sum": each.sum(), "grad": grad}


def scanned(body):
    return lambda x: jax.lax.scan(lambda c, y: (c, body(y)), 0.0, x[None])[1][0]


compiled_loss = jax.jit(loss_of)
# Functions that call the model, kept by JAX as they were traced, and their results.
TRACED = {
    "jit": (compiled_loss, "sum"),
    "vmap of jit": (lambda x: jax.vmap(compiled_loss)(x[:, None]), "each"),
    "jit of vmap": (jax.jit(lambda x: jax.vmap(loss_of)(x[:, None])), "each"),
    "grad of jit": (jax.grad(compiled_loss), "grad"),
    "jit of grad": (jax.jit(jax.grad(loss_of)), "grad"),
    "remat": (jax.checkpoint(loss_of), "sum"),
    "grad of remat": (jax.grad(jax.checkpoint(loss_of)), "grad"),
    "scan": (scanned(loss_of), "sum"),
    "map": (lambda x: jax.lax.map(loss_of, x[:, None]), "each"),
    "loop": (lambda x: jax.lax.fori_loop(0, 2, lambda i, _: loss_of(x), 0.0), "sum"),
    "cond": (lambda x: jax.lax.cond(x.sum() > 1e6, jnp.sum, loss_of, x), "sum"),
    "linearize": (lambda x: jax.linearize(compiled_loss, x)[0], "sum"),
}
# What JAX keeps apart; the others are combinations of these.
KEPT = ("jit", "vmap of jit", "grad of jit", "grad of remat", "scan", "loop", "cond")
each_traced = pytest.mark.parametrize(
    "name",
    [n if n in KEPT else pytest.param(n, marks=pytest.mark.slow) for n in TRACED],
)


@each_traced
def test_a_compiled_call_alone_or_beside_an_eager_one_is_an_error(name):
    """That the eager call was prompted says nothing about the other."""
    function, _ = TRACED[name]
    before = function(IMAGES)
    for beside in (False, True):  # what was refused once is refused again
        with pytest.raises(ValueError, match="inside the function that jax.jit"):
            with prompted(make_prompts((3,))):
                if beside:
                    loss_of(IMAGES)
                function(IMAGES)
    np.testing.assert_array_equal(function(IMAGES), before)


@each_traced
def test_one_compiled_function_is_right_for_all_prompts(name):
    """In a context within a compiled function, whatever was traced before."""
    function, what = TRACED[name]
    before = function(IMAGES)

    @jax.jit
    def run(prompts, x):
        with prompted(prompts):
            return function(x)

    for seed in (1, 2):
        got = run(make_prompts((3,), seed), IMAGES)
        assert relative(got, expected_of(seed)[what]) < 1e-4
        assert relative(got, before) > 1e-2
    np.testing.assert_array_equal(function(IMAGES), before)


def test_what_calls_no_model_may_be_compiled_in_the_context():
    module, params, *_ = setting("vit_jax")
    double = jax.jit(lambda x: 2 * x)
    with prompted(make_prompts()):
        got = double(plain(module, params))
    expected = 2 * features(module, params, prompts=make_prompts())
    np.testing.assert_array_equal(got, expected)


def test_another_transformer_beside_the_model_is_an_error():
    module, params, *_ = setting("vit_jax")
    variables = {"params": random_params(OTHER_NAMES, TOKENS)}
    with prompted(make_prompts()):
        plain(module, params)
        nn.Dense(2).init(jax.random.key(0), TOKENS)  # no transformer
    with pytest.raises(ValueError, match="no block was reached.*layer0"):
        with prompted(make_prompts()):
            plain(module, params)
            OTHER_NAMES.apply(variables, TOKENS)


def test_compiled_functions_inside_a_traced_context_do_not_keep_its_prompts():
    module, params, *_ = setting("one block")
    inner = jax.jit(lambda x: module.apply({"params": params}, x, train=False))
    before = inner(IMAGES)  # traced without prompts
    a, b = make_prompts((3,), seed=1), make_prompts((3,), seed=2)

    @jax.jit
    def both(x):
        results = []
        for prompts in (a, b):
            with prompted(prompts):
                results.append(inner(x))
        return results, inner(x)

    results, outside = both(IMAGES)
    for got, prompts in zip(results, (a, b), strict=True):
        assert relative(got, features(module, params, prompts=prompts)) < 1e-5
    assert relative(outside, before) < 1e-6
    np.testing.assert_array_equal(inner(IMAGES), before)


@pytest.mark.parametrize("transform", [jax.grad, lambda f: jax.vmap(f)])
def test_a_gradient_around_the_model_is_no_compilation(transform):
    module, params, *_ = setting("one block")
    prompts = make_prompts((3,))
    images = IMAGES[:, None] if transform is not jax.grad else IMAGES

    def loss_inside(x):
        return jnp.sin(features(module, params, x, prompts=prompts)).sum()

    with prompted(prompts):
        got = transform(loss_of)(images)
    np.testing.assert_array_equal(got, transform(loss_inside)(images))


# --- errors: got, expected, what to do ------------------------------------------------


class Blocks(nn.Module):
    """Leaves out blocks, mixes them up, or has other names for them."""

    order: tuple[int, ...] = (0, 1, 2)
    names: str = "encoderblock_"

    @nn.compact
    def __call__(self, x, train=False):
        for i in self.order:
            x, _ = BigVisionBlock(24, 2, name=f"{self.names}{i}")(x)
        return x.mean(1)


OTHER_NAMES = Blocks(names="layer")


class Towers(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        a, _ = foreign.BigVisionEncoder(DEPTH, 24, 2, name="img")(x)
        b, _ = foreign.BigVisionEncoder(DEPTH, 24, 2, name="txt")(x)
        return (a + b).sum(1)


class Group(nn.Module):
    """Half of the layers: it is scanned, so a block's number is not its layer."""

    @nn.compact
    def __call__(self, x, _):
        for i in range(DEPTH):
            x, _ = BigVisionBlock(24, 2, name=f"encoderblock_{i}")(x)
        return x, None


class Groups(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        scan = nn.scan(
            Group, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        return scan(name="groups")(x, None)[0].mean(1)


def mixed(self, x):
    """Mixes tokens without attention modules of Flax."""
    weights = nn.softmax(jnp.einsum("bqd,bkd->bqk", x, x))
    return x + nn.Dense(WIDTH)(weights @ x)


def bare(self, x):
    """By an attention that takes neither mask nor bias."""

    def attend(query, key, value):
        return nn.dot_product_attention(query, key, value)

    return x + nn.MultiHeadDotProductAttention(self.num_heads, attention_fn=attend)(x)


MIXER = VitJax(block=block_of(mixed))
TOKENS = jax.random.normal(jax.random.key(6), (BATCH, 5, WIDTH))
ONES = tuple(jnp.ones(n) for n in NUM)


@pytest.mark.parametrize(
    ("module", "kwargs", "message"),
    [
        (VitJax(), {"prompts": make_prompts((1, 1))}, "block 2 but the prompts have 2"),
        (VitJax(), {"prompts": make_prompts((1,) * 4)}, "only blocks 0 ... 2 were"),
        (VitJax(width=12), {}, r"prompts\[0\] has shape \(3, 16\).*width 12"),
        (VitJax(), {"prompt_mask": ONES[:2]}, r"mask has \(3, 0\) .* have \(3, 0, 3\)"),
        (VitJax(), {"deep": False}, r"counts \(3, 0, 3\) with deep=False"),
        (MIXER, {"prompt_gate": ONES}, "block 0 called no flax"),
        (VitJax(block=block_of(bare)), {"prompt_gate": ONES}, r"0 takes \('query'"),
        (VitJax(), {"block": "encoderblock_"}, "has 0 groups; expected one"),
        (VitJax(), {"block": r"layer(\d+)"}, r"that ran: \(the model\), embedding"),
    ],
)
def test_wrong_prompts_and_models(module, kwargs, message):
    params = random_params(module, IMAGES)
    with pytest.raises(ValueError, match=message):
        check(module, params, **{"prompts": make_prompts(), **kwargs})


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (OTHER_NAMES, "no block was reached.*layer0.*pass block="),
        (Towers(), "blocks below 'img' and below 'txt'; pass block="),
        (Blocks((1, 0, 2)), "block 1 was called where block 0 was due"),
        (Groups(), "the encoder is scanned"),
    ],
    ids=["names", "towers", "order", "groups"],
)
def test_wrong_encoders(module, message):
    params = random_params(module, TOKENS)
    with pytest.raises(ValueError, match=message):
        check(module, params, TOKENS, prompts=make_prompts())


@pytest.mark.parametrize(
    ("module", "block"),
    [(OTHER_NAMES, r"layer(\d+)"), (Towers(), r"txt/encoderblock_(\d+)")],
    ids=["names", "towers"],
)
def test_other_names_and_one_of_several_encoders(module, block):
    params = random_params(module, TOKENS)
    some = features(module, params, TOKENS, block=block, prompts=make_prompts())
    none = plain(module, params, TOKENS)
    assert some.shape == none.shape and relative(some, none) > 1e-3


def test_a_scanned_encoder_is_an_error():
    _, params, *_ = setting("big_vision gap")
    scanned = BigVision(scan=True)
    stacked = foreign.to_scan(params)
    assert relative(plain(scanned, stacked), plain(BigVision(), params)) < 1e-5
    message = "'Transformer/encoderblock', runs for many layers.*scan=False"
    with pytest.raises(ValueError, match=message):
        check(scanned, stacked, prompts=make_prompts())


def test_blocks_made_by_nn_jit_are_an_error():
    # Its keyword is no array, but nothing reads it.
    block = block_of(lambda self, x: VitJaxBlock.__call__(self, x, deterministic=True))
    module, (_, params, *_) = VitJax(block=nn.jit(block)), setting("vit_jax")
    with pytest.raises(ValueError, match="'encoderblock_0', made by nn.jit"):
        run(module, params, prompts=make_prompts())
    with pytest.raises(ValueError, match="Blocks made by nn.jit"):
        check(module, params, prompts=make_prompts())


def test_no_model_in_the_context_is_an_error():
    with pytest.raises(ValueError, match="3 layers but no block was reached"):
        with prompted(make_prompts()):
            pass


def test_every_pass_must_be_complete():
    params = random_params(Blocks(), TOKENS)

    def two_passes():
        with prompted(make_prompts()):
            for order in ((0, 1, 2), (0, 1)):
                Blocks(order).apply({"params": params}, TOKENS)

    with pytest.raises(ValueError, match="only blocks 0 ... 1 were reached"):
        jax.eval_shape(two_passes)


def test_an_error_inside_is_not_hidden():
    with pytest.raises(KeyError, match="mine"):
        with prompted(make_prompts()):
            raise KeyError("mine")


@pytest.mark.parametrize(
    ("block", "x", "message"),
    [
        (lambda _, x: {"x": x}, TOKENS, "returned dict; expected an array of the same"),
        (lambda _, x: x[:, :1], TOKENS, r"\(4, 7, 16\) and returned \(4, 1, 16\)"),
        (lambda _, x: x, TOKENS[0], r"given shape \(5, 16\); expected tokens"),
    ],
    ids=["dict", "shorter", "one example"],
)
def test_wrong_tokens(block, x, message):
    class One(nn.Module):
        @nn.compact
        def __call__(self, x):
            made = block_of(block)(24, 2, name="encoderblock_0")
            return made(x, deterministic=True)

    with pytest.raises(ValueError, match=message):
        with prompted(make_prompts((2,))):
            One().apply({}, x)


# --- the adapter ----------------------------------------------------------------------


def test_the_adapter_returns_features_attention_and_the_models_own_result():
    module, params, vit, vit_params = setting("big_vision tok")
    given = make_case("masked")
    got, out = adapter(module).apply({"params": params}, IMAGES, **given)
    expected, ours = AsTokens(vit).apply({"params": vit_params}, IMAGES, **given)
    assert relative(got, expected) < 1e-5
    for a, b in zip(out["blocks"], ours["blocks"], strict=True):
        np.testing.assert_allclose(
            a["prompt_attention"], b["prompt_attention"], atol=1e-6
        )
    np.testing.assert_array_equal(out["result"][1]["pre_logits"], got)


def test_the_adapter_finds_features_beside_a_head():
    headless, params, *_ = setting("big_vision tok")
    module = headless.clone(num_classes=7)
    params = {**params, "head": {"kernel": jnp.ones((WIDTH, 7)), "bias": jnp.ones(7)}}
    given, how = ({"params": params}, IMAGES), {"prompts": make_prompts()}
    with pytest.raises(ValueError, match=r"\(4, 7\); expected features \(4, 16\)"):
        adapter(module).apply(*given, **how)
    reads = adapter(module, read=lambda result: result[1]["pre_logits"])
    got, _ = reads.apply(*given, **how)
    assert relative(got, features(headless, params, **how)) < 1e-6


def test_the_adapter_says_what_it_needs():
    variables = {"params": random_params(MIXER, IMAGES)}
    with pytest.raises(ValueError, match="called no flax.linen.MultiHead"):
        adapter(MIXER).apply(variables, IMAGES, prompts=make_prompts())
    with pytest.raises(ValueError, match="need prompts; got None"):
        adapter(MIXER).apply(variables, IMAGES, prompt_gate=ONES)


def test_the_adapter_is_static_whatever_the_model_holds():
    model = adapter(setting("vit_jax")[0], call={"train": False, "rngs": None})
    assert model.widths == (WIDTH,) * DEPTH
    assert hash(model) == hash(model) and model != adapter(model.model)
