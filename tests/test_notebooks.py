# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from top to bottom and show what they say; git has no outputs."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

import vpt_jax

ROOT = Path(__file__).parent.parent
RENDERED = ROOT / "docs" / "notebooks"
TIMEOUT = 240  # seconds a cell may take; the whole notebook takes about 90 alone
FIGURES = {
    "condense_and_look": 5,
    "prompt_a_foreign_model": 3,
    "prompt_your_vit": 4,
    "your_pictures": 5,
}
ALLOWED = {
    "flax.linen",
    "flax.traverse_util",
    "jax",
    "jax.numpy",
    "matplotlib.pyplot",
    "numpy",
    "optax",
    "PIL",
    "vpt_jax",
    "vpt_jax.data.tasks",
    *sys.stdlib_module_names,
}
CHANCE = 10.0  # ten digits, in %


def load_renderer():
    path = ROOT / "docs" / "render_notebooks.py"
    spec = importlib.util.spec_from_file_location("render_notebooks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


renderer = load_renderer()
every_notebook = pytest.mark.parametrize("name", FIGURES)


def code(notebook):
    """The code cells as Python: IPython's magics become function calls."""
    transform = TransformerManager().transform_cell
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [ast.parse(transform(cell.source)) for cell in cells]


def walk(trees):
    return [node for tree in trees for node in ast.walk(tree)]


def test_these_are_all_notebooks():
    assert set(renderer.names()) == set(FIGURES)


@every_notebook
def test_git_holds_no_outputs(name):
    notebook = renderer.read(name)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.metadata
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@every_notebook
def test_a_notebook_is_short_and_starts_by_installing(name):
    notebook = renderer.read(name)
    assert len(notebook.cells) < 25
    assert notebook.cells[0].cell_type == "markdown"
    trees = code(notebook)
    first = trees[0].body
    # Imports, where from, and one `if` around the only magic of the notebook.
    kinds = [type(node) for node in first]
    assert kinds == [ast.Import, ast.Import, ast.Import, ast.Assign, ast.If]
    assert ast.unparse(first[-1].test) == "'google.colab' in sys.modules"
    magics = [n for n in walk(trees) if is_call_of(n, "run_line_magic")]
    assert len(magics) == 1
    assert magics[0] in ast.walk(first[-1])
    assert "jax.devices()" in notebook.cells[2].source
    assert notebook.cells[1].source == renderer.read("prompt_your_vit").cells[1].source


@pytest.mark.parametrize(
    ("driver", "extras"),
    [
        ("", "serve"),
        ("| Driver Version: 550.1   CUDA Version: 12.4 |", "serve,cuda12"),
        ("| Driver Version: 600.1   CUDA Version: 13.0 |", "serve,cuda13"),
    ],
)
def test_on_colab_the_extra_is_that_of_the_driver(driver, extras, monkeypatch):
    (install, *_) = code(renderer.read("prompt_your_vit"))
    program = compile(install, "install", "exec")
    said = subprocess.CompletedProcess((), 0, driver)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: said)
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    called = []
    shell = types.SimpleNamespace(run_line_magic=lambda *words: called.append(words))
    names = {"get_ipython": lambda: shell}
    with pytest.raises(ValueError, match="set SOURCE above to the repository"):
        exec(program, names)
    assert not called
    install.body[-2].value = ast.Constant("git+https://x/y")
    exec(compile(ast.fix_missing_locations(install), "install", "exec"), names)
    ((magic, words),) = called
    assert magic == "pip"
    assert words.format(**names) == (
        f'install --quiet "vpt_jax[{extras}] @ git+https://x/y"'
    )


def is_call_of(node, name):
    return isinstance(node, ast.Call) and getattr(node.func, "attr", "") == name


@every_notebook
def test_only_public_names_are_used(name):
    nodes = walk(code(renderer.read(name)))
    modules, names = set(), set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "vpt_jax":
            assert node.attr in (*vpt_jax.__all__, "__version__")
    assert modules <= ALLOWED, modules - ALLOWED
    ours = {n for n in names if n.startswith("vpt_jax")}
    assert ours <= {"vpt_jax.data.tasks.load_task"}


