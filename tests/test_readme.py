# SPDX-License-Identifier: Apache-2.0
"""What README shows is run."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_block_runs_as_it_stands(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(block, names)
    printed = capsys.readouterr().out
    assert sum(map(int, re.findall(r"\d+", printed))) == 18  # 30 % of 6 x 10
    assert names["loss"] > 0


def test_the_two_lines_are_there_and_name_files_that_exist():
    assert "pip install . && python -m vpt_jax.main --config=configs/demo.py" in README
    assert "pip install '.[test]' && python -m pytest" in README
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).is_file(), link


def test_no_placeholder_was_left():
    assert not re.findall(r"\b[A-Z]+_[A-Z]+\b", README.replace("CC_BY", ""))
