# SPDX-License-Identifier: Apache-2.0
"""A released file answers as the run that wrote it did, with its backbone alone."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import hub_server
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_config, randomised
from PIL import Image
from safetensors.numpy import load_file, save_file

import vpt_jax
from vpt_jax import predict, train
from vpt_jax.data.pictures import read_picture
from vpt_jax.data.tasks import load_task
from vpt_jax.run import experiment, parsing
from vpt_jax.serve import share
from vpt_jax.weights import release
from vpt_jax.weights.checkpoint import save_backbone

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Pictures of odd proportions, so that how they are resized matters."""
    folder, rng = tmp_path_factory.mktemp("pictures") / "zoo", np.random.default_rng(0)
    for kind, tone in (("ant", 60), ("bee", 120), ("cow", 180)):
        (folder / kind).mkdir(parents=True)
        for k in range(10):
            x = rng.normal(tone, 30, (9, 5 + k, 3)).clip(0, 255).astype(np.uint8)
            picture = Image.fromarray(x).resize((40 + 20 * k, 90))
            picture.save(folder / kind / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def finished(zoo, standard_promotion, tmp_path_factory):
    """A run with every choice another one than the default: `(config, workdir)`."""
    folder = tmp_path_factory.mktemp("run")
    weights = folder / "my_weights.safetensors"
    sizes = {"width": 24, "depth": 3, "num_heads": 2, "mlp_dim": 48, "patch": 16}
    model = vpt_jax.ViT(**sizes, image_size=32)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    save_backbone(weights, randomised(params["params"], scale=0.05), {})
    values = load_config("configs/folder.py", str(zoo)).to_dict()
    values.pop("search", None)
    values["task"]["resize"] = "squash"
    values["backbone"].update(
        variant="",  # a stranger's: what it is, its shapes say
        checkpoint=str(weights),
        num_heads=2,
        image_size=48,
        readout="mean",
        norm="after",
        resize="half_pixel",
        normalisation="imagenet",
    )
    values["prompts"].update(num_prompts=(0, 1, 3))
    values["condense"].update(keep_ratios=(0.5,), scopes=("global",))
    values["baselines"] = ()
    for stage in ("linear", "tune", "finetune"):
        values[stage].update(
            optimizer="sgd", schedule="epoch", head_lr=0.0, weight_decay=0.01
        )
        values[stage].update(epochs=2, warmup_epochs=0, base_lr=2.0, batch_size=9)
    config = parsing.parse(values)
    experiment.run(config, folder / "out")
    return config, folder / "out"


def answers_of_the_run(config, workdir, split):
    """Probabilities by what the run has in memory: its model and decoded pictures."""
    loaded = experiment.load_model(config.backbone)
    task = load_task(
        "folder",
        image_size=loaded.model.image_size,
        data_dir=config.task.data_dir,
        resize=config.task.resize,
    )
    saved = vpt_jax.load_prompts(best_file(workdir))
    logits = train.predict(
        {"prompts": saved.prompts, "head": saved.head},
        loaded.backbone,
        jnp.asarray(getattr(task, split).images),
        model=loaded.model,
        recipe=train.Recipe(normalisation=loaded.info["normalisation"]),
    )
    return np.asarray(jax.nn.softmax(logits)), getattr(task, split).labels


def best_file(workdir):
    return workdir / json.loads((workdir / "best.json").read_text())["prompts"]


def test_the_file_alone_answers_as_the_run_in_a_fresh_process(zoo, finished, tmp_path):
    config, workdir = finished
    expected, labels = answers_of_the_run(config, workdir, "test")
    # Away from the run: the file and, under the name that it says, the backbone.
    shutil.copy(best_file(workdir), tmp_path / "mine.safetensors")
    shutil.copy(config.backbone.checkpoint, tmp_path)
    code = (
        "import json, pathlib, vpt_jax\n"
        "c = vpt_jax.load_classifier('mine.safetensors')\n"
        f"paths = sorted(pathlib.Path({str(zoo)!r}).rglob('*.png'))\n"
        "found = c.predict(paths)\n"
        "keys = [f'{p.parent.name}/{p.name}' for p in paths]\n"
        "print(json.dumps([repr(c), keys, found.labels, found.probabilities.tolist()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    shown, keys, names, probabilities = json.loads(done.stdout)
    prompts = json.loads((workdir / "best.json").read_text())["num_prompts"]
    assert shown == f"Classifier(24 x 3, 3 classes, {prompts} prompts, 48 px, squash)"
    found = dict(zip(keys, probabilities, strict=True))
    # The run's test pictures, found again by what they look like.
    task = load_task("folder", image_size=48, data_dir=str(zoo), resize="squash")
    squares = {read_picture(zoo / k, 48, "squash").tobytes(): k for k in keys}
    test = [squares[x.tobytes()] for x in task.test.images]
    got = np.array([found[k] for k in test])
    np.testing.assert_allclose(got, expected, atol=1e-6)
    answers = dict(zip(keys, names, strict=True))
    right = sum(
        answers[k] == task.class_names[y] for k, y in zip(test, labels, strict=True)
    )
    name = best_file(workdir).stem
    row = json.loads((workdir / "results" / f"{name}.json").read_text())["row"]
    assert right / len(test) == row["test_accuracy"]


def test_what_a_released_file_says(finished):
    config, workdir = finished
    header = vpt_jax.load_prompts(best_file(workdir)).header
    assert header["resize"] == "squash" and header["image_size"] == 48
    assert header["source"] == "my_weights.safetensors"  # not where it lay
    assert str(workdir.parent) not in json.dumps(header)
    assert header["normalisation"] == "imagenet" and header["model"]["num_heads"] == 2
    assert header["load"] == {
        "readout": "mean",
        "norm": "after",
        "resize": "half_pixel",
        "num_heads": 2,
        "activation": "gelu",
        "epsilon": 1e-6,
        "skip": [],
        "dtype": "float32",
    }


def rewritten(path, target, change):
    """A copy of a released file with another header."""
    header = vpt_jax.load_prompts(path).header
    change(header)
    save_file(load_file(path), target, {"vpt_jax": json.dumps(header)})
    return target


def test_a_file_of_an_earlier_version_asks_for_what_it_does_not_say(finished, tmp_path):
    _, workdir = finished

    def older(header):
        for name in ("model", "load", "source", "resize"):
            del header[name]
        header["readout"] = "cls"

    # Released by a run with the defaults of that time.
    old = rewritten(best_file(workdir), tmp_path / "old.safetensors", older)
    assert vpt_jax.load_prompts(old).header["class_names"] == ["ant", "bee", "cow"]
    with pytest.raises(ValueError, match="pass resize='crop'"):
        vpt_jax.load_classifier(old)
    with pytest.raises(ValueError, match="needs the backbone 'my_weights.safetensors'"):
        vpt_jax.load_classifier(old, resize="crop")
    model, backbone = vpt_jax.load_backbone("demo/4")
    vpt_jax.save_prompts(
        tmp_path / "demo.safetensors",
        vpt_jax.init_prompts(jax.random.key(0), model, 1),
        vpt_jax.init_head(jax.random.key(1), model.width, 3),
        model=model,
        backbone=vpt_jax.backbone_hash(backbone),
        backbone_name="demo",
        normalisation="half",
        class_names=["ant", "bee", "cow"],
    )
    old = rewritten(tmp_path / "demo.safetensors", tmp_path / "d.safetensors", older)
    assert "squash" in repr(vpt_jax.load_classifier(old, resize="squash"))
    other = tmp_path / "other.safetensors"
    save_backbone(other, randomised(backbone), {})
    with pytest.raises(ValueError, match="belongs to another backbone"):
        vpt_jax.load_classifier(old, resize="crop", backbone=other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"load": {"path": "x"}}, "has load"),
        ({"load": {"skip": [1]}}, "has load"),
        ({"load": 3}, "has load"),
        ({"model": {"depth": "6"}}, "says of its model 'depth' = '6'"),
        ({"model": {"magic": 6}}, "says of its model 'magic'"),
        ({"image_size": 10**9}, "has image_size 1000000000"),
        ({"deep": "yes"}, "has deep"),
        ({"resize": "stretch"}, "unknown resize 'stretch'"),
        ({"source": ["x"]}, "has source"),
    ],
)
def test_a_header_that_lies_is_refused(finished, tmp_path, change, message):
    config, workdir = finished
    path = tmp_path / "x.safetensors"
    rewritten(best_file(workdir), path, lambda header: header.update(change))
    with pytest.raises(ValueError, match=message):
        vpt_jax.load_classifier(path, backbone=config.backbone.checkpoint)


