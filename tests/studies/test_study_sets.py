# SPDX-License-Identifier: Apache-2.0
import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from test_study_importance import make_lab

import vpt_jax
from studies import masked, moves, sets, study

pytestmark = pytest.mark.usefixtures("standard_promotion")
NUM = (2, 2, 2)


@pytest.fixture(scope="module")
def problem(tiny):
    """`(model, backbone, trainable, batch)`, trained until each prompt has a part."""
    model, backbone = tiny
    keys = jax.random.split(jax.random.key(1), 4)
    prompts = vpt_jax.init_prompts(keys[0], model, NUM)
    head = vpt_jax.init_head(keys[1], model.width, 4)
    start = {"prompts": jax.tree.map(lambda p: 5 * p, prompts), "head": head}
    batch = {
        "image": jax.random.normal(keys[2], (16, 8, 8, 3)),
        "label": jax.random.randint(keys[3], (16,), 0, 4),
    }

    def loss(trainable):
        given = {"prompts": trainable["prompts"]}
        features, _ = model.apply({"params": backbone}, batch["image"], **given)
        logits = vpt_jax.apply_head(trainable["head"], features)
        return vpt_jax.cross_entropy(logits, batch).mean()

    optimizer = optax.adam(0.03)

    @jax.jit
    def fit(trainable):
        def step(carry, _):
            trainable, state = carry
            updates, state = optimizer.update(jax.grad(loss)(trainable), state)
            return (optax.apply_updates(trainable, updates), state), None

        first = trainable, optimizer.init(trainable)
        return jax.lax.scan(step, first, None, length=150)[0][0]

    return model, backbone, fit(start), batch


def test_of_every_prompt_twice_one_goes(problem):
    model, backbone, trainable, batch = problem
    prompts = tuple(jnp.repeat(p, 2, axis=0) for p in trainable["prompts"])
    twice, num = {**trainable, "prompts": prompts}, vpt_jax.counts(prompts)

    def measure(masks):
        given = backbone, twice, batch["image"], masked.split(masks, num), model
        return np.asarray(masked.logits_under(*given))

    order = sets.eliminate(measure, np.asarray(batch["label"]), sum(num))
    single = vpt_jax.importance(model, backbone, twice, [batch])
    one = [
        (
            np.concatenate(vpt_jax.keep_mask(s, keep_ratio=0.5)).reshape(-1, 2).sum(1)
            == 1
        )
        for s in (sets.importance_of(order, num), single)
    ]
    assert one[0].all()
    assert not one[1].all()


def exact_order(measure, labels, m):
    """Greedy elimination in its plainest form: every set is measured."""
    kept, order = set(range(m)), []
    while kept:
        losses = {}
        for j in sorted(kept, reverse=True):  # of equal ones the last goes
            mask = np.isin(np.arange(m), list(kept - {j}))
            log_p = scipy.special.log_softmax(measure(mask[None])[0], axis=-1)
            losses[j] = -log_p[np.arange(len(labels)), labels].mean()
        order.append(min(losses, key=losses.get))
        kept.remove(order[-1])
    return order


def test_elimination_is_greedy_over_measured_sets():
    """Where changes add up at once; else if all is measured again after each."""
    rng = np.random.default_rng(0)
    changes, labels = rng.normal(size=(7, 9, 3)), rng.integers(0, 3, 9)

    def linear(masks):
        return np.einsum("cm,mnk->cnk", masks.astype(float), changes)

    def bent(masks):
        return np.tanh(linear(masks)) * 3

    for measure, again in ((linear, 1.0), (linear, 0.5), (bent, 0.0)):
        got = sets.eliminate(measure, labels, 7, again)
        assert got == exact_order(measure, labels, 7)
    assert sets.eliminate(bent, labels, 7, 1.0) != exact_order(bent, labels, 7)


def test_of_equal_prompts_the_later_goes():
    order = sets.eliminate(
        lambda masks: np.zeros((len(masks), 2, 2)), np.zeros(2, int), 4
    )
    assert order == [3, 2, 1, 0]
    scores = sets.importance_of([3, 0, 1, 2], (1, 3))
    assert [np.asarray(s).tolist() for s in scores] == [[1], [2, 3, 0]]


