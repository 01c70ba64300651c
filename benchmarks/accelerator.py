# SPDX-License-Identifier: Apache-2.0
r"""This package on a GPU or TPU: one command, everything, in order of importance.

python benchmarks/accelerator.py --plan                   # what it would do; no device
python benchmarks/accelerator.py --minutes=8 --out=DIR    # and again: it goes on
python benchmarks/accelerator.py --tiny --minutes=5 --out=DIR    # the same way on a CPU

Rows, the most important first: `card` the rates of matrix products and of a copy;
`correct` logits and prompt gradients against float64 on the host, against PyTorch, keys
and values against tokens, masks against removal; `speed` ms a picture, part of the
measured rate and memory of inference, tuning, scoring, fine-tuning, beside PyTorch
(prompts as tokens, fused attention, plain and compiled) and timm without prompts;
`remedy` what a change of the tuning program buys; `profile` where its time goes;
`attention` that layer alone; `command` the demo and the tests on the device; `protocol`
epochs of a VTAB task; `start` a process without compiled programs on disk and with.

A row begins if what it is expected to take fits into the time left; what runs over the
time is ended with the process. `DIR/results.json` is written after every row,
`DIR/results.md` is its page. Weights and pictures are random: nothing is downloaded.
PyTorch and timm take part if they are installed. A program that `DIR/xla` holds from
an earlier run compiles faster: only `start` says what compilation takes.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import accelerator_checks as checks
import accelerator_rows as rows
import jax
from accelerator_rows import (
    OPTIONS,
    SMALL,
    TINY,
    Context,
    Row,
    Sizes,
    model_of,
    steps_of,
    work,
)

import vpt_jax
from vpt_jax.files import durable

MEASURE: dict[str, Callable[[Row, Context], dict[str, Any]]] = {
    "card": rows.card,
    "correct": checks.correct,
    "speed": rows.speed,
    "remedy": rows.speed,
    "profile": checks.profile,
    "attention": rows.speed,
    "command": checks.command,
    "protocol": checks.trials,
    "start": checks.start,
    "first": rows.speed,  # what `start` runs, in a process of its own
}
PEERS = ("PyTorch", "torch.compile", "timm")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=8.0)
    add("--out", type=Path, default=Path("out/accelerator"))
    add("--plan", action="store_true", help="print what would be done; do nothing")
    add("--tflops", type=float, default=700.0, help="a card's, bfloat16, for --plan")
    add("--gb_per_s", type=float, default=3000.0, help="a card's memory, for --plan")
    add("--parts", nargs="+", default=[*MEASURE][:-1], choices=[*MEASURE])
    add("--variants", nargs="+", default=Sizes().variants)
    add("--batches", type=int, nargs="+", default=Sizes().batches)
    add("--prompts", type=int, nargs="+", default=Sizes().prompts)
    add("--dtypes", nargs="+", default=Sizes().dtypes, choices=Sizes().dtypes)
    add("--tiny", action="store_true", help="sizes with which a CPU takes a minute")
    return parser.parse_args(argv)


def plan(sizes: Sizes, gpu: bool = True) -> list[Row]:
    """All rows, the most important first; without `gpu`, none that only GPUs have."""
    s = sizes
    first = (s.variants[0], s.batches[0], s.prompts[0], s.dtypes[0])
    base = Row("", "", "vpt_jax", *first)
    small = base._replace(part="correct", batch=min(4, s.batches[0]), dtype="float32")
    found = [base._replace(part="card", what="rates")]
    found += [small._replace(what=what) for what in (*checks.CASES, checks.MASKED)]
    found += [small._replace(what=checks.PEER, who="PyTorch")]
    speed = base._replace(part="speed")
    more = speed._replace(prompts=s.prompts[min(1, len(s.prompts) - 1)])
    found += of_one_size(speed, ("tuning",), PEERS)
    for at in (speed._replace(prompts=0), more):
        found += of_one_size(at, ("inference",))
    found += of_one_size(speed, ("inference", "scoring", "fine-tuning"))
    tuning = base._replace(part="remedy", what="tuning")
    remedies = [tuning._replace(option=option) for option in OPTIONS if option]
    found += [row for row in remedies if "backbone" in row.option]
    found += [tuning._replace(part="profile", option=o) for o in ("", "cudnn")]
    found += [base._replace(part="attention", what=what) for what in rows.ATTENTIONS]
    found += [base._replace(part="command", what="demo")]
    found.append(base._replace(part="protocol", what="a trial"))
    found += [row for row in remedies if row.option != "cudnn"]  # that is `speed`
    for at in (more, more._replace(batch=s.batches[-1])):
        kept = "backbone in bfloat16"
        found.append(at._replace(part="remedy", what="inference", option=kept))
    found += [base._replace(part="start", what="cold and warm")]
    found += [base._replace(part="command", what="tests")]
    found += [more._replace(what="inference", who=PEERS[1])]
    every = ("tuning", "inference", "scoring", "fine-tuning")
    grid = itertools.product(s.dtypes, s.batches, s.variants, (*s.prompts, 0))
    for dtype, batch, variant, num in grid:
        at = Row("speed", "", "vpt_jax", variant, batch, num, dtype)
        found += of_one_size(at, every if num else ("inference",))
    found.append(tuning._replace(part="first"))
    found = list(dict.fromkeys(found))
    return [row for row in found if gpu or not on_gpu_alone(row)]


def of_one_size(
    at: Row, whats: Sequence[str], peers: Sequence[str] = ("PyTorch", "timm")
) -> list[Row]:
    """Ours beside PyTorch's with prompts, beside timm's where there are none."""
    found = []
    for what in whats:
        row = at._replace(what=what)
        found.append(row)
        if what not in ("tuning", "inference"):
            continue
        if at.dtype == "bfloat16":
            found.append(row._replace(option="cudnn"))
        if at.prompts:
            found += [row._replace(who=who) for who in peers if who != "timm"]
        elif at.variant != TINY:  # of that size timm has none
            found.append(row._replace(who="timm"))
    return found


def on_gpu_alone(row: Row) -> bool:
    flags = row.option in ("deterministic", "triton_gemm_any")
    return flags or "cudnn" in row.option + row.what


def seconds(row: Row, tflops: float, budget: float) -> float:
    """About what a row takes: to compile, and to run at 0.4 of a card's rate.

    What compiling takes is guessed, on no card; `run` corrects it by the rows before.
    """
    fixed = {"card": 15, "demo": 90, "tests": 240, "start": 80, "protocol": 25}
    fixed |= {"correct": 12, "attention": 4}
    guess = 8 if row.what == "inference" else 16
    guess = fixed.get(row.part, fixed.get(row.what, guess))
    guess = {"PyTorch": 4, "torch.compile": 45, "timm": 4}.get(row.who, guess)
    if row.part in ("card", "command", "start", "correct"):
        return guess
    model, flop = model_of(row._replace(option="")), work(row)[0]
    if row.who in PEERS[:2]:
        counts = (row.prompts,) * model.depth
        tokens = vpt_jax.macs(model, counts, formulation="tokens")
        flop *= tokens / vpt_jax.macs(model, counts)
    call = row.batch * flop * steps_of(row) / (0.4e12 * tflops)
    call *= 1 if row.dtype == "bfloat16" else 2
    guess *= 1 if row.part == "attention" else max(model.depth / 12, 0.5)
    return guess + max(2 * budget, 6 * call)


def absent(whose: set[str]) -> dict[str, str]:
    """Which peers and parts are left out, and why."""
    found = {}
    if jax.default_backend() == "tpu":
        why = "a TPU belongs to one process, here this one"
        found = {"command": why, "start": why}
    if not whose & set(PEERS):  # not imported without need
        return found
    try:
        rows.torch_device()
    except (ImportError, ValueError) as error:
        return found | {who: str(error) for who in PEERS}
    if importlib.util.find_spec("timm") is None:
        found["timm"] = "timm is not installed"
    return found


def where() -> dict[str, str]:
    """What the numbers are of."""
    device = jax.devices()[0]
    found = {
        "device": device.device_kind,
        "devices": str(jax.device_count()),
        "platform": " ".join(device.client.platform_version.split()),
        "python": sys.version.split()[0],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "vpt_jax": vpt_jax.__version__,
    }
    for name in ("jax", "jaxlib", "torch", "timm"):
        if importlib.util.find_spec(name):
            found[name] = importlib.metadata.version(name)
    return found


def restore(folder: Path, now: dict[str, str]) -> dict[str, Any]:
    """The results so far."""
    path = folder / "results.json"
    if not path.exists():
        return {"where": now, "left_out": {}, "rows": {}}
    results = json.loads(path.read_text())
    if results["where"] != now:
        raise SystemExit(
            f"{path} holds numbers of {results['where']}, but this is {now}; choose"
            " another --out."
        )
    return results


def save(folder: Path, results: dict[str, Any]) -> None:
    for name, text in (
        ("results.json", json.dumps(results, indent=1)),
        ("results.md", page(results)),
    ):
        with durable.atomic_path(folder / name) as path:
            path.write_text(text)


def run(args: argparse.Namespace, sizes: Sizes) -> int:
    """Measures row by row until all are done or the time is over."""
    end = time.monotonic() + 60 * args.minutes
    folder = args.out
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(folder.resolve() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    results = restore(folder, where())
    todo = plan(sizes, jax.default_backend() == "gpu")
    todo = [row for row in todo if row.part in args.parts]
    away = absent({row.who for row in todo})
    todo = [row for row in todo if not {row.who, row.part} & set(away)]
    known, results["left_out"] = results["rows"], away
    # What failed, or took this process with it, is tried again after all others.
    todo.sort(key=lambda row: row.name in known)
    todo = [row for row in todo if known.get(row.name, {}).get("state") != "done"]
    late, pace = [], {}
    for row in todo:
        rates = known.get(plan(sizes)[0].name, {})
        guess = seconds(row, rates.get("bfloat16", 1e14) / 1e12, sizes.budget)
        seen = pace.get(row.part) or list(itertools.chain(*pace.values()))
        expected = guess * statistics.median(seen or [1.0])
        if expected > end - time.monotonic():
            late.append(row)
            continue
        known[row.name] = {**row._asdict(), "state": "begun"}
        save(folder, results)
        context = Context(sizes, rates, folder, lambda: end - time.monotonic() - 2)
        start = time.monotonic()
        with ended_at(end):
            found = attempt(row, context)
        took = time.monotonic() - start
        pace.setdefault(row.part, []).append(took / guess)
        known[row.name] |= found | {"expected_s": expected, "took_s": took}
        save(folder, results)
        print(f"{took:6.1f} s  {row.name}: {short(found)}", flush=True)
    for who, why in results["left_out"].items():
        print(f"left out: {who}: {why}")
    print(f"{len(late)} rows did not fit into the time; the same command goes on.")
    print(f"{folder / 'results.md'} is the page.")
    bad = [r for r in known.values() if r["state"] != "done" or r.get("right") is False]
    return 1 if bad else 0


def attempt(row: Row, context: Context) -> dict[str, Any]:
    """What a row finds; if it fails, the error, which the page and exit code show."""
    try:
        return {**MEASURE[row.part](row, context), "state": "done"}
    except Exception as error:  # of one row; out of memory, say: the others go on
        return {"state": "failed", "error": f"{type(error).__name__}: {error}"[:1000]}


@contextlib.contextmanager
def ended_at(end: float) -> Iterator[None]:
    """Ends the process when the time is over: nothing else stops a compiler."""

    def leave() -> None:
        print("the time is over within a row; what was measured is kept", flush=True)
        os._exit(3)

    timer = threading.Timer(end - time.monotonic(), leave)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def short(found: dict[str, Any]) -> str:
    """Of what a row found, what fits on a line."""
    texts = (f"{k} {cell(v)}" for k, v in found.items() if k != "state")
    return ", ".join(texts)[:160]


def page(results: dict[str, Any]) -> str:
    """Markdown: what the numbers are of, the goals, a table for every part."""
    lines = ["# This package on a device", ""]
    lines += [f"- {name}: {value}" for name, value in results["where"].items()]
    lines += [f"- without {who}: {why}" for who, why in results["left_out"].items()]
    lines += ["", *goals(list(results["rows"].values()))]
    for part in MEASURE:
        own = [r for r in results["rows"].values() if r["part"] == part]
        if not own:
            continue
        names = list(dict.fromkeys(name for row in own for name in row))
        columns = [n for n in names if n not in ("part", "expected_s", "limits", "end")]
        lines += ["", f"## {part}", "", "| " + " | ".join(columns) + " |"]
        lines.append("|" + "---|" * len(columns))
        for row in own:
            cells = (cell(row.get(name, "")) for name in columns)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "/")


def goals(known: list[dict[str, Any]]) -> list[str]:
    """What the numbers say of the goals, as far as they are there."""

    def best(what: str, prompts: int, *whose: str) -> dict[str, Any] | None:
        fits = {"what": what, "prompts": prompts, "batch": 64, "variant": "B/16"}
        fits["dtype"] = "bfloat16"
        own = [
            r
            for r in known
            if r["who"] in whose
            and "ms_a_picture" in r
            and fits.items() <= r.items()
            and r["part"] in ("speed", "remedy")
            and "mask" not in r["option"]
        ]
        return min(own, key=lambda r: r["ms_a_picture"], default=None)

    def against(name: str, ours: Any, theirs: Any, goal: str) -> list[str]:
        if not ours or not theirs:
            return []
        ratio = theirs["ms_a_picture"] / ours["ms_a_picture"]
        how = ours["option"] or "as it is"
        return [f"- {name}: {ratio:.2f} times as fast (goal {goal}); ours {how}"]

    tuning, infer = best("tuning", 100, "vpt_jax"), best("inference", 200, "vpt_jax")
    found = against(
        "tuning, 100 prompts, against PyTorch compiled",
        *(tuning, best("tuning", 100, "torch.compile")),
        "2",
    )
    if tuning and tuning["of_rate"]:
        share = f"{tuning['of_rate']:.2f} of the card's rate (goal 0.5)"
        found.append(f"- tuning, 100 prompts: {share}")
    none = best("inference", 0, "vpt_jax")
    found += against("inference, 200 prompts, against none", infer, none, "1 / 1.05")
    bare = best("inference", 0, "timm")
    found += against("inference, 200 prompts, against timm without", infer, bare, "1")
    return found


def show(args: argparse.Namespace, sizes: Sizes) -> None:
    """The plan: what there is to do at least, and about how long it takes."""
    print(
        f"At {args.tflops:g} TFLOP/s (float32 half of it) and {args.gb_per_s:g} GB/s."
        " Least: the arithmetic of\na picture, the traffic of a step or call, the time"
        " of a picture by the slower of both.\nExpected seconds are guesses of no card;"
        " PyTorch's rows are left out where it\nis not installed.\n"
    )
    print(f"{'GFLOP':>8}{'GB':>7}{'ms':>9}{'s':>6}{'minute':>8}  row")
    total, ended = 0.0, False
    for row in plan(sizes):
        if row.part not in args.parts:
            continue
        flop, size = work(row)
        rate = args.tflops * (1e12 if row.dtype == "bfloat16" else 0.5e12)
        least = max(flop / rate, size / args.gb_per_s / 1e9 / row.batch)
        took = seconds(row, args.tflops, sizes.budget)
        total += took
        if total > 60 * args.minutes and not ended:
            print(f"{'-' * 38}  {args.minutes:g} minutes")
            ended = True
        print(
            f"{flop / 1e9:8.2f}{size / 1e9:7.2f}{1000 * least:9.4f}{took:6.0f}"
            f"{total / 60:8.1f}  {row.name}"
        )
    total = checks.sweep_flop(vpt_jax.ViT("B/16")) / 1e15
    print(f"\nVTAB-1k's whole protocol with ViT-B/16: at least {total:.0f} PFLOP")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    own = (args.variants, args.batches, args.prompts, args.dtypes)
    sizes = SMALL if args.tiny else Sizes(*map(tuple, own))
    if args.plan:
        show(args, sizes)
        return 0
    return run(args, sizes)


if __name__ == "__main__":
    sys.exit(main())
