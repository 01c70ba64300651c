# SPDX-License-Identifier: Apache-2.0
"""What README shows is run."""

import re
from pathlib import Path

import foreign
import jax
import jax.numpy as jnp

import vpt_jax

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_blocks_run_as_they_stand(capsys):
    short, block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(short, names := {})
    assert names["features"].shape == (8, 128)
    exec(block, names := {})
    printed = capsys.readouterr().out
    assert sum(map(int, re.findall(r"\d+", printed))) == 18  # 30 % of 6 x 10
    assert names["loss"] > 0


def test_the_block_about_other_models_runs_as_it_stands():
    (block,) = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
    module = foreign.VitJax(patch=4, width=16, depth=12, mlp_dim=24, num_heads=2)
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    names = {
        "jax": jax,
        "vpt_jax": vpt_jax,
        "module": module,
        "params": module.init(jax.random.key(1), images, train=False)["params"],
        "key": jax.random.key(2),
        "batches": [{"image": images, "label": jnp.arange(2)}],
    }
    exec(block.replace("width=768", "width=16"), names)
    assert sum(vpt_jax.counts(names["small"])) == 180  # 30 % of 12 x 50
    plain = module.apply({"params": names["params"]}, images, train=False)
    prompted = names["features"](names["params"], images)
    assert prompted.shape == plain.shape
    assert float(jnp.abs(prompted - plain).max()) > 1e-3


def test_the_two_lines_are_there_and_name_files_that_exist():
    assert "pip install . && python -m vpt_jax.main --config=configs/demo.py" in README
    assert "pip install '.[test]' && python -m pytest" in README
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).is_file(), link


def test_no_placeholder_was_left():
    assert not re.findall(r"\b[A-Z]+_[A-Z]+\b", README.replace("CC_BY", ""))
