# SPDX-License-Identifier: Apache-2.0
"""A run that finds its rate: which trials there are, what is chosen, what it costs."""

import math

import numpy as np
import pytest
from conftest import SMALL, load_config, save_small_backbone
from hypothesis import given, settings
from hypothesis import strategies as st

from vpt_jax.bench import jobs, protocol, search
from vpt_jax.bench.benchmark_config import SearchConfig
from vpt_jax.report import cautions
from vpt_jax.run import experiment, stages

pytestmark = pytest.mark.usefixtures("standard_promotion", "few_pictures")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_small_backbone(tmp_path_factory.mktemp("weights") / "w.safetensors")


def plain(**changes):
    """The demo's config as it is, on digits; keys as in `tune__epochs`."""
    values = load_config("configs/demo.py", "digits").to_dict()
    for name, value in {"tune__epochs": 20, **changes}.items():
        group, _, key = name.rpartition("__")
        (values[group] if group else values)[key] = value
    return values


def bench(**changes):
    own = SearchConfig(**changes)
    values = plain()
    del values["search"]
    search.fill_lengths(values)
    return search.benchmark_of(own, values)


def searched(bench, accuracy):
    """Results of all trials, with `accuracy(rate, head_init, epochs)`."""
    results = {}
    while True:
        ready = [j for j in protocol.jobs(bench, results) if j.kind != "final"]
        ready = [j for j in ready if j.name not in results]
        if not ready:
            return results
        for job in ready:
            tune, start = job.config.tune, job.config.prompts.head_init
            found = accuracy(tune.base_lr, start, tune.epochs)
            results[job.name] = {"rows": [{"val_accuracy": found}]}


ALL = [(rate, start) for rate in (0.01, 0.03) for start in ("zeros", "probe")]


def test_all_are_tried_briefly_and_the_better_rate_of_each_start_longer():
    known = bench()
    first = [j.config for j in protocol.jobs(known, {}) if j.kind == "grid"]
    assert [(c.tune.base_lr, c.prompts.head_init) for c in first] == ALL
    assert {c.tune.epochs for c in first} == {3}
    assert all(c.tune.warmup_epochs == pytest.approx(0.3) for c in first)
    best = protocol.chosen(known, "digits", "grid", searched(known, lambda *at: 0.5))
    assert (best["base_lr"], best["head_init"]) == ALL[0]  # of equals
    # One start leads by far in short trials: the other reaches the long ones too.
    results = searched(known, lambda rate, start, epochs: rate + (start == "probe"))
    tried = protocol.grid(known, "digits", "grid", results)
    assert [(t["base_lr"], t["head_init"]) for t in tried[4:]] == ALL[2:]
    assert {t["epochs"] for t in tried[4:]} == {13}
    assert len(protocol.planned(known)) == len(tried) + 1


KNOWN = bench()


@settings(max_examples=6)
@given(st.permutations([0.2, 0.4, 0.6, 0.8]), st.permutations([0.1, 0.3]))
def test_the_best_of_the_longest_trials_is_chosen(short, long):
    known = KNOWN
    of_short = dict(zip(ALL, short, strict=True))
    starts = [[c for c in ALL if c[1] == start] for start in ("zeros", "probe")]
    kept = [max(own, key=lambda c: of_short[c]) for own in starts]
    of_long = dict(zip(kept, long, strict=True))
    results = searched(known, lambda *at: (of_short if at[2] == 3 else of_long)[at[:2]])
    # A short trial may have been better; its rate fell sooner.
    best = max(of_long, key=lambda c: of_long[c])
    chosen = protocol.chosen(known, "digits", "grid", results)
    config = protocol.single(known, "digits", chosen)
    assert (config.tune.base_lr, config.prompts.head_init) == best
    assert config.tune.epochs == 20


@pytest.mark.parametrize("epochs", [2, 3, 5, 12, 100])
def test_a_search_costs_at_most_what_it_says(epochs):
    """Counted in pictures times epochs, with whole epochs: 2.2 full trainings."""
    known = bench()
    known.base["tune"].update(epochs=epochs, warmup_epochs=epochs / 10)
    results = searched(known, lambda *at: at[0])
    found = search.summary(known, "digits", results)
    trials = protocol.grid(known, "digits", "grid", results)
    assert found["cost"] == pytest.approx(
        sum(t["epochs"] for t in trials) / epochs, abs=5e-4
    )
    assert found["cost"] <= 2.2


@pytest.mark.parametrize("num", [5, 100, 800, 5000, 100_000])
def test_a_handful_of_pictures_is_seen_more_often(num, monkeypatch):
    monkeypatch.setattr(jobs, "num_train", lambda *args: num)
    values = plain(tune__epochs=None)
    search.fill_lengths(values)
    epochs = values["tune"]["epochs"]
    assert epochs in range(search.EPOCHS[0], search.EPOCHS[1] + 1)
    if search.EPOCHS[0] < epochs < search.EPOCHS[1]:
        assert 0 <= epochs * math.ceil(num / 32) - search.STEPS < math.ceil(num / 32)
    assert values["finetune"]["epochs"] == epochs // 2
    assert values["tune"]["warmup_epochs"] == epochs / 10


def whole(checkpoint, **changes):
    few = {"condense__keep_ratios": (0.3,), "baselines": ("linear",)}
    short = {"tune__epochs": 3, "prompts__num_prompts": 2}
    values = plain(**{**few, **short, **changes})
    values["backbone"].update(variant=SMALL, checkpoint=str(checkpoint))
    return values


