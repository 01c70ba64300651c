# SPDX-License-Identifier: Apache-2.0
"""A CPU attends block by block where nothing is differentiated: same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vpt_jax.models.attention import attend
from vpt_jax.models.xla import blocks

B, H, Q, T, C = 4, 3, 201, 340, 256  # two blocks, of 101 and 100 queries
at_once = attend.__wrapped__


@pytest.fixture(params=["plain", "by key", "by key and query"])
def given(request, getkey):
    shapes = {"q": (B, H, Q, C), "k": (B, H, T, C), "v": (B, H, T, C)}
    q, k, v = (jax.random.normal(getkey(), s) for s in shapes.values())
    own = {"plain": None, "by key": (B, T), "by key and query": (B, H, Q, T)}
    if (shape := own[request.param]) is None:
        return q / 16, k, v, None
    gates = jax.random.uniform(getkey(), shape, minval=0.1)
    return q / 16, k, v, jnp.where(jax.random.bernoulli(getkey(), 0.7, shape), gates, 0)


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile()


def products(function, platform, *args):
    lowered = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,))
    return lowered.as_text().count("stablehlo.dot_general")


def test_how_many_blocks():
    def number(b, h, queries, keys, c=64):
        found = []
        shapes = ((b, h, queries, c), (b, h, keys, c))
        inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        jax.eval_shape(lambda q, k: found.append(blocks(q, k)), *inputs)
        return found[0]

    assert number(8, 12, 197, 197) == 1  # a head's weights are small
    assert number(8, 12, 197, 397) == 2
    assert number(8, 12, 577, 577) == 6
    assert number(1, 12, 197, 397) == 1  # the blocks' results would be small
    assert number(64, 12, 1, 397) == 1  # the last block's class token
    assert number(8, 12, 1, 2**17) == 1  # fewer queries than blocks


def test_values_and_weights(given):
    assert blocks(*given[:2]) == 2
    for run in (attend, jax.jit(attend)):
        for ours, theirs in zip(run(*given), at_once(*given), strict=True):
            assert ours.shape == theirs.shape
            np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize("which", [(0,), (1, 2), (0, 1, 2, 3)])
def test_derivatives_are_those_of_attention_at_once(given, which):
    """By some inputs or all, in both modes, and once more; others cost nothing."""
    which = tuple(i for i in which if given[i] is not None)

    def loss(run, *some):
        new = list(given)
        for i, x in zip(which, some, strict=True):
            new[i] = x
        out, weights = run(*new)
        return (out**2).sum() + (weights[..., :3] ** 3).sum()

    some = [given[i] for i in which]
    argnums = tuple(range(len(which)))
    ours, theirs = (
        compiled(jax.grad(functools.partial(loss, run), argnums), *some)
        for run in (attend, at_once)
    )
    for a, b in zip(ours(*some), theirs(*some), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * abs(b).max())
    assert ours.cost_analysis()["flops"] == theirs.cost_analysis()["flops"]
    moves = [jnp.ones_like(x) for x in some]
    ours, theirs = (
        jax.jvp(jax.grad(functools.partial(loss, run), argnums), some, moves)[1]
        for run in (attend, at_once)
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * abs(b).max())


def test_many_runs_at_once(given):
    stacked = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), given)
    ours = jax.jit(jax.vmap(attend))(*stacked)[0]
    for own, one in zip(ours, (0, 1), strict=True):
        theirs = at_once(*jax.tree.map(lambda x: x[one], stacked))[0]  # noqa: B023
        np.testing.assert_allclose(own, theirs, atol=2e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_batch_may_be_split_over_devices(given, kind):
    mesh = jax.make_mesh(
        (2,), ("batch",), axis_types=(kind,), devices=jax.devices()[:2]
    )
    with jax.set_mesh(mesh):
        split = jax.device_put(given, NamedSharding(mesh, PartitionSpec("batch")))
        out = jax.jit(attend)(*split)[0]
        text = compiled(lambda *given: attend(*given)[0], *split).as_text()
    assert out.sharding.spec[0] == "batch"
    assert "all-" not in text
    np.testing.assert_allclose(out, at_once(*given)[0], atol=2e-6)


def test_accelerators_attend_at_once(given):
    assert products(attend, "cpu", *given) == 2 * 2
    for platform in ("cuda", "tpu"):
        assert products(attend, platform, *given) == 2


def test_weights_that_nobody_reads_are_not_kept(given):
    """Only slices of queries and their results are in memory, not `[b, h, q, t]`."""
    program = compiled(lambda *given: attend(*given)[0], *given)
    assert program.cost_analysis()["flops"] < 1.2 * 4 * B * H * Q * T * C
    if given[3] is None:
        assert program.memory_analysis().temp_size_in_bytes < 2 * given[0].nbytes
