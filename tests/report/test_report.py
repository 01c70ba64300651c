# SPDX-License-Identifier: Apache-2.0
"""The report: averages, sentences, table, figures and the HTML page."""

import base64
import io
import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from vpt_jax.report import __main__ as command
from vpt_jax.report import compare, figures, looks
from vpt_jax.report import document as rp
from vpt_jax.report.rows import label, summarise


def make_row(stage, score, scope, ratio, counts, test, seed, **more):
    total = sum(counts)
    row = {
        "stage": stage,
        "score": score,
        "scope": scope,
        "keep_ratio": ratio,
        "counts": list(counts),
        "val_accuracy": test + 0.01,
        "test_accuracy": test,
        "macs": 80_000_000 + 20_000 * total,
        "macs_reference": 80_000_000 + 1_300_000 * total // len(counts),
        "latency_ms": 0.4 + 0.001 * total,
        "tuned_params": 128 * total + 2064,
        "seed": seed,
    }
    return row | more


def make_rows(rng, seeds, ratios, counts, free, level=0.86, low=0.52):
    """Made-up rows of every kind; `free(ratio)` are the counts of a global cut."""
    rows = []
    for seed in seeds:

        def add(stage, score, scope, ratio, counts, test, seed=seed):
            test = float(np.clip(test + rng.normal(0, 0.004), 0, 1))
            rows.append(make_row(stage, score, scope, ratio, counts, test, seed))

        add("linear", None, None, 0.0, [0] * len(counts), low)
        add("tune", None, None, 1.0, counts, level)
        for r in ratios:
            cut, even = free(r), [round(r * n) for n in counts]
            kept = level - 0.005 / r
            add("condense", "key_gate", "global", r, cut, level - 0.25 * (1 - r) ** 2)
            add("finetune", "key_gate", "global", r, cut, kept)
            add("finetune", "key_gate", "layer", r, even, kept - 0.005)
            add("finetune", "random", "global", r, cut, kept - 0.02)
            add("scratch", None, None, r, cut, kept - 0.015)
    return rows


def make_report(seeds=3, layers=6, prompts=20, ratios=(0.5, 0.3, 0.1)):
    """A made-up report that looks like a real one."""
    rng = np.random.default_rng(0)
    importance = [
        np.exp(rng.normal(-4 + 0.5 * i, 1, prompts)).tolist() for i in range(layers)
    ]
    ranked = np.sort(np.concatenate(importance))[::-1]

    def free(ratio):
        cut = ranked[round(ratio * len(ranked)) - 1]
        return [int(sum(v >= cut for v in layer)) for layer in importance]

    data = {"train": 800, "val": 200, "test": 2000, "classes": 16, "image_size": 32}
    backbone = {"name": "demo", "variant": "demo/4", "hash": "0123456789abcdef" * 4}
    of_scores = {"score": "key_gate", "reduction": "mean_abs", "seed": 0}
    return {
        "task": "shapes_orientation",
        "data": data,
        "backbone": backbone | {"parameters": 1204608, "normalisation": "half"},
        "config": {"tune": {"learning_rate": 0.01, "epochs": 100}, "seeds": seeds},
        "versions": {"vpt_jax": "0.1.0", "jax": "0.9.0", "device": "cpu x1"},
        "command": "python -m vpt_jax.main --config=configs/demo.py --workdir=out/demo",
        "latency_batch": 64,
        "seconds": {"linear": 3.2, "tune": 50.1, "finetune": 1212.5},
        "importance": of_scores | {"layers": importance},
        "rows": make_rows(rng, range(seeds), ratios, [prompts] * layers, free),
    }


def two_groups(first, second):
    """All prompts and PC at 30 % with the given test accuracies, one per seed."""
    pc = ("finetune", "key_gate", "global", 0.3, [4, 2])
    rows = [make_row("tune", None, None, 1.0, [10, 10], a, s) for s, a in first.items()]
    rows += [make_row(*pc, a, s) for s, a in second.items()]
    return {"rows": rows, "importance": {"score": "key_gate"}}


