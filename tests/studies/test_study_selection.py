# SPDX-License-Identifier: Apache-2.0
import itertools
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from test_study_importance import make_lab

from studies import masked, selection, study
from studies.selection import fewest, lost_at_most, merged
from vpt_jax import train
from vpt_jax.run import stages

pytestmark = pytest.mark.usefixtures("standard_promotion")


def prompts_of(*layers):
    return tuple(jnp.asarray(layer, jnp.float32) for layer in layers)


def test_a_mean_is_clear_beyond_its_interval():
    expected = scipy.stats.ttest_1samp([1.0, 2.0, 3.0], 0).confidence_interval(0.95)
    mean, margin = study.paired([1.0, 2.0, 3.0])
    assert (mean - margin, mean + margin) == pytest.approx(tuple(expected), rel=1e-3)
    assert study.clear([1.0, 2.0, 3.0]) is None
    assert study.clear([1.0, 1.1, 1.2]) is True
    assert study.clear([-1.0, -1.1, -1.2]) is False
    assert study.clear([5.0]) is None  # one seed decides nothing
    assert study.with_margin([5.0], 1) == "+5.0"


def test_merging_is_the_mean_weighted_by_scores():
    p = np.array([[1.0, -1, 0, 0], [0, 0, 1, -1], [4, -2, -1, -1], [0, 0, 1, -1]])
    scores = (jnp.array([3.0, 1.0, 1.0, 0.5]),)
    mask = (jnp.array([True, True, False, False]),)
    got = np.asarray(merged(prompts_of(p), scores, mask)[0])
    np.testing.assert_allclose(got[0], (3 * p[0] + p[2]) / 4, atol=1e-6)
    np.testing.assert_allclose(got[1], p[1], atol=1e-6)  # its copy changes nothing


def test_layers_that_keep_none_or_all_are_left_alone():
    p = prompts_of(np.eye(3), np.eye(3))
    scores = (jnp.ones(3), jnp.ones(3))
    mask = (jnp.zeros(3, bool), jnp.ones(3, bool))
    for a, b in zip(merged(p, scores, mask), p, strict=True):
        np.testing.assert_array_equal(a, b)


@given(st.floats(0.02, 0.3), st.floats(0.02, 0.3), st.integers(0, 2**32 - 1))
def test_the_bound_covers_what_is_lost_in_the_long_run(worse, better, seed):
    """Of 400 draws of 150 pictures, about 90 % are bounded at 90 % confidence."""
    rng = np.random.default_rng(seed)
    draws = rng.choice(3, (400, 150), p=(worse, better, 1 - worse - better))
    covered = 0
    for draw in draws:
        before = "".join("101"[k] for k in draw)
        after = "".join("011"[k] for k in draw)
        covered += lost_at_most(before, after, 0.9) >= 100 * (worse - better)
    # Five standard deviations of 400 coin tosses; coverage itself is off by under 2 %.
    assert covered / 400 > 0.9 - 0.02 - 5 * math.sqrt(0.09 / 400)


def test_the_first_ratio_that_fails_ends_the_search():
    before = "1" * 200
    good, bad = "1" * 199 + "0", "1" * 150 + "0" * 50
    assert fewest(before, {0.7: good, 0.5: bad, 0.3: good}) == 0.7
    assert fewest(before, {0.7: good, 0.5: good, 0.3: good}) == 0.3
    assert fewest(before, {0.7: bad, 0.5: good}) == 1.0
    with pytest.raises(ValueError, match="200 and 199 answers"):
        lost_at_most(before, before[1:], 0.9)


@pytest.fixture
def lab(tmp_path):
    lab = make_lab(tmp_path)
    task = lab.pictures.task
    both = task._replace(val=task.test)
    return lab._replace(pictures=lab.pictures._replace(task=both))


SMALL = {
    "scores": ("removal", "leave_one_out", "random"),
    "tuned": ("removal", "random"),
    "ratios": (0.7, 0.5, 0.34),
    "tuned_ratios": (0.5, 0.34),
    "automatic_ratios": (0.7, 0.34),
}


def test_the_study_measures_and_shows(lab):
    compiled = train.train_epoch._cache_size()
    result = json.loads(json.dumps(selection.run(lab, **SMALL), allow_nan=False))
    # Tuning with full prompts, and one program for every mask.
    assert train.train_epoch._cache_size() == compiled + 2
    again = selection.run(lab, **SMALL)
    assert again == result  # found on disk
    text = study.html(selection.show(result))
    assert text.count("<svg") == 2
    assert len(selection.show(result).verdicts) == 5
    for row in result["rows"]:
        if row["how"] != "all":
            total = sum(row["counts"])
            wanted = max(1, int(row["ratio"] * 6 + 0.5))
            assert total == (wanted if row["scope"] == "global" else total)
    assert 0 < sum(row["how"] == "iterative" for row in result["rows"]) == 4


def test_iterative_selection_ends_with_the_ratio_and_never_takes_back(lab):
    with study.running(lab) as run:
        start = study.tuned(run, 0)
        mask_of = selection.falling(run, "removal", 0.34)
        epochs = run.config.finetune.epochs
        masks = [
            np.concatenate(mask_of(epoch, start)) for epoch in range(max(2, epochs))
        ]
    assert masks[epochs - 1].sum() == 2
    for before, after in itertools.pairwise(masks):
        assert not (after & ~before).any()


def test_a_task_without_validation_pictures_is_an_error(lab):
    task = lab.pictures.task._replace(val=None)
    lab = lab._replace(pictures=lab.pictures._replace(task=task))
    with study.running(lab) as run, pytest.raises(ValueError, match="without val"):
        start = study.tuned(run, 0)
        mask = tuple(jnp.ones(n, bool) for n in (2, 2, 2))
        masked.outcome(run, 0, "x", start, selection.fixed(mask), tune=False)


def test_scores_over_a_mask_leave_out_what_is_out(lab):
    with study.running(lab) as run:
        start = study.tuned(run, 0)
        mask = (jnp.array([True, False]), jnp.ones(2, bool), jnp.ones(2, bool))
        scores = stages.score_over(run, start, "removal", prompt_mask=mask)
    assert np.isneginf(scores[0][1]) and np.isfinite(scores[0][0])