# What a reader is told, as an expression that is evaluated after the last cell.
FACTS = {
    "condense_and_look": """{
        "results": results,
        "curve": curves["over all layers"],
        "counts": vpt_jax.counts(finetuned["prompts"]),
        "by_layer": [int(m.sum()) for m in by_layer],
        "share": {k: [float(x) for x in v[0]] for k, v in shares.items()},
        "kept": [
            float(maps[0][..., own].sum())
            for maps, own in ((before, kept[0]), (patch_maps(condensed), slice(None)))
        ],
    }""",
    "prompt_a_foreign_model": """{
        "apart": float(apart),
        "gaps": [float(jnp.abs(gap).max()) for gap in gaps.values()],
        "gradients": sorted(grads),
        "norms": norms,
        "untouched": untouched,
        "losses": [float(losses[:10].mean()), float(losses[-10:].mean())],
        "test": test,
        "counts": number,
        "back": int(back.sum()),
    }""",
    "prompt_your_vit": """{
        "losses": [float(losses[:10].mean()), float(losses[-10:].mean())],
        "test": test,
        "number": number,
        "saved": loaded.header["counts"],
        "counts": vpt_jax.counts(finetuned["prompts"]),
        "agree": agree,
        "head_stayed": all(
            (finetuned["head"][n] == tuned["head"][n]).all().item()
            for n in ("kernel", "bias")
        ),
    }""",
    "your_pictures": """{
        "accuracy": 100 * looks["accuracy"],
        "classes": [len(paths) for paths in classes.values()],
        "kept": [same, kept],
        "answers": [classifier.class_names.index(label) for label in labels],
        "sensitivity": [float(s.min()) for s in scores["sensitivity"]],
    }""",
}
# Fewer pictures and epochs: as it is, a notebook takes minutes.
SHORTER = {
    "EPOCHS = 10, 8": "EPOCHS = 10, 4",
    "NUM_TRAIN = 400": "NUM_TRAIN = 200",
    "tune.epochs=6": "tune.epochs=2",
    "FLAGS = [": "FLAGS = ['--config.search.rates=(0.03,)',",
}


def check_condense_and_look(facts, text):
    results = facts["results"]
    # The same network; a picture on the border of two classes may change sides.
    assert abs(results["masked"] - results["condensed"]) < 0.3
    assert facts["curve"][0] == results["all"] > 5 * CHANCE
    assert results["fine-tuned"] > max(results["condensed"], 4 * CHANCE)
    assert sum(facts["counts"]) == 18  # 30 % of 6 x 10
    assert facts["by_layer"] == [3] * 6
    for i, n in enumerate(facts["counts"]):
        for name in ("condensed", "condensed, tuned"):
            assert (facts["share"][name][i] > 0) == (n > 0)
    # The first layer's tokens are the same: fewer keys, more attention for each.
    assert facts["counts"][0] and facts["kept"][0] < facts["kept"][1]


def check_prompt_a_foreign_model(facts, text):
    assert facts["apart"] < 1e-5
    empty, against_ours, moved = facts["gaps"]
    assert max(empty, against_ours) < 1e-5 < 0.01 < moved
    assert "no block was reached" in text
    assert facts["gradients"] == ["head", "prompts"]
    assert min(facts["norms"]) > 0.01
    assert facts["untouched"]
    assert facts["losses"][1] < facts["losses"][0] / 2
    assert sum(facts["counts"]["all prompts"]) == 36
    assert sum(facts["counts"]["condensed, tuned"]) == 11  # 30 %
    test = facts["test"]
    assert test["all prompts"] > 5 * CHANCE
    assert test["condensed, tuned"] > max(test["condensed"], 3 * CHANCE)
    assert facts["back"] > 0