@pytest.fixture(scope="module")
def classifier(finished):
    return vpt_jax.load_classifier(finished[1])


def test_paths_pillows_and_arrays_are_answered_alike(classifier, zoo):
    paths = sorted((zoo / "bee").iterdir())
    by_path = classifier.predict(paths)
    assert by_path.probabilities.shape == (10, 3)
    np.testing.assert_allclose(by_path.probabilities.sum(-1), 1, atol=1e-5)
    best = by_path.probabilities.argmax(-1)
    assert by_path.labels == [classifier.class_names[k] for k in best]
    opened = [Image.open(p) for p in paths]
    arrays = [np.asarray(Image.open(p)) for p in paths]
    for others in (opened, arrays, map(str, paths)):
        found = classifier.predict(others, batch_size=4)
        np.testing.assert_allclose(found[1], by_path[1], atol=1e-6)
    assert opened[0].size == (40, 90)  # what was given stays as it is
    for one in (paths[3], opened[3], arrays[3]):
        found = classifier.predict(one)
        np.testing.assert_allclose(found[1], by_path[1][3:4], atol=1e-6)
    batch = np.stack([arrays[3], arrays[3][::-1]])
    np.testing.assert_allclose(
        classifier.predict(batch)[1][0], by_path[1][3], atol=1e-6
    )
    assert classifier.predict([]).probabilities.shape == (0, 3)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), r"float32 \[8, 8, 3\]; expected a path"),
        (np.zeros((8, 8, 4), np.uint8), r"uint8 \[8, 8, 4\]; expected a path"),
        (np.zeros((0, 8), np.uint8), r"uint8 \[0, 8\]; expected a path"),
        ([None], "NoneType"),
        (7, "type int"),
        ("absent.png", "absent.png: cannot be read"),
        (ROOT / "README.md", "README.md: got no picture"),
    ],
)
def test_what_is_no_picture_is_refused(classifier, picture, message):
    with pytest.raises(ValueError, match=message):
        classifier.predict(picture)


