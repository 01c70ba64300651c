# SPDX-License-Identifier: Apache-2.0
"""Accuracy against the number of prompts: laws, knee, verdicts, and a small lab."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL, save_small_backbone
from test_protocol import load

from studies import prompts, study
from vpt_jax.run import parsing

pytestmark = pytest.mark.usefixtures("standard_promotion")
COUNTS = (1, 2, 5, 10, 20, 40)


def result(by_count, finetuned=(40.0, 41.0, 39.0)):
    full = [40.5, 41.5, 39.4]
    return {
        "seeds": [0, 1, 2],
        "num_prompts": 20,
        "none": [20.0, 20.5, 20.2],
        "by_count": {str(c): list(v) for c, v in by_count.items()},
        "full": full,
        "by_ratio": {
            mode: {"0.3": list(finetuned), "0.1": [30.0, 31.0, 29.0]}
            for mode in prompts.MODES
        },
    }


def grown(law):
    noise = np.random.default_rng(0).normal(0, 0.2, (len(COUNTS), 3))
    return {c: 20 + law(c) + own for c, own in zip(COUNTS, noise, strict=True)}


def test_a_planted_law_is_predicted_exactly():
    m = np.asarray(COUNTS, float)
    errors = prompts.held_out_errors(COUNTS, 3 + 2 * np.log(m))
    assert errors["log"] < 1e-9 < 1 < errors["linear"]
    errors = prompts.held_out_errors(COUNTS, 3 + 0.5 * m)
    assert errors["linear"] < 1e-9 < 1 < errors["log"]


@pytest.mark.parametrize(
    ("law", "finetuned", "expected"),
    [
        (lambda m: 4 * np.log(m), (40.4, 41.3, 39.2), ["supported"] * 2),
        (lambda m: 0.7 * m, (35.4, 36.5, 34.3), ["not supported"] * 2),
        (lambda m: 0.0, (44.0, 36.0, 37.0), ["undecided"] * 2),
    ],
)
def test_verdicts_follow_the_data(law, finetuned, expected):
    verdicts = prompts.show(result(grown(law), finetuned)).verdicts
    assert [v.verdict for v in verdicts] == expected


def test_knee():
    values = np.asarray([[10, 11, 12], [20, 21, 22], [20.1, 20.9, 22.1]], float)
    assert prompts.knee((1, 5, 10), values) == 5
    assert prompts.knee((1, 5), values[:2]) == 5


def test_one_seed_decides_nothing():
    found = result({c: [20.0 + c] for c in COUNTS}, finetuned=(40.4,))
    found |= {"seeds": [0], "full": [40.5], "none": [20.0]}
    for mode in prompts.MODES:
        found["by_ratio"][mode] = {"0.3": [40.4]}
    verdicts = prompts.show(found).verdicts
    assert {v.verdict for v in verdicts} == {"undecided"}


def few_digits(place):
    """16 digits to train on, two seeds, and a backbone that has learnt nothing."""
    path = save_small_backbone(place / "small.safetensors")
    values = load("demo", "digits,smoke,seeds=2").to_dict()
    values["backbone"] |= {"variant": SMALL, "checkpoint": str(path)}
    lab = study.make_lab(parsing.parse(values), place / "out")
    few = {
        name: type(split)(split.images[:num], split.labels[:num])
        for name, num in (("train", 16), ("val", 20), ("test", 40))
        for split in [getattr(lab.pictures.task, name)]
    }
    images, labels = map(jnp.asarray, few["train"])
    task = lab.pictures.task._replace(**few)
    return lab._replace(pictures=type(lab.pictures)(task, images, labels))


def test_a_small_lab(tmp_path):
    """Everything that is trained is found again, and the result is plain."""
    lab = few_digits(tmp_path)
    small = {"counts": (1, 2, 4), "ratios": (0.3,)}  # 4 are the config's own
    found = prompts.run(lab, **small)
    assert json.loads(json.dumps(found)) == found
    assert set(found["by_count"]) == {"1", "2", "4"}
    assert all(len(v) == 2 for v in found["by_count"].values())
    before = sorted(p for p in lab.workdir.rglob("*.safetensors"))
    again = prompts.run(lab, **small)
    assert again == found
    assert sorted(lab.workdir.rglob("*.safetensors")) == before
    section = prompts.show(found)
    page = study.html(section)
    assert page.count("<svg") == 2
    study.print_section(section)
