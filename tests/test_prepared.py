# SPDX-License-Identifier: Apache-2.0
"""From a prepared tfds directory to a task, and to a row of the report."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_records
from conftest import randomised
from test_vtab import toy

import vpt_jax
from vpt_jax import config as configs
from vpt_jax import main
from vpt_jax.checkpoint import save_backbone
from vpt_jax.data import pictures, prepared, tasks, vtab

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """Twelve train and four test pictures, under the name of a VTAB task."""
    test_records.make(tmp_path / "toy" / "1.0.0", "array_record")
    monkeypatch.setitem(vtab.BENCHMARKS, "svhn", toy(name="svhn"))
    monkeypatch.setattr(vtab, "NUM_TRAIN", 4)
    monkeypatch.setattr(vtab, "NUM_VAL", 2)
    monkeypatch.setenv("VPT_JAX_CACHE", str(tmp_path / "cache"))
    return str(tmp_path)


def test_a_task_has_the_pictures_that_were_written(data_dir):
    task = tasks.load_task("svhn", image_size=16, data_dir=data_dir)
    assert task.train.labels.tolist() == [0, 1, 2, 3]
    assert task.val.labels.tolist() == [6, 7]
    assert task.test.labels.tolist() == [0, 1, 2, 3]
    for split, name, first in (("train", "train", 0), ("val", "train", 6)):
        for i, image in enumerate(getattr(task, split).images):
            picture, _, _ = test_records.example(name, first + i)
            if picture.ndim == 2:
                picture = np.repeat(picture[..., None], 3, axis=-1)
            picture = picture[..., :3]  # alpha is dropped, as TensorFlow does
            expected = pictures.resize_bilinear(picture[None], 16, "corner")[0]
            np.testing.assert_array_equal(image, expected)


def test_a_second_start_reads_the_cache_alone(data_dir, monkeypatch):
    row = vtab.BENCHMARKS["svhn"]
    first = prepared.arrays(row, "test", 16, rule="corner", data_dir=data_dir)
    monkeypatch.setattr(vtab, "load", None)
    again = prepared.arrays(row, "test", 16, rule="corner", data_dir=data_dir)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(TypeError):  # another rule is another file
        prepared.arrays(row, "test", 16, rule="squash", data_dir=data_dir)


def test_other_files_are_read_anew(data_dir):
    row = vtab.BENCHMARKS["svhn"]
    prepared.arrays(row, "test", 8, rule="corner", data_dir=data_dir)
    lines = []
    test_records.make(vtab.find(row, data_dir).parent / "1.0.1", "tfrecord")
    prepared.arrays(
        row, "test", 8, rule="corner", data_dir=data_dir, report=lines.append
    )
    assert lines == ["reading svhn test: 0 of 4, once"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"data_dir": "nowhere"},
            "svhn: got no prepared copy",
        ),
        ({"skip_broken": True}, "skip_broken for 'folder' alone"),
    ],
)
def test_what_cannot_be_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        tasks.load_task("svhn", **options)


def test_a_whole_run(data_dir, tmp_path):
    """`configs/vtab.py:task=svhn,smoke` on a backbone of two layers' size."""
    model = vpt_jax.ViT("demo/16")
    params = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    path = tmp_path / "small.safetensors"
    save_backbone(path, randomised(params, scale=0.05), {"normalisation": "half"})
    values = load_config("task=svhn,smoke").to_dict()
    values["backbone"].update(variant="demo/16", checkpoint=str(path), image_size=32)
    values["task"]["data_dir"] = data_dir
    values["tune"]["batch_size"] = values["linear"]["batch_size"] = 4
    values["condense"]["scopes"] = ("global",)
    values |= {"baselines": (), "eval_batch_size": 4}
    report = main.run(configs.parse(values), tmp_path / "run")
    assert report["task"] == "svhn"
    assert (report["data"]["train"], report["data"]["test"]) == (4, 4)
    assert [r["stage"] for r in report["rows"]] == ["tune", "condense", "finetune"]


def load_config(arg):
    module = {}
    path = Path(__file__).parent.parent / "configs" / "vtab.py"
    exec(compile(path.read_text(), str(path), "exec"), module)
    return module["get_config"](arg)


def test_the_config_takes_prompts_and_rates_from_the_table():
    for name in tasks.VTAB:
        config = configs.parse(load_config(f"task={name}"))
        assert config.prompts.num_prompts == vtab.BENCHMARKS[name].prompts
    assert configs.parse(load_config("task=sun397")).tune.base_lr == 25.0
    for arg in ("", "task=mnist", "svhn", "task=cub"):
        with pytest.raises(ValueError, match="task=NAME"):
            load_config(arg)