def test_a_stream_goes_on_past_what_is_broken_and_reads_no_further(classifier, zoo):
    paths = [str(p) for p in sorted((zoo / "cow").iterdir())]
    taken = []

    def endless():
        k = 0
        while True:
            taken.append("absent" if k % 5 == 2 else paths[k % 10])
            yield taken[-1]
            k += 1

    expected = classifier.predict(paths)[1]
    for k, (path, found) in enumerate(classifier.stream(endless(), batch_size=3)):
        assert path == taken[k]
        if k % 5 == 2:
            assert isinstance(found, ValueError)
        else:
            np.testing.assert_allclose(found, expected[k % 10], atol=1e-6)
        assert len(taken) - k <= 6  # two batches: one computes, one is decoded
        if k == 40:
            break


def test_the_best_model_is_chosen_on_val_and_ties_are_plain(finished):
    def row(val, counts, stage="tune", test=0.0):
        accuracies = {"val_accuracy": val, "test_accuracy": test}
        return {**accuracies, "counts": counts, "stage": stage}

    rows = [row(0.8, [9], test=1.0), row(0.9, [5]), row(0.9, [3]), row(0.9, [3])]
    assert experiment.best(rows) == (
        2,
        "the highest accuracy on val of 4 models, 90.00 %; of 3 equal ones that with"
        " the fewest prompts",
    )
    number, why = experiment.best([row(None, [0], "linear"), row(None, [4])])
    assert number == 1 and "no validation set" in why
    note = json.loads((finished[1] / "best.json").read_text())
    assert (finished[1] / note["prompts"]).is_file()
    assert note["why"] in (finished[1] / "log.txt").read_text()