def check_prompt_your_vit(facts, text):
    assert facts["losses"][1] < facts["losses"][0] / 2
    test, number = facts["test"], facts["number"]
    assert number["condensed"] == number["condensed,\nfine-tuned"] == 18
    assert number["all prompts"] == 60
    assert test["all prompts"] > 5 * CHANCE
    assert test["condensed,\nfine-tuned"] > max(test["condensed"], 4 * CHANCE)
    assert facts["saved"] == facts["counts"]
    assert facts["agree"]
    assert facts["head_stayed"]
    assert "same answers: True" in text


def check_your_pictures(facts, text):
    assert sum(facts["classes"]) == 600 and len(facts["classes"]) == 10
    assert facts["accuracy"] > 3 * CHANCE
    same, kept = facts["kept"]
    assert 0 < same <= kept == 9  # 30 % of 6 x 5
    assert min(facts["sensitivity"]) > 0
    assert f"{facts['answers']} False" in text  # of JAX alone
    assert "the same answers: True" in text
    assert "['README.md', 'config.json', 'prompts.safetensors']" in text


CHECKS = {
    "condense_and_look": check_condense_and_look,
    "prompt_a_foreign_model": check_prompt_a_foreign_model,
    "prompt_your_vit": check_prompt_your_vit,
    "your_pictures": check_your_pictures,
}


@pytest.mark.parametrize(
    "name",
    [  # a minute and a half each: two at every push, the others weekly
        "prompt_your_vit",
        "your_pictures",
        pytest.param("prompt_a_foreign_model", marks=pytest.mark.slow),
        pytest.param("condense_and_look", marks=pytest.mark.slow),
    ],
)
def test_a_notebook_runs_and_shows_what_it_says(name, tmp_path):
    notebook = renderer.read(name)
    for cell in notebook.cells:
        for long, short in SHORTER.items():
            cell.source = cell.source.replace(long, short)
    ask = f"import json\nprint(json.dumps({FACTS[name]}))"
    notebook.cells.append(nbformat.v4.new_code_cell(ask))
    renderer.execute(notebook, tmp_path, TIMEOUT)
    facts = json.loads(notebook.cells.pop().outputs[0].text)
    assert list(tmp_path.iterdir()) == []  # nothing is left beside a notebook

    drawn = renderer.figures(notebook)
    assert len(drawn) == FIGURES[name]
    text, files = renderer.to_markdown(name, notebook)
    assert len(files) == FIGURES[name]
    for number, (cell, png) in enumerate(drawn, start=1):
        assert png.startswith(b"\x89PNG")
        assert f"![{renderer.alt_text(cell.source)}]({name}_{number}.png)" in text
    assert "CpuDevice(id=0)]" in text  # one device, as on a reader's machine
    CHECKS[name](facts, text)


@every_notebook
def test_the_rendered_copy_is_of_this_notebook(name):
    text = (RENDERED / f"{name}.md").read_text(encoding="utf-8")
    place = 0
    for cell in renderer.read(name).cells:
        place = text.find(cell.source, place)
        assert place >= 0, f"run docs/render_notebooks.py; not there: {cell.source}"
        place += len(cell.source)


def test_rendered_figures_are_small_and_all_shown():
    shown = []
    for name in FIGURES:
        text = (RENDERED / f"{name}.md").read_text(encoding="utf-8")
        shown += re.findall(r"!\[[^]]+\]\((.+)\)", text)
        assert len(re.findall(r"!\[", text)) == FIGURES[name]
    files = {path.name: path.stat().st_size for path in RENDERED.glob("*.png")}
    assert set(shown) == set(files)
    assert max(files.values()) < 150_000
    assert sum(files.values()) < 1_200_000


def test_a_figure_without_words_is_an_error():
    assert renderer.alt_text("x = 1\n# Figure: a line.\nplot(x)") == "a line."
    with pytest.raises(ValueError, match="expected one, for those who cannot"):
        renderer.alt_text("plot(x)")
