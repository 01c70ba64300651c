# SPDX-License-Identifier: Apache-2.0
"""Rows of `accelerator.py` that are no program's time alone.

Whether a device computes what it should, the command on it, where a step's time goes,
what a trial of the protocol takes, and a process's start.
"""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import roofline
from accelerator_rows import (
    TINY,
    Context,
    Row,
    Sizes,
    clock,
    inputs,
    model_of,
    program,
    steps_of,
    torch_device,
    work,
)

import vpt_jax
from vpt_jax import train
from vpt_jax.bench import protocol
from vpt_jax.data.public.vtab import BENCHMARKS, NUM_TRAIN, NUM_VAL, part_runs
from vpt_jax.run import experiment

ROOT = Path(__file__).parent.parent
# dtype, precision of products, formulation, option; how far logits and gradients may be
# from float64's, as parts of their length.
CASES: dict[str, tuple] = {
    "float32": ("float32", "highest", "kv", "", 1e-4, 1e-3),
    "float32, tokens": ("float32", "highest", "tokens", "", 1e-4, 1e-3),
    "float32, default precision": ("float32", None, "kv", "", 0.02, 0.1),
    "bfloat16": ("bfloat16", None, "kv", "", 0.05, 0.2),
    "bfloat16, cudnn": ("bfloat16", None, "kv", "cudnn", 0.05, 0.2),
}
MASKED, PEER = "masked as removed", "float32, PyTorch"


@functools.partial(jax.jit, static_argnames=("model", "formulation"))
def logits_and_gradients(
    backbone: Any,
    trainable: Any,
    batch: Any,
    mask: Any,
    *,
    model: Any,
    formulation: str,
) -> tuple[jax.Array, Any]:
    def loss(prompts: Any) -> tuple[jax.Array, jax.Array]:
        images = train.normalise(batch["image"], "half").astype(model.dtype)
        features, _ = model.apply(
            {"params": backbone},
            images,
            prompts=prompts,
            prompt_mask=mask,
            formulation=formulation,
        )
        logits = vpt_jax.apply_head(trainable["head"], features)
        return vpt_jax.cross_entropy(logits, batch).mean(), logits

    grads, logits = jax.grad(loss, has_aux=True)(trainable["prompts"])
    return logits, grads


@functools.cache
def reference(row: Row) -> tuple[Any, Any]:
    """Logits and gradients in float64 on the host."""
    given = inputs(row)
    trees = given.backbone, roofline.trainable_of(given, row.prompts), given.batch
    trees = jax.tree.map(np.asarray, trees)
    model = given.model.clone(dtype=jnp.float64, param_dtype=jnp.float64)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        *wide, batch = jax.tree.map(
            lambda x: jnp.asarray(x, np.float64 if x.dtype == np.float32 else x.dtype),
            trees,
        )
        found = logits_and_gradients(*wide, batch, None, model=model, formulation="kv")
        return jax.tree.map(np.asarray, found)


