# SPDX-License-Identifier: Apache-2.0
"""The command line, end to end, on a backbone small enough for seconds."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, SMALL, command, load_config, randomised, save_small_backbone

import vpt_jax
from vpt_jax import train
from vpt_jax.bench import protocol
from vpt_jax.data.tasks import load_task
from vpt_jax.files import cli, workdirs
from vpt_jax.run import config as configs
from vpt_jax.run import experiment, parsing

pytestmark = pytest.mark.usefixtures("standard_promotion", "few_pictures")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_small_backbone(tmp_path_factory.mktemp("weights") / "w.safetensors")


def smoke(checkpoint, **changes):
    """The demo's smoke config on the small backbone."""
    values = load_config("configs/demo.py", "digits,smoke").to_dict()
    values["backbone"].update(variant=SMALL, checkpoint=str(checkpoint))
    values["tune"]["epochs"] = 3
    values["finetune"].update(head=False, head_lr=0.0)
    for name, value in changes.items():
        group, _, key = name.rpartition("__")
        (values[group] if group else values)[key] = value
    return parsing.parse(values)


def open_run(values):
    """A run's config with the epochs of 800 pictures and a rate, as if it was found."""
    values = values.to_dict()
    stages = values["tune"], values["finetune"]
    for stage, epochs in zip(stages, (12, 6), strict=True):
        filled = {"epochs": epochs, "warmup_epochs": epochs / 10, "base_lr": 0.03}
        stage |= {k: v for k, v in filled.items() if stage[k] is None}
    values.pop("search", None)
    return parsing.parse(values)


def config_of(path, arg):
    """The config of a run, or of a benchmark's last one, that a file means."""
    values = load_config(path, arg)
    if "benchmark" in values:
        return protocol.planned(protocol.parse(values))[-1].config
    return open_run(values)


def end_state(workdir):
    """What must be the same after any interruption: prompts, scores, rows."""
    state = {p.name: p.read_bytes() for p in sorted((workdir / "prompts").iterdir())}
    state |= {p.name: p.read_bytes() for p in sorted((workdir / "scores").iterdir())}
    rows = json.loads((workdir / "report.json").read_text())["rows"]
    for row in rows:
        del row["latency_ms"], row["latency_spread"]
    return state, rows


@pytest.fixture(scope="module")
def finished(checkpoint, standard_promotion, few_pictures, tmp_path_factory):
    """A whole undisturbed run: `(config, workdir, report)`."""
    config = smoke(checkpoint)
    workdir = tmp_path_factory.mktemp("run")
    return config, workdir, experiment.run(config, workdir, "a command")


def test_the_report_has_a_row_for_every_model(finished):
    config, workdir, report = finished
    assert json.loads((workdir / "report.json").read_text()) == report
    assert [
        (r["stage"], r["score"], r["scope"], r["keep_ratio"]) for r in report["rows"]
    ] == [
        ("linear", None, None, 0.0),
        ("tune", None, None, 1.0),
        ("condense", "removal", "global", 0.3),
        ("finetune", "removal", "global", 0.3),
        ("finetune", "removal", "layer", 0.3),
        ("finetune", "random", "global", 0.3),
        ("scratch", None, None, 0.3),
    ]
    counts = [sum(r["counts"]) for r in report["rows"]]
    assert counts == [0, 12, 4, 4, 3, 4, 3]  # 30 % of 3 x 4, rounded
    model = vpt_jax.ViT(SMALL)
    for row in report["rows"]:
        assert row["macs"] == vpt_jax.macs(model, row["counts"])
        assert row["macs_reference"] == vpt_jax.macs(
            model, row["counts"], formulation="tokens"
        )
        assert row["tuned_params"] == 32 * sum(row["counts"]) + 33 * 10
        assert 0 <= row["test_accuracy"] <= 1 and row["latency_ms"] > 0
    assert report["task"] == "digits" and report["command"] == "a command"
    assert report["backbone"]["variant"] == SMALL
    assert [len(s) for s in report["importance"]["layers"]] == [4] * 3


