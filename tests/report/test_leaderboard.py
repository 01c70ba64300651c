# SPDX-License-Identifier: Apache-2.0
"""The leaderboard: averages, what is published, its files and its table."""

import copy
import csv
import io
import itertools
import json
import re
import statistics

import numpy as np
import pytest
from test_report import Page, check_figures, make_rows, refused
from test_report import make_row as row_of_a_report
from test_vtab import DEEP_GROUP_MEANS, DEEP_MEAN_OVER_GROUPS, MEANS_OVER_TASKS

from vpt_jax.data.public.vtab import BENCHMARKS
from vpt_jax.report import __main__ as command
from vpt_jax.report import board_figures, published, standings
from vpt_jax.report import board_tables as tables
from vpt_jax.report import leaderboard as lb

NATURAL = tuple(n for n in published.VTAB if BENCHMARKS[n].group == "natural")
CHOSEN = ("base_lr", "weight_decay", "num_prompts", "val_accuracy")
RATES = (0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0)


def make_row(*values):
    """As a report's, of a model of the base size."""
    return of_a_board(row_of_a_report(*values))


def of_a_board(row):
    total = sum(row["counts"])
    untimed = {name: value for name, value in row.items() if name != "latency_ms"}
    return untimed | {
        "val_accuracy": None,
        "macs": 17_000_000_000 + 1_000_000 * total,
        "macs_reference": 17_500_000_000 + 8_000_000 * total,
        "tuned_params": 768 * total + 7690,
        "epochs": 100,
        "planned_epochs": 100,
    }


def make_task(rng, name, seeds=(42, 44), ratios=(0.5, 0.3), layers=12):
    """A made-up task with a level of its own, as real ones have."""
    known = BENCHMARKS.get(name)
    each = known.prompts if known else 10
    level = known.published.deep / 100 if known else 0.8
    low = known.published.linear / 100 if known else 0.6

    def free(ratio):
        kept = max(1, round(ratio * each * layers))
        return rng.multinomial(kept, [1 / layers] * layers).tolist()

    rows = make_rows(rng, seeds, ratios, [each] * layers, free, level, low)
    grid = []
    for decay, rate in itertools.product((0.01, 0.001, 0.0001, 0.0), RATES):
        value = float(level - 0.02 * abs(np.log2(rate / 5)) + rng.normal(0, 0.01))
        finite = rate < 50 or decay > 0.001
        entry = {"base_lr": rate, "weight_decay": decay, "num_prompts": each}
        entry |= {"val_accuracy": value if finite else None}
        grid.append(entry | {"epochs": 100 if finite else 7, "planned_epochs": 100})
    chosen = max(grid, key=lambda entry: entry["val_accuracy"] or 0)
    return {
        "group": known.group if known else "own",
        "classes": known.classes if known else 4,
        "chosen": {k: chosen[k] for k in CHOSEN} | {"batch_size": 64, "how": "sweep"},
        "grid": grid,
        "rows": [of_a_board(row) for row in rows],
        "missing": 0,
    }


def make_board(names=published.VTAB, benchmark="vtab", seeds=(42, 44), **more):
    """A made-up board that looks like a real one; by default of 19 tasks."""
    rng = np.random.default_rng(0)
    backbone = {"name": "ViT-B_16.npz", "variant": "B/16"}
    backbone |= {"hash": "0123456789abcdef" * 4, "parameters": 85_798_656}
    config = {"benchmark": {"mode": "sweep"}, "tune": {"epochs": 100}}
    return {
        "benchmark": benchmark,
        "command": "python -m vpt_jax.bench.benchmark --config=configs/vtab.py",
        "versions": {"vpt_jax": "0.1.0", "jax": "0.9.0"},
        "backbone": backbone | {"normalisation": "imagenet"},
        "config": config | {"score": {"score": "key_gate"}},
        "tasks": {name: make_task(rng, name, seeds, **more) for name in names},
    }


def markdown(board):
    """As `render`, which draws the figures too."""
    board = standings.canonical(board)
    said = lb.notes(board, lb.leaderboard(board))
    return tables.markdown(board, lb.title(board), said)


def empty(task):
    task.update(rows=[], grid=[], chosen=None, missing=60)


def by_name(board, ours=True):
    return {
        line["method"]: line for line in lb.leaderboard(board) if line["ours"] == ours
    }