def test_summarise_is_mean_and_sample_deviation():
    pc = ("finetune", "key_gate", "global", 0.3)
    rows = [
        make_row(*pc, [3, 1], 0.8, 1, latency_ms=None),
        make_row(*pc, [1, 3], 0.7, 0, latency_ms=2.0),
        make_row(*pc, [1, 4], 0.6, 2, latency_ms=4.0),
        make_row("linear", None, None, 0.0, [0, 0], 0.5, 0, latency_ms=None),
    ]
    linear, group = summarise(rows, "key_gate")
    assert group["n"] == 3
    assert group["test_accuracy"] == pytest.approx(0.7)
    assert group["test_sd"] == pytest.approx(0.1)
    assert group["val_sd"] == pytest.approx(np.std([0.81, 0.71, 0.61], ddof=1))
    assert group["latency_ms"] == 3.0
    assert group["counts"] == [1, 3]  # of seed 0, though it came second
    assert group["mean_counts"] == pytest.approx([5 / 3, 8 / 3])
    assert (group["prompts_min"], group["prompts_max"]) == (4, 5)
    assert (linear["n"], linear["test_sd"], linear["latency_ms"]) == (1, None, None)


def test_rows_have_a_fixed_readable_order():
    rows = make_report(seeds=2, ratios=(0.3, 0.125))["rows"]
    rows.append(make_row("finetune", "attention", "global", 0.3, [6] * 6, 0.8, 0))
    names = [label(g, "key_gate") for g in summarise(rows[::-1], "key_gate")]
    kinds = ("PC global {}", "PC layer {}", "PC global {}, not fine-tuned")
    kinds += ("Random {}", "From scratch {}")
    of_30, of_12 = ([k.format(ratio) for k in kinds] for ratio in ("30 %", "12.5 %"))
    of_30.insert(1, "PC global 30 % (attention)")
    assert names == ["Linear probe", "All prompts (100 %)", *of_30, *of_12]
    assert label(rows[-1], "attention") == "PC global 30 %"


@pytest.mark.parametrize(
    ("loss", "word"),
    [(0.014, "is within"), (0.015, "is within"), (0.016, "is NOT within")],
)
def test_verdict_is_within_or_not(loss, word):
    first = {s: 0.85 + 0.001 * s for s in range(3)}
    said = rp.verdict(two_groups(first, {s: a - loss for s, a in first.items()}))
    assert f"loses {100 * loss:.2f}" in said[0]
    assert f"{word} 1.5 points" in said[0]
    gain = rp.verdict(two_groups(first, {s: a + loss for s, a in first.items()}))[0]
    assert f"gains {100 * loss:.2f}" in gain and "is within" in gain


def test_exactly_the_limit_is_within_it():
    for hits in range(1000, 2000, 10):  # of 2000 pictures
        said = rp.verdict(two_groups({0: hits / 2000}, {0: (hits - 30) / 2000}))
        assert "is within" in said[0]


def test_verdict_is_paired_by_seed():
    # Seed 9 has no partner. The differences are -1, -2 and -3 points.
    first = {0: 0.90, 1: 0.80, 2: 0.70, 9: 0.10}
    said = rp.verdict(two_groups(first, {2: 0.67, 0: 0.89, 1: 0.78}))
    assert "loses 2.00 ± 0.58 points (3 paired seeds)" in said[0]
    assert not any("One seed" in s for s in said)
    assert rp.verdict(two_groups({0: 0.9}, {1: 0.9})) == []


def test_verdict_compares_with_every_control():
    said = " ".join(rp.verdict(make_report(seeds=3)))
    for ratio in ("50 %", "30 %", "10 %"):
        assert f"PC at {ratio} (global) minus from scratch" in said
    for other in ("minus random", "minus PC layer", "minus the linear probe"):
        assert other in said
    one = rp.verdict(make_report(seeds=1))
    assert "One seed is no evidence" in one[-1] and "--config.seeds=" in one[-1]
    assert "±" not in " ".join(one)


@pytest.mark.parametrize("seeds", [1, 3])
def test_table_is_plain_and_narrow(seeds):
    report, file = make_report(seeds=seeds, layers=12, prompts=100), io.StringIO()
    rp.print_table(report, file)
    text = file.getvalue()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 110
    assert "\x1b" not in text and "per picture, in batches of 64" in " ".join(lines)
    (pc,) = [line for line in lines if line.startswith("PC global 30 %  ")]
    group = summarise(report["rows"], "key_gate")[7]
    assert label(group, "key_gate") == "PC global 30 %"
    assert f"{100 * group['test_accuracy']:.1f}" in pc
    assert pc.count("±") == (2 if seeds > 1 else 0)
    # No name is folded onto a second line.
    assert sum("not fine-tuned" in line for line in lines) == 3