def test_a_folder_without_a_best_model_says_what_is_missing(finished, tmp_path):
    with pytest.raises(ValueError, match="no best.json"):
        vpt_jax.load_classifier(tmp_path)
    with pytest.raises(ValueError, match="no such file or folder"):
        vpt_jax.load_classifier(tmp_path / "absent")
    (tmp_path / "best.json").write_text('{"prompts": "../x", "backbone": ""}')
    with pytest.raises(ValueError, match=r"has prompts '\.\./x'"):
        vpt_jax.load_classifier(tmp_path)


def test_where_a_backbone_came_from():
    assert release.source_of("hf://a/b/c.npz") == "hf://a/b/c.npz"
    assert release.source_of("/home/me/c.npz") == "c.npz"
    cache = "/x/hub/models--timm--vit.a/snapshots/1f/model.safetensors"
    assert release.source_of(cache) == "hf://timm/vit.a@1f/model.safetensors"


# --- share and serve ------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_server.serve(monkeypatch, tmp_path / "hub") as hub:
        yield hub


def test_a_shared_folder_is_read_back_from_the_hub(finished, zoo, tmp_path, hub):
    config, workdir = finished
    folder = share.share(workdir, tmp_path / "shared", licence="apache-2.0")
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "prompts.safetensors",
    ]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: vpt_jax\n")
    assert "a frozen 24 x 3 (48 px)" in card
    assert "license: apache-2.0" in card and "ant, bee, cow" in card
    assert "18 training, 6 validation and 6 test pictures" in card
    row = json.loads((folder / "config.json").read_text())["result"]
    assert f"{100 * row['test_accuracy']:.1f} % on test (95 % interval" in card
    assert str(workdir.parent) not in card  # nor where the backbone lay
    for path in folder.iterdir():
        hub.files[f"org/name/{path.name}"] = path.read_bytes()
    weights = config.backbone.checkpoint
    expected = vpt_jax.load_classifier(workdir).predict(zoo / "bee" / "4.png")
    for place in (folder, "hf://org/name", "hf://org/name/prompts.safetensors"):
        got = vpt_jax.load_classifier(place, backbone=weights)
        found = got.predict(zoo / "bee" / "4.png")
        np.testing.assert_array_equal(found.probabilities, expected.probabilities)
    loaded = vpt_jax.load_prompts("hf://org/name")
    assert loaded.header == vpt_jax.load_prompts(best_file(workdir)).header
    with pytest.raises(ValueError, match="--backbone for the command"):
        vpt_jax.load_classifier("hf://org/name")