def simple(values, names, seeds):
    """All prompts alone, with the accuracies `values[task][seed]`."""
    board, kind = make_board(names, seeds=seeds, ratios=()), ("tune", None, None, 1.0)
    for name in names:
        rows = [make_row(*kind, [10] * 12, v, s) for s, v in values[name].items()]
        board["tasks"][name]["rows"] = rows
    return board


def test_published_averages_are_those_that_were_published():
    lines = by_name(make_board(), ours=False)
    for method, mean in MEANS_OVER_TASKS.items():
        averages = lines[published.METHODS[method]]["averages"]
        assert averages["mean_tasks"]["mean"] == pytest.approx(mean, abs=0.006)
    deep = lines["VPT-Deep"]["averages"]
    for group, mean in DEEP_GROUP_MEANS.items():
        assert deep[group]["mean"] == pytest.approx(mean, abs=0.021)
    groups = deep["mean_groups"]["mean"]
    assert groups == pytest.approx(DEEP_MEAN_OVER_GROUPS, abs=0.011)
    full = lines["Full fine-tuning (VPT)"]["averages"]
    assert full["mean_groups"]["mean"] == pytest.approx(68.97, abs=0.006)
    assert (deep["mean_tasks"]["sd"], deep["mean_tasks"]["n"]) == (None, None)


def test_published_averages_of_fgvc():
    lines = by_name(make_board(published.FGVC, "fgvc"), ours=False)
    means = {"Full fine-tuning (VPT)": 88.54, "Linear probe (VPT)": 79.32}
    means |= {"VPT-Shallow": 84.62, "VPT-Deep": 89.11, "E2VPT": 89.22}
    means |= {"Adapter+ (no prompts)": 90.7, "PRO-VPT": 91.7, "DA-VPT": 91.94}
    for name, mean in means.items():
        averages = lines[name]["averages"]
        # They are computed from rounded accuracies.
        assert averages["mean_tasks"]["mean"] == pytest.approx(mean, abs=0.05)
    assert "VFPT" not in lines
    assert lines["VAPT"]["averages"]["mean_tasks"] is None  # it is derived


def test_headlines_stand_under_no_average_that_is_not_known():
    lines = by_name(make_board(), ours=False)
    assert lines["E2VPT"]["averages"]["mean_groups"]["mean"] == 73.94
    assert lines["E2VPT"]["averages"]["mean_tasks"] is None
    for name, value in {"PRO-VPT": 78.0, "VFPT": 73.2, "DA-VPT": 76.14}.items():
        assert not any(lines[name]["averages"].values())
        assert lines[name]["as_published"] == value
        assert "not stated" in lines[name]["convention"]
    # Of a part of the benchmark no headline is an average.
    for line in by_name(make_board(NATURAL), ours=False).values():
        if not line["tasks"]:
            assert not any(line["averages"].values())
            assert line["as_published"]


def test_both_averages_by_hand():
    rng = np.random.default_rng(1)
    values = {n: {s: rng.uniform(0.3, 0.9) for s in (1, 2)} for n in published.VTAB}
    (line,) = by_name(simple(values, published.VTAB, (1, 2))).values()
    groups = {}
    for name in published.VTAB:
        groups.setdefault(BENCHMARKS[name].group, []).append(name)

    def over_tasks(seed, names=published.VTAB):
        return 100 * sum(values[n][seed] for n in names) / len(names)

    def over_groups(seed):
        return sum(over_tasks(seed, names) for names in groups.values()) / 3

    for key, function in {
        "mean_tasks": over_tasks,
        "mean_groups": over_groups,
        "natural": lambda seed: over_tasks(seed, groups["natural"]),
    }.items():
        first, second = function(1), function(2)
        found = line["averages"][key]
        assert found["mean"] == pytest.approx((first + second) / 2)
        assert found["sd"] == pytest.approx(abs(first - second) / 2**0.5)
        assert found["n"] == 2
    assert line["averages"]["mean_tasks"] != line["averages"]["mean_groups"]


def test_spread_is_of_the_averages_of_seeds_that_all_tasks_have():
    values = {
        "dtd": {1: 0.5, 2: 0.7, 3: 0.9},
        "svhn": {1: 0.3, 2: 0.1, 4: 0.8},  # seeds 1 and 2 are those of both
    }
    (line,) = by_name(simple(values, ("dtd", "svhn"), (1,))).values()
    average = line["averages"]["mean_tasks"]
    assert average["mean"] == pytest.approx((70 + 40) / 2)
    assert (average["n"], average["sd"]) == (2, pytest.approx(0, abs=1e-9))
    assert line["tasks"]["dtd"]["sd"] == pytest.approx(20)
    assert line["tasks"]["svhn"]["sd"] == pytest.approx(statistics.stdev([30, 10, 80]))
    assert line["seeds"] == [3, 3]


