# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' protocol: what is tried, what is chosen, which runs follow."""

import itertools

import pytest
from conftest import load_config
from hypothesis import given
from hypothesis import strategies as st

from vpt_jax.bench import protocol
from vpt_jax.data.public.vtab import BENCHMARKS

VTAB = [name for name, row in BENCHMARKS.items() if row.group != "fgvc"]
FGVC = [name for name, row in BENCHMARKS.items() if row.group == "fgvc"]


def load(name, arg=""):
    """The ConfigDict of a file in configs/."""
    return load_config(f"configs/{name}.py", arg)


def small(**changes):
    """Two tasks, two rates, two decays, two seeds; keys as in `benchmark__mode`."""
    values = load("vtab", "task=svhn,task=dtd").to_dict()
    values["benchmark"] |= {"rates": (1.0, 10.0), "decays": (0.0, 0.01)}
    values["seeds"] = (42, 44)
    for key, value in changes.items():
        group, _, name = key.partition("__")
        if name:
            values[group][name] = value
        else:
            values[group] = value
    return protocol.parse(values)


def results_of(bench, accuracy, kinds=("linear", "grid")):
    """Results of all trial runs, with `accuracy(task, kind, stage's config)`."""
    found = {}
    for job in protocol.jobs(bench, {}):
        if job.kind in kinds:
            stage = job.config.linear if job.kind == "linear" else job.config.tune
            value = accuracy(job.task, job.kind, stage)
            found[job.name] = {"rows": [{"val_accuracy": value}]}
    return found


# The configs.


def test_vtab_is_the_published_protocol():
    assert set(load("vtab").tasks) == set(VTAB)
    some = ["svhn", "sun397", "dmlab"]  # in VPT's order; all 19 take ten seconds
    bench = protocol.parse(load("vtab", ",".join(f"task={name}" for name in some)))
    assert list(bench.tasks) == some
    assert bench.seeds == (42, 44, 82, 100, 800)
    tried = protocol.choices(bench, "svhn")
    assert len(tried) == 40
    pairs = {(c["base_lr"], c["weight_decay"]) for c in tried}
    assert pairs == set(
        itertools.product(
            (50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05), (0.01, 0.001, 0.0001, 0)
        )
    )
    jobs = protocol.planned(bench)
    assert len(jobs) == 3 * (40 + 40 + 5)
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        config = job.config
        if job.kind == "grid":
            assert config.prompts.num_prompts == BENCHMARKS[job.task].prompts
            assert config.tune.batch_size == (
                64 if BENCHMARKS[job.task].prompts >= 100 else 128
            )
            assert (config.tune.epochs, config.tune.warmup_epochs) == (100, 10)
            assert config.tune.optimizer == "sgd"
        expected = "final" if job.kind == "final" else "select"
        assert config.task.splits == expected
        assert config.task.resize == "corner"
        assert config.diverged == "last_finite"


def test_trial_runs_never_see_the_test_set():
    for name, arg in (
        ("vtab", "task=dtd"),
        ("fgvc", "task=cub"),
        ("swin", "task=svhn"),
        ("vtab", "search,task=dtd"),
    ):
        for job in protocol.planned(protocol.parse(load(name, arg))):
            if job.kind != "final":
                assert job.config.task.splits == "select"
                assert job.config.condense.keep_ratios == job.config.baselines == ()


def test_fgvc_has_the_published_grid_and_trains_on_train():
    assert set(load("fgvc").tasks) == set(FGVC)
    bench = protocol.parse(load("fgvc", "task=cub"))
    assert len(protocol.choices(bench, "cub")) == 36  # without 0.05
    final = [job for job in protocol.planned(bench) if job.kind == "final"]
    assert {job.config.task.splits for job in final} == {"all"}


def test_swin_tries_prompts_too():
    bench = protocol.parse(load("swin", "task=svhn"))
    assert bench.settings.name == "vtab"
    counts = {c["num_prompts"] for c in protocol.choices(bench, "svhn")}
    assert counts == {1, 5, 10, 50}
    assert load("swin", "fgvc,task=cub").benchmark.name == "fgvc"
    grid = bench.trials["svhn"]["grid"]
    assert len(grid) == 160
    # The probe has no prompts: its grid is not repeated per count.
    assert len(bench.trials["svhn"]["linear"]) == 40
    with pytest.raises(ValueError, match="add the argument fgvc"):
        load("swin", "task=cub")
    with pytest.raises(ValueError, match="cifar100 is not one of FGVC; drop"):
        load("swin", "task=cifar100,fgvc")


