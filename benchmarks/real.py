# SPDX-License-Identifier: Apache-2.0
r"""Real backbones on real pictures, by the command as a user types it: docs/real.md.

python benchmarks/real.py --out=out/real --sets PETS FLOWERS --seeds 0 1 2 \
    --backbone demo/4 --backbone S/14 FILE --image_size 98

Every run is `python -m vpt_jax.main --config=configs/folder.py:SET` with default
settings but for more ratios and scopes; beside it one with the recipe of the VPT
reference. Interrupt it whenever you like: runs go on where they stopped, and `--table`
prints what is done; `--json=docs/real.json` writes the accuracies that README's picture
shows (docs/make_picture.py). Nothing is chosen on test.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vpt_jax.report import rows as names

# VPT's own recipe at one sensible rate of its grid, as long as ours.
REFERENCE = {
    "prompts.head_init": "reference",
    "prompts.dropout": 0.1,
    "tune.optimizer": "sgd",
    "tune.schedule": "epoch",
    "tune.head_lr": 0.0,
    "tune.base_lr": 2.5,
    "tune.weight_decay": 1e-4,
    "finetune.base_lr": 0.25,
    "finetune.optimizer": "sgd",
    "finetune.head_lr": 0.0,
    "condense.keep_ratios": "()",
    "baselines": "()",
}
OURS = {
    "condense.keep_ratios": "(0.5, 0.3, 0.1)",
    "condense.scopes": "('global', 'layer')",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("out/real"))
    parser.add_argument("--sets", nargs="+", type=Path, default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--backbone", nargs="+", action="append", default=[])
    parser.add_argument("--image_size", type=int, default=0)
    parser.add_argument("--set", nargs=2, action="append", default=[], dest="keys")
    parser.add_argument("--table", action="store_true", help="print what is done")
    parser.add_argument("--json", type=Path, help="write accuracies of all seeds")
    return parser.parse_args()


def runs(args: argparse.Namespace) -> Iterator[tuple[Path, list[str]]]:
    """The workdir and the flags of every run."""
    for variant, *file in args.backbone:
        for folder in args.sets:
            for recipe, keys in (("ours", OURS), ("reference", REFERENCE)):
                given = {
                    **keys,
                    "seeds": tuple(args.seeds),
                    "backbone.variant": variant,
                }
                if file:
                    given["backbone.checkpoint"] = file[0]
                    given["backbone.image_size"] = args.image_size
                    given |= dict(args.keys)
                where = args.out / f"{variant.replace('/', '-')}-{folder.name}-{recipe}"
                flags = [f"--config.{key}={value}" for key, value in given.items()]
                yield where, [f"--config=configs/folder.py:{folder}", *flags]


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and standard error."""
    text = f"{np.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1) / math.sqrt(len(values)):.{digits}f}"
    return text


def table(out: Path) -> str:
    """Markdown: a line per model, its accuracy and its distance to all prompts."""
    lines = [
        "| backbone, set | model | prompts | test, % | minus all prompts |",
        "|---|---|---|---|---|",
    ]
    for path in sorted(out.glob("*/report.json")):
        report = json.loads(path.read_bytes())
        tuned = {r["seed"]: r for r in report["rows"] if r["stage"] == "tune"}
        about = f"{report['backbone']['variant']}, {report['task']}"
        if path.parent.name.endswith("-reference"):
            about += ", reference's recipe"
        for group in names.summarise(report["rows"], names.default_score(report)):
            lines.append(_line(about, group, report, tuned))
    return "\n".join(lines)


def _line(about: str, group: Any, report: Any, tuned: dict[int, Any]) -> str:
    default = names.default_score(report)
    same = names.place(group, default)
    own = [r for r in report["rows"] if names.place(r, default) == same]
    gaps = [100 * (r["test_accuracy"] - tuned[r["seed"]]["test_accuracy"]) for r in own]
    accuracy = spread([100 * r["test_accuracy"] for r in own])
    gap = spread(gaps) if group["stage"] != "tune" else ""
    count = sum(own[0]["counts"])
    return f"| {about} | {names.label(group, default)} | {count} | {accuracy} | {gap} |"


def accuracies(out: Path) -> dict[str, dict[str, list[float]]]:
    """Test accuracies in per cent, by backbone and set, and model; one per seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for path in sorted(out.glob("*/report.json")):
        report = json.loads(path.read_bytes())
        models: dict[str, list[float]] = {}
        for row in report["rows"]:
            name = names.label(row, names.default_score(report))
            models.setdefault(name, []).append(round(100 * row["test_accuracy"], 2))
        found[f"{report['backbone']['variant']}, {report['task']}"] = models
    return found


def main() -> None:
    args = parse()
    for workdir, flags in () if args.table else runs(args):
        if (workdir / "report.json").exists():
            continue
        command = [sys.executable, "-m", "vpt_jax.main", *flags, f"--workdir={workdir}"]
        print(" ".join(command), flush=True)
        code = subprocess.run(command).returncode
        if code:
            sys.exit(code)
    if args.json:
        text = json.dumps(accuracies(args.out), indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")
    print(table(args.out))


if __name__ == "__main__":
    main()