def test_the_workdir_holds_what_the_readme_says(finished):
    _, workdir, report = finished
    html = (workdir / "report.html").read_text()
    assert "<svg" in html and html.count("src=") == html.count('src="data:')
    events = b"".join(p.read_bytes() for p in (workdir / "events").iterdir())
    for name in (b"confusion", b"right_answers", b"seed0-tune/val_accuracy"):
        assert name in events
    assert "epoch 3/3" in (workdir / "log.txt").read_text()
    left = sorted(p.name for p in (workdir / "checkpoints" / "seed0-tune").iterdir())
    assert left == ["10", "15", "training.json"]


def test_released_prompts_reproduce_their_row(finished, checkpoint):
    config, workdir, report = finished
    model, backbone = vpt_jax.load_backbone(SMALL, checkpoint)
    task = load_task("digits")
    for row, unit in zip(report["rows"], experiment.plan(config), strict=True):
        got = vpt_jax.load_prompts(
            workdir / "prompts" / f"{unit.name}.safetensors", backbone=backbone
        )
        assert got.header["class_names"] == list(task.class_names)
        accuracy = train.evaluate(
            {"prompts": got.prompts, "head": got.head},
            backbone,
            task.test.images,
            task.test.labels,
            model=model,
            recipe=train.Recipe(normalisation=got.header["normalisation"]),
            batch_size=100,
        )
        assert accuracy == row["test_accuracy"]


def test_stages_build_on_each_other(finished):
    _, workdir, _ = finished

    def load(name):
        return vpt_jax.load_prompts(workdir / "prompts" / f"seed0-{name}.safetensors")

    tuned = load("tune")
    scores = json.loads((workdir / "scores" / "seed0-removal.json").read_text())
    mask = vpt_jax.keep_mask(
        tuple(map(jnp.asarray, scores["layers"])), keep_ratio=0.3, scope="global"
    )
    condensed = load("condense-removal-global-30percent")
    expected = vpt_jax.condense(tuned.prompts, mask)
    jax.tree.map(np.testing.assert_array_equal, condensed.prompts, expected)
    finetuned = load("finetune-removal-global-30percent")
    assert vpt_jax.counts(finetuned.prompts) == vpt_jax.counts(expected)
    for part in ("kernel", "bias"):  # the head is frozen, bit for bit
        np.testing.assert_array_equal(finetuned.head[part], tuned.head[part])
    moved = [
        not np.array_equal(a, b)
        for a, b in zip(finetuned.prompts, expected, strict=True)
        if a.size
    ]
    assert all(moved)


def test_running_again_does_nothing_and_says_the_same(finished):
    config, workdir, report = finished
    before = {
        p: (p.stat().st_mtime_ns, p.read_bytes())
        for folder in ("prompts", "results", "scores")
        for p in (workdir / folder).iterdir()
    }
    again = experiment.run(config, workdir, "a command")
    assert again["rows"] == report["rows"] and again["seconds"] == report["seconds"]
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in before} == before


class Killed(BaseException):
    """Nothing in the package may catch it."""


@pytest.mark.parametrize("at", [1, 7])
def test_an_interrupted_run_ends_the_same_bit_for_bit(
    finished, tmp_path, monkeypatch, at
):
    """Stopped in the first epoch and in the last unit."""
    config, workdir, _ = finished
    log_epoch, seen = workdirs.Log.epoch, []

    def epoch(self, *args):
        log_epoch(self, *args)
        seen.append(args)
        if len(seen) == at:
            raise Killed

    monkeypatch.setattr(workdirs.Log, "epoch", epoch)
    with pytest.raises(Killed):
        experiment.run(config, tmp_path)
    assert not (tmp_path / "report.json").exists()
    experiment.run(config, tmp_path)
    assert end_state(tmp_path) == end_state(workdir)


def test_a_workdir_of_another_config_is_refused_and_untouched(finished, checkpoint):
    _, workdir, _ = finished
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    other = smoke(checkpoint, tune__base_lr=0.5, seeds=(0, 1))
    with pytest.raises(ValueError, match=r"seeds: \[0\] -> \[0, 1\]; tune.base_lr"):
        experiment.run(other, workdir)
    assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before