@pytest.mark.parametrize("name", ["vtab", "fgvc", "swin"])
def test_published_has_no_grid(name):
    bench = protocol.parse(load(name, "published"))
    jobs = list(protocol.jobs(bench, {}))
    assert {job.kind for job in jobs} == {"final"}
    assert len(jobs) == 5 * len(bench.tasks)


def test_published_rates_are_those_of_vpt():
    bench = protocol.parse(load("vtab", "published"))
    found = {
        job.task: (job.config.tune.base_lr, job.config.tune.weight_decay)
        for job in protocol.jobs(bench, {})
    }
    assert found["dmlab"] == found["eurosat"] == (1.0, 1e-3)
    assert found["sun397"] == (25.0, 1e-4)
    assert found["svhn"] == (2.5, 0.0)
    how = {t: protocol.chosen(bench, t, "grid", {})["how"] for t in bench.tasks}
    published = {task for task, value in how.items() if value == "published"}
    assert published == {"dmlab", "eurosat", "sun397", "svhn"}
    given_rate = load("vtab", "published")
    given_rate.tune.base_lr = 5.0
    bench = protocol.parse(given_rate)
    assert protocol.chosen(bench, "svhn", "grid", {})["how"] == "given"
    assert protocol.choices(bench, "svhn")[0]["base_lr"] == 5.0


def test_smoke_is_small():
    bench = protocol.parse(load("fgvc", "smoke"))
    assert len(protocol.planned(bench)) == 5 * (4 + 4 + 2)


# What is chosen.


def test_the_best_on_val_is_chosen_and_used():
    bench = small()
    best = {("svhn", "grid"): (10.0, 0.01), ("svhn", "linear"): (1.0, 0.01)}

    def accuracy(task, kind, stage):
        pair = stage.base_lr, stage.weight_decay
        return 0.9 if best.get((task, kind)) == pair else 0.5

    results = results_of(bench, accuracy)
    jobs = [j for j in protocol.jobs(bench, results) if j.kind == "final"]
    assert [job.name for job in jobs if job.task == "svhn"] == [
        "svhn/final-seed42",
        "svhn/final-seed44",
    ]
    (config, *_) = (job.config for job in jobs if job.task == "svhn")
    assert (config.tune.base_lr, config.tune.weight_decay) == (10.0, 0.01)
    assert (config.linear.base_lr, config.linear.weight_decay) == (1.0, 0.01)
    assert (config.finetune.base_lr, config.finetune.weight_decay) == (1.0, 0.01)
    assert config.seeds == (42,)
    picked = protocol.chosen(bench, "svhn", "grid", results)
    assert (picked["how"], picked["val_accuracy"]) == ("sweep", 0.9)


WITH_COUNTS = small(benchmark__num_prompts=(5, 1))


@given(st.lists(st.integers(0, 3), min_size=8, max_size=8), st.randoms())
def test_the_choice_is_that_of_the_definition(rights, rng):
    bench = WITH_COUNTS
    names = [job.name for job in bench.trials["svhn"]["grid"]]
    value = dict(zip(names, rights, strict=True))
    order = list(names)
    rng.shuffle(order)  # results may come in any order
    results = {n: {"rows": [{"val_accuracy": value[n] / 200}]} for n in order}
    picked = protocol.chosen(bench, "svhn", "grid", results)

    def merit(row):
        return (
            -row["val_accuracy"],
            row["num_prompts"],
            row["base_lr"],
            row["weight_decay"],
        )

    best = min(protocol.grid(bench, "svhn", "grid", results), key=merit)
    for key in ("num_prompts", "base_lr", "weight_decay", "val_accuracy"):
        assert picked[key] == best[key]


def test_prompt_counts_bring_their_batch_size():
    bench = small(benchmark__num_prompts=(50, 100, 200))
    sizes = {c["num_prompts"]: c["batch_size"] for c in protocol.choices(bench, "dtd")}
    assert sizes == {50: 128, 100: 64, 200: 64}
    bench = small(tune__batch_size=32)
    assert {c["batch_size"] for c in protocol.choices(bench, "dtd")} == {32}