def check_figures(svgs, names):
    assert list(svgs) == names
    for name, svg in svgs.items():
        root = ET.fromstring(svg)
        assert root.tag.endswith("svg")
        assert "".join(root.itertext()).strip()  # text stays text
        ids = [e.get("id") for e in root.iter() if e.get("id")]
        assert all(i.startswith(name) for i in ids)


def test_figures_are_xml_and_the_same_every_time():
    report = make_report()
    first = figures.draw(report)
    check_figures(first, ["accuracy", "layers", "importance", "cost"])
    assert figures.draw(report) == first
    assert 'id="accuracy-spread' in first["accuracy"]


def test_figure_without_data_is_left_out():
    report = make_report(seeds=1)
    one = figures.draw(report)["accuracy"]
    assert "spread" not in one and "From scratch" in one
    report["importance"]["layers"] = []
    report["rows"] = report["rows"][:2]  # linear probe and all prompts
    for row in report["rows"]:
        row["latency_ms"] = None
    assert list(figures.draw(report)) == ["cost"]


def test_importance_with_zeros_and_empty_layers():
    report = make_report(seeds=1)
    for layers in ([[0.0, -1.0, 2.0], []], [[0.0, 0.0]], [[1e-9, 3.0]]):
        report["importance"]["layers"] = layers
        drawn = figures.render({"x": lambda f: figures._draw_importance(f, [], report)})
        assert "Importance (key_gate" in drawn["x"]