def test_an_exported_program_answers_with_jax_alone(classifier, zoo, tmp_path):
    vpt_jax.export(classifier, tmp_path / "zoo.stablehlo")
    about = json.loads((tmp_path / "zoo.stablehlo.json").read_text())
    assert about == {
        "class_names": ["ant", "bee", "cow"],
        "image_size": 48,
        "resize": "squash",
    }
    paths = sorted((zoo / "ant").iterdir())
    squares = np.stack([read_picture(p, 48, "squash") for p in paths])
    np.save(tmp_path / "squares.npy", squares)
    code = (
        "import sys, jax, numpy as np\n"
        "from jax import export\n"
        "program = export.deserialize(bytearray(open('zoo.stablehlo', 'rb').read()))\n"
        "x = np.load('squares.npy')\n"
        "out = [np.asarray(program.call(x[:n])) for n in (1, 10)]\n"
        "assert program.platforms == ('cpu', 'cuda', 'tpu')\n"
        "assert not [m for m in sys.modules if m.startswith(('vpt_jax', 'flax'))]\n"
        "np.save('out.npy', np.concatenate(out))"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PATH": "", "HOME": str(tmp_path)},
        check=True,
    )
    expected = classifier.predict(paths).probabilities
    found = np.load(tmp_path / "out.npy")
    np.testing.assert_allclose(found[1:], expected, atol=1e-6)
    np.testing.assert_allclose(found[:1], expected[:1], atol=1e-6)


# --- the command ----------------------------------------------------------------------


def test_the_command_writes_rows_and_names_what_it_cannot_read(
    finished, zoo, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("vpt_jax.files.cli.keep_compiled", lambda: None)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    shutil.copy(zoo / "ant" / "1.png", tmp_path / "in" / "deep" / "a.png")
    (tmp_path / "in" / "bad\n.jpg").write_bytes(b"nothing")
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    (tmp_path / "in" / ".hidden.png").write_bytes(b"")
    where = [str(finished[1]), str(tmp_path / "in"), str(zoo / "cow" / "2.png")]
    for name in ("out.csv", "out.jsonl"):
        out = tmp_path / name
        assert predict.main([*where, f"--out={out}", "--top=2"]) == 1
        shown = capsys.readouterr()
        assert r"not read: " in shown.err and r"bad\n.jpg: got no picture" in shown.err
        assert "Classifier(24 x 3, 3 classes" in shown.err
        assert len(shown.out.splitlines()) == 2 and "%" in shown.out
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["path"] for r in rows] == [r["path"] for r in lines]
    assert [Path(r["path"]).name for r in rows] == ["bad\n.jpg", "a.png", "2.png"]
    assert [bool(r["error"]) for r in rows] == [True, False, False]
    expected = vpt_jax.load_classifier(finished[1]).predict(
        [zoo / "ant" / "1.png", zoo / "cow" / "2.png"]
    )
    for number, (row, line) in enumerate(zip(rows[1:], lines[1:], strict=True)):
        assert row["label"] == line["label"] == expected.labels[number]
        assert float(row["probability"]) == pytest.approx(line["probability"], rel=1e-5)
        top = np.sort(expected.probabilities[number])[::-1][:2]
        assert [p for _, p in line["top"]] == pytest.approx(top.tolist(), rel=1e-5)
        assert row["label_2"] == line["top"][1][0]
    assert predict.main([str(finished[1]), str(zoo)]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 30 and "30 pictures in" in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent", "x"], "no such file or folder: absent"),
        (["x", "y", "--out=a.txt"], "expected a name in .csv or .jsonl"),
        (["x", "y", "--top=0"], "--top is 0"),
    ],
)
def test_bad_usage_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("vpt_jax.files.cli.keep_compiled", lambda: None)
    with pytest.raises(SystemExit) as end:
        predict.main(arguments)
    shown = capsys.readouterr().err
    assert end.value.code == 2 and message in shown and shown.count("\n") == 1


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from vpt_jax import predict\n"
        "try:\n    predict.main(['--help'])\nexcept SystemExit as end:\n"
        "    assert end.code == 0\n"
        "heavy = ('PIL', 'optax', 'orbax', 'ml_collections', 'matplotlib')\n"
        "assert not [m for m in heavy if m in sys.modules]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "RUN_OR_FILE" in done.stdout


def test_a_pipe_hears_of_a_first_batch_that_takes_long(monkeypatch, capsys):
    monkeypatch.setattr(predict, "_SAY_S", 0.1)
    said = ""
    with predict._Progress():
        while "0 pictures, 0.0 a second" not in said:
            said += capsys.readouterr().err