def test_costs_are_means_over_tasks():
    board = make_board(NATURAL)
    line = by_name(board)["All prompts (100 %)"]
    prompts = [12 * BENCHMARKS[name].prompts for name in NATURAL]
    assert line["prompts"] == pytest.approx(np.mean(prompts))
    tuned = np.mean([768 * p + 7690 for p in prompts])
    assert line["tuned_params"] == pytest.approx(tuned)
    assert line["tuned_percent"] == pytest.approx(100 * tuned / 85_798_656)
    assert line["macs"] == pytest.approx(17e9 + 1e6 * np.mean(prompts))
    deep = by_name(board, ours=False)["VPT-Deep"]
    assert deep["prompts"] == pytest.approx(np.mean(prompts))
    del board["backbone"]["parameters"]
    assert by_name(board)["All prompts (100 %)"]["tuned_percent"] is None


def test_a_board_without_any_rows():
    board = make_board()
    for task in board["tasks"].values():
        empty(task)
    board["backbone"] = {}  # is known from the first finished run
    assert by_name(board) == {}
    texts = lb.render(board)
    assert "0 of 19 tasks are complete, 1,140 runs" in texts["md"]
    assert "VPT-Deep" in texts["html"]
    file = io.StringIO()
    lb.print_table(board, file)
    assert "VPT-Deep" in file.getvalue()


def test_missing_tasks_leave_averages_out():
    board = make_board()
    empty(board["tasks"]["dmlab"])
    part = board["tasks"]["kitti_distance"]
    part["rows"] = [row for row in part["rows"] if row["stage"] != "scratch"]
    part["missing"] = 3
    ours = by_name(board)
    line = ours["All prompts (100 %)"]
    averages = line["averages"]
    assert averages["natural"]["n"] == 2
    for key in ("structured", "mean_tasks", "mean_groups"):
        assert averages[key] is None
    assert line["tasks_in"] == 18
    # 17 tasks are complete; all is averaged over these, published numbers too.
    whole = set(published.VTAB) - {"dmlab", "kitti_distance"}
    deep = by_name(board, ours=False)["VPT-Deep"]["averages"]
    for found, values in (
        (averages, [line["tasks"][name]["mean"] for name in whole]),
        (deep, [BENCHMARKS[name].published.deep for name in whole]),
    ):
        assert found["mean_complete"]["mean"] == pytest.approx(np.mean(values))
    assert deep["mean_tasks"]["mean"] == pytest.approx(69.43, abs=0.006)
    scratch = ours["From scratch 50 %"]
    assert scratch["averages"]["mean_complete"] and scratch["prompts"] is not None
    text = markdown(board)
    for part in ("17 of 19 tasks are complete, 63 runs", "nothing yet of dmlab"):
        assert part in text
    for cell in ("Mean over 17 complete tasks", tables.DASH):
        assert f"| {cell} |" in text


def test_a_subset_is_called_so():
    def titles(*board):
        return [a.title for a in standings.averages(make_board(*board))]

    assert titles(NATURAL) == ["Mean over 7 tasks"]
    some = ["Natural", "Structured (1 of 8)", "Mean over 8 tasks"]
    assert titles((*NATURAL, "dmlab")) == some
    assert titles()[-2:] == ["Mean over 19 tasks", "Mean over 3 groups"]
    assert titles(published.FGVC, "fgvc") == ["Mean over 5 tasks"]


def test_diverged_runs_are_marked():
    board = make_board(NATURAL)
    row = board["tasks"]["dtd"]["rows"][1]
    assert row["stage"] == "tune"
    row.update(epochs=12)
    line = by_name(board)["All prompts (100 %)"]
    assert line["diverged"] == [{"task": "dtd", "seed": 42, "epochs": 12}]
    text = markdown(board)
    assert "All prompts (100 %) †" in text
    assert "† One run counts with the last epoch before" in text
    assert "on dtd, seed 42 (epoch 12)" in text
    assert text.count("†") == 4  # the note, two names, one accuracy
    # Rows that do not say their epochs got to the end.
    for key in ("epochs", "planned_epochs"):
        del row[key]
    assert "†" not in markdown(board)


