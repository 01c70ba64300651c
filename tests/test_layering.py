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
# Arrows of import point down this list only: a room or a module at the top is a line.
ORDER = (
    "predict",
    "serve",
    "main",
    "bench",
    "run",
    "report",
    "train",
    "data",
    "weights",
    "intercept",
    "condense",
    "macs",
    "models",
    "prompts",
    "files",
    "parallel",
)
# What `import vpt_jax` may load, of those rooms; above them is the command.
LIBRARY = ORDER[ORDER.index("weights") :]
# Of `files`, for commands: not loaded with the library.
COMMANDS = ("files.cli", "files.states", "files.workdirs", "weights.__main__")
LIBRARY_MAY_IMPORT = {"jax", "flax", "numpy", "jaxtyping", "vpt_jax"}


def files():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            yield name, ast.parse(path.read_text())


FILES = list(files())


def room(name):
    return name.split(".")[0]


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
    assert {module.split(".")[1] for module in own} <= set(LIBRARY)


def test_every_room_has_its_place():
    assert {room(name) for name, _ in FILES} == set(ORDER)
    tops = [path.stem for path in PACKAGE.glob("*.py")]
    assert len(tops) <= 9  # eight modules, and `__init__`


@pytest.mark.parametrize(("name", "tree"), FILES, ids=[name for name, _ in FILES])
def test_imports_point_down(name, tree):
    for module in imported(ast.walk(tree)):
        own = module.removeprefix("vpt_jax.").split(".")[0]
        if module.startswith("vpt_jax.") and own in ORDER and own != room(name):
            down = ORDER.index(own) > ORDER.index(room(name))
            assert down, f"{name} imports {module}"


def test_no_room_is_a_circle():
    """Within a room too no module needs itself by way of others."""
    needs = {}
    for name, tree in FILES:
        found = {module.removeprefix("vpt_jax.") for module in imported(tree.body)}
        needs[name] = found & {other for other, _ in FILES}
    while needs:
        free = [name for name, others in needs.items() if not others & set(needs)]
        assert free, f"a circle among {sorted(needs)}"
        for name in free:
            del needs[name]


@pytest.mark.parametrize(("name", "tree"), FILES, ids=[name for name, _ in FILES])
def test_the_library_imports_only_jax_flax_numpy_and_jaxtyping(name, tree):
    if room(name) not in LIBRARY or name in COMMANDS:
        return
    allowed = LIBRARY_MAY_IMPORT | set(sys.stdlib_module_names)
    found = {module.split(".")[0] for module in imported(tree.body)}
    assert found <= allowed, f"{name} imports {found - allowed} at the top"