def test_two_seeds_differ_and_a_seed_does_not_depend_on_the_others(
    finished, checkpoint, tmp_path
):
    _, workdir, _ = finished
    experiment.run(smoke(checkpoint, seeds=(1, 0), baselines=()), tmp_path)
    name = "finetune-removal-global-30percent.safetensors"
    alone = (workdir / "prompts" / f"seed0-{name}").read_bytes()
    assert (tmp_path / "prompts" / f"seed0-{name}").read_bytes() == alone
    assert (tmp_path / "prompts" / f"seed1-{name}").read_bytes() != alone
    assert not list((tmp_path / "prompts").glob("*linear*"))


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts__deep": False, "prompts__dropout": 0.0, "prompts__num_prompts": 12},
        {"backbone__dtype": "bfloat16", "score__score": "leave_one_out"},
        {"prompts__num_prompts": (0, 3, 1), "score__score": "random"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_configs_run_too(checkpoint, tmp_path, changes):
    changes = {"baselines": ("scratch",), "condense__scopes": ("global",), **changes}
    changes = {"finetune__head": True, **changes}
    report = experiment.run(smoke(checkpoint, tune__base_lr=0.01, **changes), tmp_path)
    totals = [sum(r["counts"]) for r in report["rows"]]
    ratio = round(0.3 * totals[0] + 1e-9)
    assert totals[1:3] == [ratio, ratio]


# --- the command line -----------------------------------------------------------------


DEMO, VTAB = "--config=configs/demo.py:smoke", "--config=configs/vtab.py"


MISTAKES = [
    ([DEMO, "--config.backbone.variant=Q16"], ["unknown variant 'Q16'"]),
    ([DEMO, "--config.backbone.variant=B/16"], ["no checkpoint given for 'B/16'"]),
    ([DEMO, "--config.backbone.checkpoint=no.npz"], ["no such file: no.npz"]),
    ([DEMO, "--config.score.score=magic"], ["unknown score.score 'magic'"]),
    ([DEMO, "--workdir=gs://bucket/run"], ["--workdir is 'gs://bucket/run'"]),
    ([DEMO, "--workdir=/dev/null/out"], ["/dev/null/out: Not a directory; expected"]),
    ([DEMO, "--config.tune.epoch=3"], ["tune.epoch; did you mean 'epochs'?"]),
    ([DEMO, "--config.tun.epochs=3"], ["config.tun; did you mean 'tune'? known"]),
    ([VTAB + ":task=shvn"], ["argument 'task=shvn'; did you mean 'task=svhn'?"]),
    ([VTAB + ":svhn"], ["argument 'svhn'; did you mean 'task=svhn'?"]),
    (["--config=configs/demo.py:mnist"], ["unknown argument 'mnist'"]),
    (["--config=configs/dmo.py"], ["did you mean 'configs/demo.py'? there are"]),
    ([f"--config={ROOT}/README.md"], ["cannot read --config"]),
    ([DEMO, "--unknown"], ["Unknown command line flag 'unknown'"]),
    # Keys that cannot be sorted: found by fuzzing 2,000 command lines.
    ([DEMO, "--config.linear={-35: 1, 'x': 2}"], ["keys are of several types"]),
    ([VTAB, "--config.linear={-35: 1, 'x': 2}"], ["keys are of several types"]),
    ([], ["no --config; pass --config=FILE: configs/demo.py, configs/fgvc.py"]),
    ([DEMO, "--config.seeds=3"], ["write (3,) for the one value, or all of them"]),
    ([DEMO, "--coordinator=127.0.0.1:1"], ["--process_id belong together; pass"]),
    (
        [VTAB + ":task=svhn", "--config.task.data_dir=no where"],
        [
            "svhn: got no prepared copy of 'svhn_cropped' in no where",
            "Prepare it once, in any environment; only this needs TensorFlow:",
            "  pip install tensorflow h5py opencv-python-headless",
            "  python -m vpt_jax.data prepare svhn --data_dir='no where'",
        ],
    ),
]
# One process that imports, and a fork of it for each command line.
COMMANDS = """
import json, os, sys, tempfile
from vpt_jax import main
from vpt_jax.bench import benchmark, launch, search

found = []
for args in json.loads(sys.argv[1]):
    files = [tempfile.TemporaryFile("w+") for _ in range(2)]
    if not (child := os.fork()):
        for number, file in enumerate(files, start=1):
            os.dup2(file.fileno(), number)
        sys.argv[1:] = args
        main.start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for file in files:
        file.seek(0)
    found.append([code, *(file.read() for file in files)])
print(json.dumps(found))
"""


def test_a_mistake_on_the_command_line_says_what_was_meant(tmp_path):
    given = json.dumps([args for args, _ in MISTAKES])
    done = command(given, python=("-c", COMMANDS), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)
    for (args, lines), (code, out, err) in zip(MISTAKES, ends, strict=True):
        found = err.splitlines()
        assert (code, out, len(found)) == (2, "", len(lines)), (args, out, err)
        assert found[0].startswith("error: ") and lines[0] in found[0], args
        assert found[1:] == lines[1:]
    assert not list(tmp_path.iterdir())  # no folder `gs:`, no out


def test_what_is_set_counts_and_list_shows_it(tmp_path):
    """A key that the file leaves out; the last of two tuples; a shipped config."""
    done = command(
        DEMO,
        "--config.diverged=last_finite",
        "--config.condense.keep_ratios=(0.5,)",
        "--config.condense.keep_ratios=(0.25,)",
        "--list",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "left  seed0-condense-removal-global-25percent" in done.stdout.splitlines()
    assert "50percent" not in done.stdout
    assert done.stdout.endswith("0 of 7 done in out/demo-smoke\n")
    assert not list(tmp_path.iterdir())


# --- configs --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "arg"),
    [
        ("configs/demo.py", ""),
        ("configs/demo.py", "shapes_location,seeds=5"),
        ("configs/demo.py", "smoke"),
        ("configs/folder.py", "some/where"),
        ("configs/vtab.py", "task=svhn"),
        ("configs/vtab.py", "task=clevr_count,smoke"),
        ("configs/fgvc.py", "task=cars,published"),
        ("configs/swin.py", "task=dmlab"),
    ],
)
def test_every_config_fits_its_model(path, arg):
    config = config_of(path, arg)
    kind = vpt_jax.Swin if config.backbone.variant.startswith("Swin") else vpt_jax.ViT
    model, deep = kind(config.backbone.variant), config.prompts.deep
    num, key = config.prompts.num_prompts, jax.random.key(0)
    prompts = jax.eval_shape(lambda: vpt_jax.init_prompts(key, model, num, deep=deep))
    assert len(prompts) == len(model.widths) and vpt_jax.counts(prompts)[0] == num
    units = experiment.plan(config)
    assert len({unit.name for unit in units}) == len(units)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unknown": 1}, r"unknown config key config.unknown; known keys there: task,"),
        ({"tune": {"epoch": 1}}, "unknown config key config.tune.epoch"),
        ({"tune": {"epochs": 1.5}}, "config.tune.epochs is 1.5; expected int"),
        (
            {"tune": {"epochs": 2, "warmup_epochs": 2}},
            "warmup_epochs is 2.0; expected 0 to below epochs, 2",
        ),
        ({"tune": {"base_lr": 0}}, "base_lr is 0.0; expected a finite number gre"),
        ({"tune": {"optimizer": "lion"}}, "unknown optimizer 'lion'"),
        ({"tune": 3}, "config.tune is 3; expected a group"),
        ({"seeds": (0, 0)}, "no repeats"),
        ({"seeds": 0}, "config.seeds is 0; expected tuple"),
        ({"baselines": ("none",)}, "unknown baselines 'none'"),
        (
            {"condense": {"keep_ratios": (0.3, 1.0)}},
            "keep_ratios is 1.0; expected each above 0",
        ),
        ({"condense": {"scopes": ("local",)}}, "unknown condense.scopes 'local'"),
        ({"condense": {"keep_ratios": (0.3, 0.3000000001)}}, "keep_ratios has 0.3 twi"),
        ({"baselines": ("linear", "linear")}, "baselines has linear twice"),
        ({"prompts": {"dropout": 1.0}}, "dropout is 1.0"),
        ({"score": {"reduction": "sum"}}, "unknown score.reduction 'sum'"),
        ({"backbone": {"dtype": "float16"}}, "unknown backbone.dtype 'float16'"),
        ({"backbone": {"normalisation": "0.5"}}, "unknown backbone.normalisation"),
        ({"tune": {"base_lr": 10**400}}, "base_lr is inf; expected a finite number"),
        (
            {"tune": {"weight_decay": math.nan}},
            "weight_decay is nan; expected 0 or more",
        ),
        ({"prompts": {"num_prompts": (4, -1)}}, "of each layer 0 to 10,000"),
        ({"prompts": {"num_prompts": 10**5000}}, "a number of thousands of digits"),
        ({"seeds": (0, -1)}, r"seeds is \(0, -1\); expected each from 0"),
        ({"seeds": (2**32,)}, "expected each from 0 to 4294967295"),
        ({"backbone": {"image_size": -1}}, "image_size is -1; expected 0 "),
        ({"backbone": {"image_size": 10**6}}, "expected 0 .* to 4,096"),
        ({3: 4}, r"unknown config key config\.3; known keys there"),
        ({"tune": {"base_lr": None}}, "config.tune.base_lr is missing"),
    ],
)
def test_wrong_configs(changes, message):
    values = load_config("configs/demo.py", "smoke").to_dict()
    for name, change in changes.items():
        merge = isinstance(change, dict) and isinstance(values.get(name), dict)
        values[name] = {**values[name], **change} if merge else change
    with pytest.raises(ValueError, match=message):
        parsing.parse(values)