def test_the_rate_is_scaled_once():
    """The last runs have the batch size of the trials, so their rate is the same."""
    jobs = [job.config.tune for job in protocol.planned(small()) if job.task == "svhn"]
    assert {(t.base_lr, t.batch_size) for t in jobs} == {(1.0, 128), (10.0, 128)}


# Which runs there are.


def test_final_runs_wait_for_the_whole_grid_of_their_task():
    bench = small()
    results = results_of(bench, lambda *_: 0.5)
    # Task by task, as planned.
    names = [job.name for job in protocol.jobs(bench, results)]
    assert names == [job.name for job in protocol.planned(bench)]
    tasks = [name.split("/")[0] for name in names]
    assert tasks == sorted(tasks, key=["dtd", "svhn"].index)
    for missing in results:
        part = {n: r for n, r in results.items() if n != missing}
        final = {j.task for j in protocol.jobs(bench, part) if j.kind == "final"}
        assert final == {"svhn", "dtd"} - {missing.split("/")[0]}


def test_without_the_linear_probe_it_has_no_grid():
    bench = small(baselines=("random",))
    assert {job.kind for job in protocol.planned(bench)} == {"grid", "final"}


# The board.


def test_the_board_has_rows_choices_and_what_is_missing():
    bench = small()
    results = results_of(bench, lambda task, *_: 0.25 if task == "dtd" else 0.5)
    row = {"stage": "tune", "seed": 42, "test_accuracy": 0.5, "latency_ms": 3.0}
    results["svhn/final-seed42"] = {"rows": [row]}
    board = protocol.board(bench, results)
    assert list(board) == ["dtd", "svhn"]
    assert board["svhn"]["missing"] == 1
    assert board["dtd"]["missing"] == 2
    assert board["svhn"]["rows"] == [
        {"stage": "tune", "seed": 42, "test_accuracy": 0.5}  # nothing that is timed
    ]
    assert len(board["svhn"]["grid"]) == 4
    assert board["dtd"]["chosen"]["val_accuracy"] == 0.25
    assert board["svhn"]["group"] == "natural"
    empty = protocol.board(bench, {})
    assert empty["dtd"]["chosen"] is None
    assert empty["dtd"]["missing"] == 10


def test_a_run_that_diverged_counts_if_it_was_ever_finite():
    bench = small()
    results = results_of(bench, lambda *_: 0.5)
    first, second, *_ = (job.name for job in bench.trials["svhn"]["grid"])
    row = {"val_accuracy": 0.9, "epochs": 0, "planned_epochs": 100}
    results[first] = {"rows": [row]}
    results[second] = {"rows": [row | {"val_accuracy": 0.6, "epochs": 1}]}
    tried = protocol.grid(bench, "svhn", "grid", results)
    assert sorted(row["epochs"] for row in tried) == [0, 1, 100, 100]
    picked = protocol.chosen(bench, "svhn", "grid", results)
    assert picked["val_accuracy"] == 0.6


# What cannot work is one error, at once.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark__mode": "best"}, "mode 'best'"),
        (
            {"benchmark__rates": ()},
            r"rates is \(\); expected at least one in mode 'sweep'",
        ),
        ({"benchmark__rates": (1.0, 1.0)}, "expected each value once"),
        ({"benchmark__rates": (1.0, -1.0)}, "expected each above 0"),
        ({"benchmark__final_splits": "select"}, "final_splits"),
        ({"benchmark__speed": 1}, "unknown config key config.benchmark.speed"),
        ({"tasks": {}}, "config.tasks is {}; expected a group of keys, with at le"),
        ({"tasks__svhn": {"num_prompts": 5}}, "config.tasks.svhn.base_lr is missing"),
        ({"tune__base_lr": 1.0}, "which chooses of benchmark.rates"),
        ({"tune__weight_decay": 0.0}, "which chooses of benchmark.decays"),
        ({"tune__epochs": 0}, "epochs is 0"),
        ({"prompts__num_prompts": 0}, "num_prompts is 0; expected at least one"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "no repeats"),
        ({"score__score": "none"}, "unknown score"),
        (
            {"benchmark__mode": "published", "benchmark__num_prompts": (1, 2)},
            "none in mode .published",
        ),
    ],
)
def test_what_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)
