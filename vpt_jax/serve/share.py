# SPDX-License-Identifier: Apache-2.0
"""A folder to share: prompts, what they are, and how to use them.

  python -m vpt_jax.serve.share out/folder-pets pets-prompts --licence=apache-2.0
  hf upload ORG/NAME pets-prompts

The folder has the habit of Hugging Face's hub: `prompts.safetensors`, `config.json`
(the file's header, and the run's results) and `README.md` (the model card).
`load_classifier("hf://ORG/NAME")` and `load_prompts` read it. The backbone is not in
it: the card says which it is.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vpt_jax.files import cli, workdirs
from vpt_jax.files.messages import printable
from vpt_jax.report.cautions import interval
from vpt_jax.serve import classifier
from vpt_jax.weights import release
from vpt_jax.weights.backbones import known_backbone

_MANY = 50  # classes; of more the card says how many


def share(
    path: str | os.PathLike, folder: str | os.PathLike, *, licence: str = ""
) -> Path:
    """Writes a folder to share: of a finished run's folder, or a released file.

    `licence` is that of the prompts, as the hub names it: `apache-2.0`, `cc-by-4.0`.

    Raises:
      ValueError: If there is no such file.

    Example:
      >>> share("out/demo", "demo-prompts")
    """
    file, _ = classifier.find(path)
    header, folder = release.load_prompts(file).header, Path(folder).expanduser()
    run = _run_of(file)
    with workdirs.atomic_path(folder / release.FOLDER) as temporary:
        shutil.copyfile(file, temporary)
    workdirs.write_json(
        folder / "config.json", {"library_name": "vpt_jax", **header, **run}
    )
    workdirs.write_text(folder / "README.md", card(header, run, licence))
    return folder


def _run_of(file: Path) -> dict[str, Any]:
    """What the run of a released file says of it; empty for a file on its own."""
    folder = file.parent.parent
    if not (folder / "report.json").is_file():
        return {}
    report = json.loads((folder / "report.json").read_bytes())
    run = {"task": report["task"], "data": report["data"]}
    result = folder / "results" / f"{file.stem}.json"
    if result.is_file():
        run["result"] = json.loads(result.read_bytes())["row"]
    return run


def card(header: Mapping[str, Any], run: Mapping[str, Any], licence: str = "") -> str:
    """The model card: a README with the lines at its top that the hub reads."""
    names = [printable(name) for name in header["class_names"]]
    top = ["library_name: vpt_jax", "pipeline_tag: image-classification"]
    top += [f"license: {licence}"] if licence else []
    shown = ", ".join(names) if len(names) <= _MANY else f"{len(names)}, in config.json"
    source = header.get("source") or header["backbone"]
    known = known_backbone(source)
    lines = [
        f"# Visual prompts for {printable(run.get('task', f'{len(names)} classes'))}",
        "",
        f"{sum(header['counts'])} prompts and a linear head for a frozen"
        f" {release.variant_of(header)} ({header['image_size']} px), made with"
        " `vpt_jax`.",
        "",
        f"- **Classes**: {shown}",
        f"- **Backbone**: {printable(source)}; SHA-256 of its parameters"
        f" `{header['backbone_hash']}`. It is not in this folder"
        + (f"; licence {known.licence}, from {known.source}." if known else "."),
        f"- **Pictures**: resized by `{header.get('resize') or 'a rule not kept'}`,"
        f" normalised by `{header['normalisation']}`; the file holds both.",
    ]
    if data := run.get("data"):
        lines.append(
            f"- **Data**: {data['train']:,} training, {data['val']:,} validation and"
            f" {data['test']:,} test pictures."
        )
    row = run.get("result", {})
    if row.get("test_accuracy") is not None:
        low, high = interval(row["test_accuracy"], run["data"]["test"])
        lines.append(
            f"- **Accuracy**: {100 * row['test_accuracy']:.1f} % on test (95 % interval"
            f" {100 * low:.1f} to {100 * high:.1f} %), seed {row['seed']}."
        )
    lines.append(f"- **Licence** of the prompts: {licence or 'not said'}.")
    use = [
        "```python",
        "import vpt_jax",
        'classifier = vpt_jax.load_classifier("hf://ORG/NAME")  # or this folder',
        'labels, probabilities = classifier.predict(["picture.jpg"])',
        "```",
    ]
    return "\n".join(["---", *top, "---", "", *lines, "", *use, ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vpt_jax.serve.share",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN_OR_FILE")
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--licence", default="", help="of the prompts: apache-2.0, ...")
    parser.add_argument("--traceback", action="store_true", help="show where it failed")
    return cli.answer(_run, parser.parse_args(argv))


def _run(args: argparse.Namespace) -> int:
    folder = share(args.run, args.folder, licence=args.licence)
    print(f"written: {folder}; upload it: hf upload ORG/NAME {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