def test_notes_say_what_is_comparable():
    board = make_board(NATURAL)
    said = markdown(board)
    for part in ("swept, chosen by", "is VTAB-1k's: 200 pictures", "as VPT did"):
        assert part in said
    board["backbone"].update(normalisation="half", variant="S/16")
    for task in board["tasks"].values():
        task["chosen"]["how"] = "published"
    board["tasks"]["dtd"]["chosen"]["how"] = "default"
    said = markdown(board)
    for part in (
        "without a sweep of ours (6 of 7 tasks)",
        "which favours its rows",
        "VPT normalised with ImageNet's",
        "Another model: they are no comparison.",
    ):
        assert part in said


def test_csv_holds_every_number():
    board = standings.canonical(make_board())
    rows = list(csv.DictReader(io.StringIO(tables.csv_text(board))))
    lines = lb.leaderboard(board)
    for row, line in zip(rows, lines, strict=True):
        assert (row["method"], row["source"]) == (line["method"], line["source"])
        values = {f"task_{name}": line["tasks"].get(name) for name in published.VTAB}
        for key, value in (values | line["averages"]).items():
            for part in ("mean", "sd", "n"):
                found, number = row[f"{key}_{part}"], value and value[part]
                assert (float(found) if found else None) == number  # exactly


def test_latex_is_balanced_and_escaped():
    bad = r"a_b%c&d#e$f{g}\h~i^j"
    board = make_board((*published.VTAB, bad))
    board["backbone"]["name"] = bad
    text = tables.latex(board, lb.title(board), lb.notes(board, lb.leaderboard(board)))
    ends = [("begin", "table*"), ("begin", "tabular")]
    ends += [("end", "tabular"), ("end", "table*")]
    assert re.findall(r"\\(begin|end)\{([a-z*]+)\}", text) == ends * 2
    for tabular in re.findall(r"\\begin\{tabular\}.*?\\end\{tabular\}", text, re.S):
        columns = re.match(r"\\begin\{tabular\}\{(l?r*)\}", tabular).group(1)
        rows = [row for row in tabular.splitlines() if row.endswith(r" \\")]
        assert len(rows) > 15
        for row in rows:
            assert len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1
    plain = re.sub(r"\\[&%$#_{}\\]", "", text.split("\n", 1)[1])
    assert plain.count("{") == plain.count("}")
    assert plain.count("$") % 2 == 0
    assert "#" not in plain
    assert not re.search(r"%(?!$)", plain, re.M)  # one ends a line on purpose
    escaped = r"a\_b\%c\&d\#e\$f\{g\}\textbackslash{}h\textasciitilde{}i"
    assert escaped in text


def test_figures_are_xml_and_the_same_every_time():
    board = make_board(NATURAL)
    lines = lb.leaderboard(board)
    first = board_figures.draw(board, lines)
    check_figures(first, ["board_accuracy", "board_tasks"])
    assert all("VPT-Deep, published" in svg for svg in first.values())
    assert board_figures.draw(board, lines) == first


def reversed_keys(value):
    if isinstance(value, dict):
        return {k: reversed_keys(value[k]) for k in reversed(value)}
    return [reversed_keys(v) for v in value] if isinstance(value, list) else value