def test_gains_are_slopes_at_the_gates(problem):
    model, backbone, trainable, batch = problem
    mask = masked.split(np.array([1, 0, 0, 1, 0, 0], bool), NUM)
    found = moves.gains(backbone, trainable, batch, mask, model=model)
    given = [batch], {"score": "signed", "prompt_mask": mask}
    signed = vpt_jax.importance(model, backbone, trainable, *given[:1], **given[1])
    for gain, score, there in zip(found, signed, mask, strict=True):
        np.testing.assert_allclose(gain[there], score[there], rtol=1e-4, atol=1e-6)

    @jax.jit
    def loss(share):
        gates = tuple(jnp.where(m, 1.0, share) for m in mask)
        given = {"prompts": trainable["prompts"], "prompt_gate": gates}
        features, _ = model.apply({"params": backbone}, batch["image"], **given)
        logits = vpt_jax.apply_head(trainable["head"], features)
        return vpt_jax.cross_entropy(logits, batch).mean()

    h = 0.01  # its square is the formula's error; rounding of the loss leaves 1e-5
    slope = (4 * loss(h) - loss(2 * h) - 3 * loss(0.0)) / (2 * h)
    total = sum(
        float(jnp.where(m, 0, g).sum()) for g, m in zip(found, mask, strict=True)
    )
    assert total == pytest.approx(-float(slope), rel=1e-2, abs=1e-4)


def test_a_third_is_replaced_by_what_gains_most():
    mask = masked.split(np.array([1, 1, 0, 0, 1, 0], bool), NUM)
    worth = masked.split(np.array([3, 1, -np.inf, -np.inf, 2, -np.inf]), NUM)
    gain = masked.split(np.array([9, 9, 1, 3, 9, 2.0]), NUM)
    new = np.concatenate(moves.replaced(mask, worth, gain))
    assert new.tolist() == [True, False, False, True, True, False]


def test_idle_prompts_go_where_the_loss_is_least():
    """Against all that a move can be, tried one by one; the number stays."""
    rng = np.random.default_rng(1)
    changes, labels = rng.normal(size=(6, 9, 3)), rng.integers(0, 3, 9)

    def measure(masks):
        return np.tanh(np.einsum("cm,mnk->cnk", masks.astype(float), changes))

    worth = np.array([3, 1, 0, 5, 2, 4.0])
    mask = masked.split(np.array([1, 1, 0, 0, 1, 0], bool), NUM)
    found = np.concatenate(moves.relocated(measure, labels, mask, worth, [4, 0]))
    there = {0, 1, 4}
    for gone in (4, 0):
        # The first layer has no room at first; of the second comes prompt 3 before 2.
        losses = {}
        for layer in ((0, 1), (2, 3), (4, 5)):
            free = [j for j in layer if j not in there]
            if free:
                come = max(free, key=lambda j: worth[j])
                kept = there - {gone} | {come}
                log_p = scipy.special.log_softmax(
                    measure(np.isin(np.arange(6), list(kept))[None])[0], axis=-1
                )
                losses[come] = -log_p[np.arange(9), labels].mean()
        there = there - {gone} | {min(losses, key=losses.get)}
    assert set(np.flatnonzero(found)) == there
    assert there != {0, 1, 4}
    same = moves.relocated(measure, labels, mask, worth, [])
    assert np.concatenate(same).tolist() == np.concatenate(mask).tolist()


@pytest.mark.slow  # a minute, to compile
def test_the_study_measures_and_shows(tmp_path):
    lab = make_lab(tmp_path)
    task = lab.pictures.task
    task = task._replace(val=task.test)
    lab = lab._replace(
        config=dataclasses.replace(lab.config, seeds=(0,)),
        pictures=lab.pictures._replace(task=task),
    )
    small = {"ratio": 0.5, "sizes": (1, 2), "number": 8}
    result = json.loads(json.dumps(sets.run(lab, **small), allow_nan=False))
    assert sets.run(lab, **small) == result  # found on disk
    text = study.html(sets.show(result))
    for way, tuned in itertools.product(("removal", "elimination", "random"), (0, 1)):
        (row,) = [r for r in result["rows"] if (r["way"], r["tuned"]) == (way, tuned)]
        assert sum(row["counts"]) == 3 and way in text
    for way in moves.NAMES:
        (moved,) = [r for r in result["rows"] if r["way"] == way]
        assert sum(moved["counts"]) == 3 and way in text
    ones = [r for r in result["agreement"] if r["size"] == 1]
    assert ones[0]["exact single logits"] == pytest.approx(1)
