# SPDX-License-Identifier: Apache-2.0
"""What the package cannot do: run what a file says, ask the network, write anywhere."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import QUICK, save_small_backbone
from fuzzing import ROOT

PACKAGE = ROOT / "vpt_jax"
# Modules that execute what they read, or start programs.
NEVER = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
NEVER |= {"yaml", "code", "runpy", "imp", "ctypes", "subprocess", "xmlrpc"}
NETWORK = {"urllib", "http", "socket", "ssl", "requests", "httpx", "aiohttp", "ftplib"}
NETWORK |= {"smtplib", "telnetlib", "fsspec", "gcsfs", "huggingface_hub", "wandb"}
CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
METHODS = {"allow_pickle", "system", "popen", "load_module", "exec_module"}


TREES = {}
for path in sorted(PACKAGE.rglob("*.py")):
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    TREES[name] = ast.parse(path.read_text())


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", TREES)
def test_nothing_runs_what_a_file_says(name):
    tree = TREES[name]
    assert not set(imports(tree)) & NEVER
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name):
            assert called.id not in CALLS, f"{name}:{node.lineno} {called.id}"
        if isinstance(called, ast.Attribute):
            assert called.attr not in METHODS, f"{name}:{node.lineno} {called.attr}"
            if called.attr == "load" and ast.unparse(called) in (
                "np.load",
                "numpy.load",
            ):
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert given.get("allow_pickle") == "False", f"{name}:{node.lineno}"
        for keyword in node.keywords:
            if keyword.arg in ("allow_pickle", "shell"):
                assert ast.unparse(keyword.value) == "False", f"{name}:{node.lineno}"


def test_only_one_module_knows_the_network():
    """For a checkpoint's address that the user gave. (`data prepare` is tfds.)"""
    asking = [name for name, tree in TREES.items() if set(imports(tree)) & NETWORK]
    assert asking == ["weights.remote"]


# Runs before the package is imported, in a process of its own.
WATCHED = """
import json, os, sys
written, asked = [], []
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        asked.append(repr(args[1:] if event == "socket.connect" else args))
        raise OSError("the network is cut")
    if event == "open":
        path, mode, flags = args
        if isinstance(path, (str, bytes)) and (flags or 0) & (
            os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        ):
            written.append(os.path.abspath(os.fsdecode(path)))
    elif event in FOLDERS:
        for path, fd in zip(*FOLDERS[event](args)):
            if isinstance(path, (str, bytes)):
                # rmtree names files relative to an open folder
                at = os.readlink(f"/proc/self/fd/{fd}") if fd >= 0 else os.getcwd()
                written.append(os.path.normpath(os.path.join(at, os.fsdecode(path))))
FOLDERS = {
    "os.mkdir": lambda a: (a[:1], a[2:]),
    "os.remove": lambda a: (a[:1], a[1:]),
    "os.rmdir": lambda a: (a[:1], a[1:]),
    "os.chmod": lambda a: (a[:1], a[2:]),
    "os.truncate": lambda a: (a[:1], [-1]),
    "os.rename": lambda a: (a[:2], a[2:]),
    "os.link": lambda a: (a[:2], a[2:]),
    "os.symlink": lambda a: (a[1:2], a[2:]),
}
sys.addaudithook(watch)
"""
RUN = """
import runpy
target = sys.argv.pop()
try:
    runpy.run_module("vpt_jax.main", run_name="__main__", alter_sys=True)
finally:
    found = {"written": sorted(set(written)), "asked": asked}
    open(target, "w").write(json.dumps(found))
"""


def test_a_run_asks_no_network_and_writes_in_workdir_and_cache_alone(tmp_path):
    """The whole smoke run; what it opens to write is seen by Python's audit events.

    Writes of C++ libraries are not; Orbax's are all under the workdir's checkpoints.
    TensorFlow is made impossible to import; the run must not notice.
    """
    home, temp, trap = (tmp_path / name for name in ("home", "temp", "trap"))
    for folder in (home, temp, trap):
        folder.mkdir()
    (trap / "tensorflow.py").write_text("raise ImportError('TensorFlow was used')")
    checkpoint = save_small_backbone(tmp_path / "w.safetensors", "demo/16")
    # Threads give themselves names in /proc.
    allowed = [tmp_path / "out", tmp_path / "cache", temp]
    allowed += [Path("/dev/null"), Path("/proc/self")]
    found = tmp_path / "found.json"
    others = ("XDG", "JAX_C")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(others)}
    done = subprocess.run(
        [
            *(sys.executable, "-B", "-c", WATCHED + RUN),
            "--config=configs/demo.py:digits,smoke",
            "--config.backbone.variant=demo/16",
            f"--config.backbone.checkpoint={checkpoint}",
            "--config.tune.epochs=2",
            "--config.condense.scopes=('layer',)",
            "--config.baselines=()",
            f"--workdir={tmp_path / 'out'}",
            str(found),
        ],
        cwd=ROOT,
        env={
            **kept,
            "PYTHONPATH": os.pathsep.join((str(trap), str(ROOT))),
            "HOME": str(home),
            "TMPDIR": str(temp),
            "VPT_JAX_CACHE": str(tmp_path / "cache"),
            "JAX_NUM_CPU_DEVICES": "1",
            **QUICK,
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "PC layer 30 %" in done.stdout
    assert f"report: {tmp_path / 'out' / 'report.html'}" in done.stdout
    watched = json.loads(found.read_text())
    assert watched["asked"] == []
    elsewhere = [
        path
        for path in watched["written"]
        if not any(Path(path).is_relative_to(place) for place in allowed)
        and Path(path) != found
    ]
    assert not elsewhere, "\n".join(elsewhere)
    assert any("out/report.json" in path for path in watched["written"])
    left = {p.name for p in home.rglob("*") if p.is_file()}
    assert not left, left


def test_dependencies_are_bounded_and_locked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = (ROOT / ".ci" / "requirements.lock").read_text()
    pins = dict(re.findall(r"^([a-z0-9][\w.-]*)==(\S+)", lock, re.MULTILINE))
    assert "-r " not in lock and "://" not in lock
    tested = project["optional-dependencies"]["test"]
    for requirement in project["dependencies"] + tested:
        name = re.match(r"[\w-]+", requirement)[0]
        normal = name.lower().replace("_", "-")
        assert normal in pins, f"{name} is not in the lock: run .ci/lock"
        if requirement in project["dependencies"]:
            assert re.search(r">=[\d.]+,<\d", requirement), requirement
            low, high = re.search(r">=([\d.]+),<([\d.]+)", requirement).groups()
            pinned = _version(pins[normal])
            assert _version(low) <= pinned < _version(high), (requirement, pinned)


def _version(text):
    return tuple(int(n) for n in re.findall(r"\d+", text)[:3])


def test_ci_installs_with_the_lock_and_weekly_without():
    assert "-c .ci/requirements.lock" in (ROOT / ".ci" / "run").read_text()
    assert "requirements.lock" not in (ROOT / ".ci" / "newest").read_text()
    weekly = (ROOT / ".github" / "workflows" / "weekly.yml").read_text()
    assert "cron:" in weekly
    assert all(f".ci/{name}" in weekly for name in ("newest", "slow", "audit"))