def apart(ours: Any, theirs: Any) -> float:
    """How far two trees of arrays are from each other, as a part of their length."""
    a, b = (
        np.concatenate(
            [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
        )
        for tree in (ours, theirs)
    )
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def correct(row: Row, context: Context) -> dict[str, Any]:
    """How far the device is from the host's float64; `right` says if it is near."""
    dtype, precision, formulation, option, *limits = CASES.get(
        row.what, CASES["float32"]
    )
    given = inputs(row._replace(dtype=dtype, option=option))
    trainable = roofline.trainable_of(given, row.prompts)
    run = functools.partial(
        logits_and_gradients, model=given.model, formulation=formulation
    )
    expected = None if row.what == MASKED else reference(row._replace(what="", who=""))
    with jax.default_matmul_precision(precision or "default"):
        if row.what == MASKED:
            mask = tuple(jnp.arange(len(p)) % 3 == 0 for p in trainable["prompts"])
            kept = vpt_jax.condense(trainable["prompts"], mask)
            small = {**trainable, "prompts": kept}
            expected = run(given.backbone, small, given.batch, None)
            logits, grads = run(given.backbone, trainable, given.batch, mask)
            grads = vpt_jax.condense(grads, mask)
        elif row.what == PEER:
            logits, grads = peer_results(given, trainable)
        else:
            logits, grads = run(given.backbone, trainable, given.batch, None)
    off = [apart(a, b) for a, b in zip((logits, grads), expected, strict=True)]
    right = all(a < limit for a, limit in zip(off, limits, strict=True))
    return {"logits": off[0], "gradients": off[1], "limits": limits, "right": right}


def peer_results(given: roofline.Inputs, trainable: Any) -> tuple[Any, Any]:
    torch, device = torch_device()
    import peers

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    net = peers.TokenViT(given.model, jax.tree.map(np.asarray, given.backbone)).eval()
    images = np.asarray(train.normalise(given.batch["image"], "half"))
    labels = np.asarray(given.batch["label"])
    infer, _, gradient = peers.torch_programs(net, trainable, images, labels, device)
    return infer().cpu().numpy(), gradient()


def command(row: Row, context: Context) -> dict[str, Any]:
    """The demo by the command, or the tests that a device may change, as processes."""
    device = jax.default_backend().replace("gpu", "cuda")
    where = {"JAX_PLATFORMS": "cpu" if device == "cpu" else f"{device},cpu"}
    if row.what == "demo":
        out = context.folder / "demo"
        words = ["vpt_jax.main", "--config=configs/demo.py:smoke", f"--workdir={out}"]
        words += context.sizes.demo
    else:
        where["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
        words = ["pytest", "-q", "-o", "addopts=", "-o", "filterwarnings="]
        words += ["-m", "not slow", "-p", "no:cacheprovider", *context.sizes.tests]
    code, text, took = process([sys.executable, "-m", *words], where, context)
    right = code == 0 and (row.what != "demo" or (out / "report.html").exists())
    return {"right": right, "code": code, "seconds": took, "end": text[-2000:]}


def process(words: list[str], more: dict[str, str], context: Context) -> tuple:
    """Exit code, output and seconds of a process that ends before the time is over."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    start = time.perf_counter()
    done = subprocess.run(
        words,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=max(1.0, context.left()),
    )
    return done.returncode, done.stdout, time.perf_counter() - start


KINDS = {
    "attention kernel": r"fmha|flash|cudnn.*sdpa",
    "product": r"gemm|cutlass|cublas|nvjet|xmma|dot|matmul|ynn",
    "convolution": r"conv(?!ert)",
    "copy": r"copy|transpose|memcpy|memset|bitcast|concatenate|slice|pad",
    "reduction": r"reduce",
    "elementwise": r"fusion|add|multiply|tanh|exp|erf|divide|subtract|convert",
}


def profile(row: Row, context: Context) -> dict[str, Any]:
    """Where the time of a training step goes, by XLA's own trace of the device."""
    ready = program(row)
    jax.block_until_ready(ready.run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(ready.run())
        (path,) = Path(folder).rglob("*.xplane.pb")
        names = Counter()
        for name, duration in events(jax.profiler.ProfileData.from_file(str(path))):
            names[re.sub(r"[.\d]+$", "", name)] += duration
    total, kinds = sum(names.values()), Counter()
    for name, duration in names.items():
        kinds[kind_of(name)] += duration
    scale = 1e6 * steps_of(row)
    return {
        "ms_a_step": total / scale,
        "kinds": {k: round(v / total, 4) for k, v in kinds.most_common()},
        "largest": [[k[:120], v / scale, v / total] for k, v in names.most_common(20)],
    }


def kind_of(name: str) -> str:
    found = (kind for kind, words in KINDS.items() if re.search(words, name.lower()))
    return next(found, "other")


def events(data: Any) -> Iterator[tuple[str, float]]:
    """Operations of the device, name and nanoseconds; none that contains others."""
    planes = [p for p in data.planes if p.name.startswith("/device:")]
    for plane in planes or data.planes:
        lines = list(plane.lines)
        ops = [line for line in lines if line.name == "XLA Ops"]  # of a TPU
        streams = [line for line in lines if line.name.startswith("Stream")]
        for line in ops or streams or lines:
            for event in line.events:
                known = bool(planes) or "hlo_op" in dict(event.stats)
                if known and not re.match(r"while|call|conditional", event.name):
                    yield event.name, event.duration_ns


def trial_program(row: Row, sizes: Sizes) -> roofline.Program:
    """An epoch of one trial, at a rate of 0."""
    n = sizes.pictures
    given, recipe = inputs(row), train.Recipe()
    side = given.model.image_size
    pictures = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), np.uint8)
    order, real = train.epoch_order(0, 0, n, row.batch)
    trainable = roofline.trainable_of(given, row.prompts)
    state, function = train.init_state(trainable, recipe), train.train_epoch
    rates, decay = jnp.zeros(len(order)), jnp.float32(0)
    rest = (given.backbone, jnp.asarray(pictures), jnp.arange(n) % 10, order, real)
    rest = (*rest, rates, decay, jax.random.key(0))
    static = {"model": given.model, "recipe": recipe}
    ready = roofline.compiled(row.name, (), work(row), function, state, *rest, **static)
    held = [state]

    def run() -> Any:
        held[0], metrics = ready.compiled(held[0], *rest)
        return metrics

    return ready._replace(run=run)


def trials(row: Row, context: Context) -> dict[str, Any]:
    """A VTAB task at its published sizes: seconds of an epoch, trials an hour."""
    ready = trial_program(row, context.sizes)
    epoch = clock(ready.run, jax.block_until_ready, context.sizes.budget)["s"]
    pictures = context.sizes.pictures
    rate = work(row)[0] * pictures / epoch
    return {
        "epoch_s": epoch,
        "ms_a_picture": 1000 * epoch / pictures,
        "trials_an_hour": 36 / epoch,
        "sweep_hours": sweep_flop(model_of(row)) / rate / 3600,
        "compile_s": ready.compile_seconds,
    }


@functools.cache
def sweep_flop(model: vpt_jax.ViT) -> float:
    """Least FLOP of VTAB-1k's whole protocol: trials, last runs, tests."""
    path, total = ROOT / "configs" / "vtab.py", 0.0
    spec = importlib.util.spec_from_file_location("vtab", path)
    config = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(config)

    @functools.cache
    def train_macs(n: int, batch: int) -> float:
        return roofline.least_training_macs(model, (n,) * model.depth, batch)

    @functools.cache
    def forward(n: int) -> float:
        return vpt_jax.macs(model, (n,) * model.depth)

    for job in protocol.planned(protocol.parse(config.get_config())):
        own, last = job.config, job.kind == "final"
        test = part_runs(BENCHMARKS[job.task])["test"]
        tested = test.stop - test.start if last else NUM_VAL
        learned = NUM_TRAIN + NUM_VAL if last else NUM_TRAIN
        for unit in experiment.plan(own):
            all_of_them = own.prompts.num_prompts
            # Of each layer the mean; not none, or nothing would be differentiated.
            n = max(1, round(all_of_them * unit.keep_ratio))
            stage = {"tune": own.tune, "scratch": own.tune, "finetune": own.finetune}
            if job.kind == "linear" or unit.stage == "linear":
                total += (learned + tested) * forward(0)
                continue
            if unit.stage in stage:
                at = stage[unit.stage]
                total += at.epochs * learned * train_macs(n, at.batch_size)
            else:  # condense: the score of all, as much as a step
                total += learned * train_macs(all_of_them, own.score.batch_size)
            total += tested * forward(n)
    return 2 * total


def start(row: Row, context: Context) -> dict[str, Any]:
    """A process with one training program, before and after it is kept on disk."""
    found: dict[str, Any] = {}
    words = [sys.executable, str(Path(__file__).parent / "accelerator.py"), "--parts"]
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("cold", "warm"):
            out = Path(folder) / kind
            more = {"JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "xla")}
            tail = ["--out", str(out), f"--minutes={context.left() / 60}"]
            tail += ["--tiny"] if row.variant == TINY else []
            code, text, took = process([*words, "first", *tail], more, context)
            if code:
                raise RuntimeError(f"the process ended with {code}: {text[-500:]}")
            (first,) = json.loads((out / "results.json").read_text())["rows"].values()
            found |= {f"{kind}_s": took, f"{kind}_compile_s": first["compile_s"]}
    return found