# What the files of configs/ come to; a search fills in the first rates.
RECIPE = {
    "tune": ("adamw", "step", 12, 1.2, 0.03, 0.0, 32, True),
    "linear": ("lbfgs", "epoch", 1, 0, 1.0, 0.01, 32, True),
    "finetune": ("adamw", "step", 6, 0, 0.03, 0.0, 32, True),
}
STAGES = {
    "demo": {
        "tune": ("adamw", "step", 12, 1.2, 0.01, 0.0, 32, True),
        "linear": RECIPE["linear"],
        "finetune": ("adamw", "step", 6, 0, 0.01, 0.0, 32, True),
    },
    "folder": RECIPE,
    "vtab": {
        "tune": ("sgd", "epoch", 100, 10, 0.05, 0.0, 128, True),
        "linear": ("sgd", "epoch", 100, 10, 0.05, 0.0, 128, True),
        "finetune": ("sgd", "epoch", 20, 0, 0.005, 0.0, 128, False),
    },
}
STAGES["swin"] = STAGES["vtab"]
STAGES["fgvc"] = {
    "tune": ("sgd", "epoch", 100, 10, 0.1, 0.0, 64, True),
    "linear": ("sgd", "epoch", 100, 10, 0.1, 0.0, 64, True),
    "finetune": ("sgd", "epoch", 20, 0, 0.01, 0.0, 64, False),
}
REST = {  # prompts, variant, side, resize, keep ratios, scopes, eval batch, diverged
    "demo": (10, "demo/4", 0, "", (0.3, 0.1), ("global",), 100, "error"),
    "folder": (10, "demo/4", 0, "", (0.3, 0.1), ("global",), 64, "error"),
}
VPT = (224, "corner", (0.5, 0.3, 0.2, 0.1), ("global",), 64, "last_finite")
REST |= {
    "vtab": (50, "B/16", *VPT),
    "swin": (1, "Swin-B", *VPT),
    "fgvc": (200, "B/16", VPT[0], "", *VPT[2:]),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_file_of_differences_is_the_config_that_it_means(name):
    arg = {"vtab": "task=svhn", "swin": "task=svhn", "fgvc": "task=cars"}.get(name, "")
    config = config_of(f"configs/{name}.py", arg)
    order = ("optimizer", "schedule", "epochs", "warmup_epochs")
    order += ("base_lr", "weight_decay", "batch_size", "head")
    for stage, expected in STAGES[name].items():
        found = tuple(getattr(getattr(config, stage), key) for key in order)
        assert found == pytest.approx(expected), stage
    assert REST[name] == (
        config.prompts.num_prompts,
        config.backbone.variant,
        config.backbone.image_size,
        config.task.resize,
        config.condense.keep_ratios,
        config.condense.scopes,
        config.eval_batch_size,
        config.diverged,
    )


def keys_of(kind, prefix=""):
    """Every key of the schema, dotted, with its type."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from keys_of(field.type, f"{field.name}.")
        else:
            yield prefix + field.name, field.type


OWN = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({"tune": {"base_lr": 1}, "seeds": (0,)})
"""
SHOW = """
import json
from vpt_jax import main
from vpt_jax.files import cli
from vpt_jax.run import parsing

def show(values, workdir, command):
    print(json.dumps(parsing.plain(values.to_dict())))

cli.start(show, main.complete)
"""


def test_every_key_of_the_schema_can_be_set(tmp_path):
    """Of a file that leaves out nearly all of them."""
    sample = {int: 7, float: 0.5, str: "word", bool: False}
    given = {
        name: sample.get(kind, (7, 8)) for name, kind in keys_of(configs.Config)
    } | {"prompts.num_prompts": (7, 8)}
    (tmp_path / "own.py").write_text(OWN)
    settings = [f"--config.{k}={v}" for k, v in given.items()]
    done = command(f"--config={tmp_path}/own.py", *settings, python=("-c", SHOW))
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    for name, value in given.items():
        for part in (place := name.split("."))[:-1]:
            assert part in values
        group = values[place[0]] if len(place) == 2 else values
        assert group[place[-1]] == parsing.plain(value), name


def test_places_in_commands():
    for given, expected in {
        "configs/demo.py": "out/demo",
        "configs/demo.py:digits,seeds=5": "out/demo-digits-seeds5",
        "configs/folder.py:../my/pets/": "out/folder-pets",
        "configs/folder.py:/x/mnist.npz": "out/folder-mnist.npz",
    }.items():
        assert cli.default_workdir(given) == expected
    kept = (
        "python -m vpt_jax.main --config=configs/vtab.py:smoke --config.tune.epochs=3"
    )
    place = " --workdir=/a/b --launcher=ray -address ray://host:1"
    assert cli.without_place(kept + place) == kept


def test_a_swin_goes_through_all_stages(checkpoint, tmp_path, monkeypatch):
    """Prompts of different widths, and a read-out over the last layer's outputs."""
    swin = vpt_jax.Swin(
        embed_dim=16,
        depths=(1, 1),
        num_heads=(2, 2),
        window=4,
        image_size=32,
        readout="mean_with_prompts",
    )
    params = jax.jit(swin.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    loaded = (swin, randomised(params, scale=0.05))
    monkeypatch.setattr(vpt_jax, "load_backbone", lambda *_, **__: loaded)
    config = smoke(checkpoint, baselines=(), condense__scopes=("global",))
    report = experiment.run(config, tmp_path)
    rows = {r["stage"]: r for r in report["rows"]}
    assert list(rows) == ["tune", "condense", "finetune"]
    assert rows["tune"]["counts"] == [4, 4]
    assert sum(rows["finetune"]["counts"]) == 2  # 30 % of 8
    assert rows["tune"]["tuned_params"] == 4 * 16 + 4 * 32 + 32 * 10 + 10
    assert rows["tune"]["macs"] < rows["tune"]["macs_reference"]
    assert report["backbone"]["readout"] == "mean_with_prompts"


def test_an_unknown_normalisation_is_asked_for(checkpoint, tmp_path):
    weights = vpt_jax.load_backbone(SMALL, checkpoint)[1]
    np.savez(tmp_path / "mine.npz", **vpt_jax.weights.release.flatten(weights))
    config = smoke(checkpoint, backbone__checkpoint=str(tmp_path / "mine.npz"))
    with pytest.raises(ValueError, match="--config.backbone.normalisation=half"):
        experiment.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