def test_nothing_is_written_of_a_bad_board(tmp_path):
    board = make_board(NATURAL)
    board["tasks"]["dtd"]["rows"][0]["test_accuracy"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        lb.write(board, tmp_path)
    del board["tasks"]["dtd"]["group"]
    with pytest.raises(KeyError):
        lb.write(board, tmp_path)
    assert list(tmp_path.iterdir()) == []


def printed(board, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    file = io.StringIO()
    lb.print_table(board, file)
    text = file.getvalue()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= max(width, 100)
    return text


def test_table_is_plain_and_uses_the_room_that_there_is(monkeypatch):
    for names in (published.VTAB, ("mugs",)):
        narrow, wide = (printed(make_board(names), w, monkeypatch) for w in (80, 200))
        for text in (narrow, wide):
            assert "All prompts (100 %)" in text and "PC global 30 %" in text
            assert sum(line.startswith(names[0]) for line in text.splitlines()) == 1
        assert ("Specialized" in wide) == (len(names) > 1)
        assert "Specialized" not in narrow
        # What the best of ours is measured against.
        deep = [line for line in narrow.splitlines() if line.startswith("VPT-Deep")]
        assert ("69.43" in " ".join(deep)) == (len(names) > 1)
    ratios = tuple(i / 10 for i in range(1, 10))
    text = printed(make_board(NATURAL, ratios=ratios), 80, monkeypatch)
    (header,) = re.findall(r"^Task .*$", text, re.M)
    assert header.endswith("VPT-Deep")  # though some ratios had no room


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole board as written, one sweep with several numbers of prompts."""
    board = make_board()
    grid = board["tasks"]["dtd"]["grid"]
    grid += [entry | {"num_prompts": [5] * 12} for entry in grid[:3]]
    before, folder = copy.deepcopy(board), tmp_path_factory.mktemp("board")
    paths = lb.write(board, folder)
    suffixes = [".json", ".md", ".csv", ".tex", ".html"]
    assert [path.suffix for path in paths] == suffixes
    assert json.loads(paths[0].read_text()) == board == before
    return board, paths


def test_html_loads_nothing_and_says_everything(whole):
    board, paths = whole
    text = paths[-1].read_text()
    page = Page(text)
    assert page.tags.count("svg") == 2
    for part in ("69.43", "71.97", "73.94", "wizwand.com", board["command"], "0.9.0"):
        assert part in page.text
    assert page.tags.count("table") == 3 + 19
    # A row of the grid for each number of prompts, and one that was chosen.
    assert "prompts · wd" in text and "5 5 5 5 5 5 5 5 5 5 5 5 · 0.01" in text
    assert text.count('class="chosen"') == 19
    assert "<small>✕ 7</small>" in text  # diverged in the grid


def test_markdown_tables_are_whole(whole):
    text, widths = whole[1][1].read_text(), {}
    for heading, part in zip(
        *[iter(re.split(r"^## (.*)$", text, flags=re.M)[1:])] * 2, strict=True
    ):
        rows = [row for row in part.splitlines() if row.startswith("|")]
        widths[heading] = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert list(widths) == ["Averages", "Every task", "What was chosen"]
    assert all(len(width) == 1 for width in widths.values())
    assert "**" in text


def test_equal_boards_make_equal_files(whole, tmp_path):
    board, paths = whole
    other = reversed_keys(copy.deepcopy(board))
    assert other == board
    for task in other["tasks"].values():  # nor does the order of rows and grids matter
        task["rows"].reverse()
        task["grid"].reverse()
    for one, two in zip(paths[1:], lb.write(other, tmp_path)[1:], strict=True):
        assert one.name == two.name and one.read_bytes() == two.read_bytes()


def test_html_escapes_what_it_did_not_write():
    bad = "<script>alert('&')</script>"
    board = make_board(("dtd", bad), bad, seeds=(1,), ratios=(0.3,))
    board["command"] = board["backbone"]["name"] = board["backbone"]["variant"] = bad
    board["backbone"]["normalisation"] = bad
    board["tasks"][bad]["group"] = board["tasks"][bad]["chosen"]["how"] = bad
    board["versions"][bad] = bad
    for row in board["tasks"][bad]["rows"]:
        if row["score"] == "key_gate":
            row["score"] = bad
    texts = lb.render(board)
    assert bad in Page(texts["html"]).text
    assert "<script" not in texts["md"].replace("\\<", "")


def test_own_tasks_have_no_published_lines_and_one_seed_no_spread():
    board = make_board(("mugs", "cups"), "kitchen", seeds=(42,), ratios=(0.3,))
    assert by_name(board, ours=False) == {}
    for line in by_name(board).values():
        values = (*line["tasks"].values(), *line["averages"].values())
        assert all(v["sd"] is None and v["n"] == 1 for v in values)
    text = markdown(board)
    assert "kitchen leaderboard" in text and "Published rows" not in text
    assert "±" not in text.split("## What was chosen")[0].split("## Averages")[1]


def test_render_again(whole, tmp_path, capsys):
    texts = {path.name: path.read_bytes() for path in whole[1]}
    source = tmp_path / "leaderboard.json"
    source.write_bytes(texts["leaderboard.json"])
    command.main([str(tmp_path)])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == texts
    shown = capsys.readouterr().out
    assert "PC global 30 %" in shown and "leaderboard.html" in shown
    source.write_text("{}")
    assert "is not a leaderboard" in refused(capsys, tmp_path)
