# SPDX-License-Identifier: Apache-2.0
import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vpt_jax"
HEAVY = (
    "array_record",
    "tensorflow",
    "tensorflow_datasets",
    "orbax",
    "ml_collections",
    "matplotlib",
    "optax",
    "clu",
    "PIL",
    "safetensors",
    "tensorboardX",
)
# Arrows of import point down this list only. The library comes last.
ORDER = (
    "predict",
    "share",
    "serving",
    "pretrain",
    "studies.all",
    "studies.unlabelled",
    "studies.selection",
    "studies.selection_page",
    "studies.importance",
    "studies.importance_page",
    "studies.planted",
    "studies.gates",
    "studies.removal",
    "studies.ranks",
    "studies.masked",
    "studies.transfer",
    "studies.transfer_page",
    "studies.dense",
    "studies.prompts",
    "studies.cost",
    "studies.cost_page",
    "studies.cost_figures",
    "studies.cost_result",
    "studies.inference",
    "studies.rank",
    "studies.rank_page",
    "studies.growth",
    "studies.spectra",
    "studies.study",
    "main",
    "search",
    "benchmark",
    "launch",
    "jobs",
    "protocol",
    "benchmark_config",
    "experiment",
    "report",
    "leaderboard",
    "board.page",
    "board.figures",
    "board.notes",
    "board.tables",
    "board.standings",
    "board.published",
    "page",
    "formats",
    "figures",
    "cautions",
    "rows",
    "stages",
    "fitting",
    "probe",
    "cli",
    "preemption",
    "config",
    "classifier",
    "train",
    "data.__main__",
    "data.listing",
    "data.check",
    "data.builders",
    "data.nabirds",
    "data.tasks",
    "data.folder",
    "data.npz",
    "data.lists",
    "data.layouts",
    "data.cub",
    "data.found",
    "data.doubts",
    "data.prepared",
    "data.vtab",
    "data.labels",
    "data.records",
    "data.pictures",
    "data.colours",
    "data.bounds",
    "data.cache",
    "data.scenes",
    "data.shapes",
    "data.strips",
    "data.augment",
    "states",
    "workdir",
    "checkpoint",
    "release",
    "facts",
    "matching",
    "families",
    "naming",
    "sidecar",
    "shards",
    "remote",
    "durable",
    "readers",
    "torch_files",
    "backbones",
    "macs",
    "intercept",
    "tokens",
    "condense",
    "parallel",
    "models.swin",
    "models.windows",
    "models.vit",
    "models.inputs",
    "models.layers",
    "models.attention",
    "models.posemb",
    "models.variants",
    "prompts",
    "checks",
    "models.xla",
    "messages",
)
LIBRARY = ORDER[ORDER.index("checkpoint") :]
LIBRARY_MAY_IMPORT = {"jax", "flax", "numpy", "jaxtyping", "vpt_jax"}


def files():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            yield name, ast.parse(path.read_text())


FILES = list(files())


def imported(nodes):
    """Module names of the import statements among `nodes`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_importing_the_library_loads_nothing_heavy():
    code = (
        "import sys, vpt_jax\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])\n"
        "print([m for m in sys.modules if m.startswith('vpt_jax.')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    heavy, own = map(ast.literal_eval, done.stdout.splitlines())
    assert heavy == []
    assert set(own) == {f"vpt_jax.{m}" for m in LIBRARY} | {"vpt_jax.models"}


def test_every_module_has_its_place():
    assert {name for name, _ in FILES} == set(ORDER)


@pytest.mark.parametrize(("name", "tree"), FILES, ids=[name for name, _ in FILES])
def test_imports_point_down(name, tree):
    for module in imported(ast.walk(tree)):
        own = module.removeprefix("vpt_jax.")
        if module.startswith("vpt_jax.") and own in ORDER:
            assert ORDER.index(own) > ORDER.index(name), f"{name} imports {module}"


@pytest.mark.parametrize(("name", "tree"), FILES, ids=[name for name, _ in FILES])
def test_the_library_imports_only_jax_flax_numpy_and_jaxtyping(name, tree):
    if name not in LIBRARY:
        return
    allowed = LIBRARY_MAY_IMPORT | set(sys.stdlib_module_names)
    found = {module.split(".")[0] for module in imported(tree.body)}
    assert found <= allowed, f"{name} imports {found - allowed} at the top"