def run(values, workdir, command=""):
    """As the command does."""
    config, found = search.choose(values, workdir)
    return experiment.run(config, workdir, command, found)


@pytest.fixture(scope="module")
def finished(checkpoint, standard_promotion, few_pictures, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, run(whole(checkpoint), workdir, "a command")


def test_the_report_shows_every_trial(finished):
    workdir, report = finished
    found = report["search"]
    assert [(r["base_lr"], r["head_init"]) for r in found["trials"]][:4] == ALL
    assert report["config"]["tune"]["base_lr"] == found["chosen"]["base_lr"]
    assert report["config"]["prompts"]["head_init"] == found["chosen"]["head_init"]
    assert report["config"]["finetune"]["base_lr"] == found["chosen"]["base_lr"]
    page = (workdir / "report.html").read_text()
    assert "How the rate was found" in page and found["sentence"] in page
    probe = report["rows"][0]
    assert probe["stage"] == "linear" and probe["decay"] > 0
    tuned = report["rows"][1]
    epochs = report["config"]["tune"]["epochs"]
    assert len(tuned["losses"]) == epochs and all(map(np.isfinite, tuned["losses"]))
    assert tuned["watched"][-1] == [epochs, tuned["val_accuracy"]]


def test_an_interrupted_search_goes_on(finished, checkpoint, tmp_path, monkeypatch):
    """Killed after two trials: what was done is not done again, the end is the same."""
    perform, done = jobs.perform, []

    def stopped(job, *args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job.name)
        return perform(job, *args)

    monkeypatch.setattr(jobs, "perform", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(whole(checkpoint), tmp_path, "a command")
    monkeypatch.undo()
    report = run(whole(checkpoint), tmp_path, "a command")
    expected = finished[1]
    assert report["search"] == expected["search"]
    monkeypatch.setattr(stages, "fit", lambda *args: 1 / 0)
    again = run(whole(checkpoint), tmp_path, "a command")
    assert again["search"] == report["search"] and again["rows"] == report["rows"]
    timed = {"latency_ms": 0, "latency_spread": 0}
    same = [r | timed for r in report["rows"]]
    assert same == [r | timed for r in expected["rows"]]


def test_a_given_rate_skips_the_search(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "perform_trials", lambda *args: 1 / 0)
    values = whole(checkpoint, tune__base_lr=0.01, baselines=())
    report = run(values, tmp_path)
    assert "search" not in report
    assert report["config"]["finetune"]["base_lr"] == 0.01


def test_another_config_is_refused_before_a_trial(finished, checkpoint, monkeypatch):
    monkeypatch.setattr(search, "perform_trials", lambda *args: 1 / 0)
    with pytest.raises(ValueError, match="num_prompts: 2 -> 3"):
        run(whole(checkpoint, prompts__num_prompts=3), finished[0])


def test_a_benchmark_can_be_run_with_the_recipe():
    values = load_config("configs/vtab.py", "search,task=svhn")
    known = protocol.parse(values)
    names = [job.name for job in protocol.jobs(known, {})]
    assert names[0] == "svhn/linear" and len(names) == 5
    results = {name: {"rows": [{"val_accuracy": 0.5, "decay": 0.1}]} for name in names}
    names = [job.name for job in protocol.jobs(known, results)]
    results |= {name: {"rows": [{"val_accuracy": 0.5}]} for name in names[5:]}
    *_, last = protocol.jobs(known, results)
    assert last.kind == "final" and last.config.task.splits == "final"
    assert last.config.tune.optimizer == "adamw" and last.config.tune.base_lr == 0.01
    assert last.config.linear.weight_decay == 0.1  # there is no val to choose it on
    assert last.config.finetune.weight_decay == 0


# What a person should know.


def report_of(**changes):
    row = {"seed": 0, "score": None, "scope": None, "keep_ratio": 1.0}
    row |= {"val_accuracy": 0.8, "test_accuracy": 0.8, "stage": "tune"}
    linear = {**row, "stage": "linear", "keep_ratio": 0.0, "val_accuracy": 0.7}
    data = {"classes": 4, "test": 1000}
    rows, about = [linear, {**row, **changes}], {"score": "removal"}
    return {"rows": rows, "data": data, "doubts": [], "importance": about}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"val_accuracy": 0.7}, "70.0 % with all of them, 70.0 % with the linear"),
        ({"losses": [1.3, 1.5]}, "no better than guessing (1.39)"),
        ({"losses": [0.2, 0.9]}, "ended at 0.90, above the first epoch's 0.20"),
    ],
)
def test_what_did_not_learn_is_said(changes, says):
    (sentence,) = cautions.of(report_of(**changes))
    assert says in sentence


def test_small_test_sets_and_odd_data_are_said():
    assert cautions.of(report_of(losses=[1.4, 0.2])) == []
    report = report_of()
    report["data"]["test"] = 50
    report["doubts"] = ["3 of 9 val pictures are also in train"]
    data, size = cautions.of(report)
    assert data == "3 of 9 val pictures are also in train."
    assert "may as well be 67 or 89 %" in size


def test_the_interval_is_wilsons():
    """Newcombe, Statistics in Medicine 1998, table I: 81 of 263 and 0 of 20."""
    assert cautions.interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert cautions.interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