class Page(HTMLParser):
    """Collects tags and text, and checks that tags are closed and nothing is loaded."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)
        assert self.open == []
        assert not {"script", "link", "iframe"} & set(self.tags)
        assert "@import" not in text and "url(http" not in text

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)
        names = ("src", "href", "xlink:href", "srcset", "data")
        assert all(v.startswith(("#", "data:")) for k, v in attrs if k in names)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def look_at():
    example = {"picture": "AAAA", "probability": 0.9, "label": "<a>"}
    example["attention"] = [[0.1, 0.9], [0.4, 0.6]]
    return {
        "split": "test",
        "accuracy": 0.5,
        "confusion": [[3, 7, 0], [1, 8, 2], [0, 4, 5]],
        "confused": [["<a>", "b", 7]],
        "examples": [{**example, "answer": "b"}, {**example, "answer": "<a>"}],
    }


def test_html_loads_nothing_and_says_everything():
    report = make_report() | {"looks": look_at(), "classes": ["<a>", "b", "c"]}
    for row in report["rows"]:
        if row["stage"] != "linear":
            row |= {"losses": [2.0, 1.0, 0.5], "watched": [[1, 0.4], [3, 0.6]]}
    text = rp.html(report)
    page = Page(text)
    assert page.tags.count("svg") == 2 * 6  # for a screen and for a phone
    for part in (*rp.verdict(report), report["command"], report["backbone"]["hash"]):
        assert part in page.text
    for part in ("learning_rate", "0.9.0", "1212.5", "shapes_orientation"):
        assert part in page.text
    flat = " ".join(text.split())
    assert flat.count("per picture, in batches of 64") == 1  # below the table
    assert "latency_batch" not in text.lower()  # not again among the details
    # Answers are shown as pictures, trainings as curves.
    assert "&lt;a&gt; taken for b: 7" in text and "<a>" not in text
    assert text.count("data:image/jpeg;base64,AAAA") == 2
    assert text.count('src="data:image/png') == 2
    assert "but is &lt;a&gt;" in text and "Confusion matrix" in text
    assert text.count("Loss on train") == 2


def test_html_escapes_what_it_did_not_write():
    bad = "<script>alert('&')</script>"
    report = make_report(seeds=1, ratios=(0.3,))
    report["task"] = report["command"] = report["config"]["name"] = bad
    report["versions"][bad] = report["backbone"]["name"] = bad
    report["importance"]["score"] = bad
    for row in report["rows"]:
        if row["score"] == "key_gate":
            row["score"] = bad
    report["rows"].append(dict(report["rows"][3], score=f"other {bad}"))
    # Of many classes there is no matrix; of a Swin no attention.
    looks = look_at() | {"confusion": []}
    for example in looks["examples"]:
        example["attention"] = []
    text = rp.html(report | {"looks": looks, "classes": []})
    assert bad in Page(text).text
    assert "Confusion matrix" not in text and "data:image/png" not in text


def test_write_and_render_again(tmp_path, capsys):
    report = make_report(seeds=1)
    report["importance"]["layers"] = []
    report["rows"] = report["rows"][:2]
    rp.write(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Cost of inference" in page and "Importance of every prompt" not in page
    (tmp_path / "report.html").unlink()
    compact = json.dumps(report)
    (tmp_path / "report.json").write_text(compact)
    command.main([str(tmp_path)])
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
    assert (tmp_path / "report.json").read_text() == compact  # only read
    assert "All prompts (100 %)" in capsys.readouterr().out


def refused(capsys, *folders):
    """What the command says."""
    with pytest.raises(SystemExit):
        command.main([*map(str, folders)])
    return capsys.readouterr().err


def test_main_says_what_is_wrong(tmp_path, capsys):
    assert "python -m vpt_jax.main" in refused(capsys, tmp_path)
    for text in ("{", "[]", "{}"):
        (tmp_path / "report.json").write_text(text)
        assert "is not a report" in refused(capsys, tmp_path)
        assert (tmp_path / "report.json").read_text() == text


# --- runs side by side ----------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    """Two runs of one task: the second has another rate, and half of its prompts' luck.

    They share the seeds 0 and 1; the second is 2 points worse, exactly.
    """
    for name, seeds, shift in (("a/run", 3, 0.0), ("b/run", 2, -0.02)):
        report = make_report(seeds=seeds)
        report["config"] = {"tune": {"base_lr": 0.01 - shift}}
        for row in report["rows"]:
            row["test_accuracy"] += shift
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(report))
    return [tmp_path / "a/run", tmp_path / "b/run"]


def test_runs_are_paired_by_seed(runs):
    reports = compare.read(runs)
    assert list(reports) == ["a", "b"]  # what tells them apart, and no more
    (line,) = compare.differing(reports).rows
    assert line == ["tune.base_lr", "0.01", "0.03"]
    table = compare.accuracies(reports)
    assert table.header[-1] == "b\nminus a"
    assert {row[-1] for row in table.rows} == {"\N{MINUS SIGN}2.00 ± 0.00"}


def test_a_comparison_is_printed_and_drawn(runs, tmp_path, capsys):
    out = tmp_path / "new" / "page.html"
    command.main([*map(str, runs), f"--out={out}"])
    printed = capsys.readouterr().out
    assert "tune.base_lr" in printed and str(out) in printed
    page = out.read_text()
    Page(page)
    assert page.count("<svg") == 2 and "All prompts (100 %)" in page


def test_what_cannot_be_compared_is_refused(runs, tmp_path, capsys):
    assert "each once" in refused(capsys, runs[0], f"{runs[0]}/")
    assert "has no report.json; a finished run" in refused(capsys, runs[0], tmp_path)
    path = runs[1] / "report.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps(report | {"task": "another"}))
    assert "tested on different things" in refused(capsys, *runs)
    path.write_text("{}")
    assert "is not a report" in refused(capsys, *runs)


def test_tensorboard_has_the_same_pictures():
    red, file = (200, 10, 10), io.BytesIO()
    Image.new("RGB", (8, 8), red).save(file, "JPEG", quality=95)
    shown = look_at()
    for example in shown["examples"]:
        example["picture"] = base64.b64encode(file.getvalue()).decode()
    found = looks.pictures(shown, ["<a>", "b", "c"])
    assert set(found) == {"confusion", "most_confident_mistakes", "right_answers"}
    for name, picture in found.items():
        assert picture.dtype == np.uint8 and picture.ndim == 3
        near = np.abs(picture.astype(int) - red).max(-1) < 10
        assert near.any() == (name != "confusion")
    assert looks.pictures({}, []) == {}
