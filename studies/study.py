# SPDX-License-Identifier: Apache-2.0
r"""What studies share: the lab that they work in, and what they show.

A study is a module of this package with two functions. `run(lab)` measures and returns
a plain result that JSON can hold; `show(result)` makes its section of a page from it
(sentences, tables, figures, verdicts), so a result can be drawn again.

python -m studies.NAME --config=configs/demo.py:shapes_location,seeds=3 \
    --workdir=out/studies

writes `NAME.json` and `NAME.html`. What a study trains it keeps in `trained/`, where
other studies and a second start find it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import scipy.special
from ml_collections import ConfigDict

from vpt_jax.bench import benchmark_config, search
from vpt_jax.files import cli, workdirs
from vpt_jax.prompts import check_choice
from vpt_jax.report import figures, page
from vpt_jax.run import config as configs
from vpt_jax.run import experiment, parsing, stages
from vpt_jax.run.stages import Run, Unit

VERDICTS = ("supported", "not supported", "undecided")
Result = dict[str, Any]


class Table(NamedTuple):
    """Texts in rows; the first column is what a row is about."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


class Figure(NamedTuple):
    """An SVG element, as `figures.render` makes it."""

    heading: str
    caption: str
    svg: str


class Verdict(NamedTuple):
    """What a study says of a claim: one of `VERDICTS`, with the numbers behind it."""

    claim: str
    verdict: str
    because: str


class Section(NamedTuple):
    """What a study shows."""

    title: str
    text: Sequence[str]
    tables: Sequence[Table]
    figures: Sequence[Figure]
    verdicts: Sequence[Verdict]


class Lab(NamedTuple):
    """A backbone, a task and a config; and where trained prompts are kept."""

    config: configs.Config
    workdir: Path
    model: experiment.Model
    pictures: experiment.Pictures


def fixed(values: search.Values, rate: float = 0.03) -> configs.Config:
    """A checked config; what is open gets a rate that mostly does."""
    plain = parsing.plain_dict(values)
    plain.pop("search", None)
    if search.wanted(plain):
        search.fill_lengths(plain)
        for name in ("tune", "finetune"):
            if plain[name].get("base_lr") is None:
                plain[name]["base_lr"] = rate
    return parsing.parse(plain)


def make_lab(config: configs.Config, workdir: Path) -> Lab:
    """Loads what a config names; ValueError if it cannot be."""
    cli.alone("a study")
    model = experiment.load_model(config.backbone)
    pictures = experiment.load_pictures(config.task, model.model.image_size)
    return Lab(config, workdir, model, pictures)


@contextlib.contextmanager
def running(lab: Lab, **changes: Mapping[str, Any]) -> Iterator[Run]:
    """A run with a changed config, in a folder of its own that is kept.

    Args:
      lab: The lab.
      **changes: Keys of the config's groups, such as `prompts={"num_prompts": 5}`.
    """
    groups = {
        name: dataclasses.replace(getattr(lab.config, name), **values)
        for name, values in changes.items()
    }
    # The folder is found by what training depends on, not by which seeds are asked for.
    config = dataclasses.replace(lab.config, seeds=(0,), **groups)
    text = json.dumps(parsing.to_dict(config), sort_keys=True)
    folder = lab.workdir / "trained" / hashlib.sha256(text.encode()).hexdigest()[:16]
    with experiment.started(config, folder, lab.model, lab.pictures) as run:
        yield run


def tuned(run: Run, seed: int) -> dict[str, Any]:
    """Prompts and head, all tuned; trained once and kept."""
    return stages.trained(run, Unit("tune", seed), f"tune, seed {seed}")[0]


def verdict(claim: str, supported: bool | None, because: str) -> Verdict:
    """A verdict; None is undecided."""
    names = {True: "supported", False: "not supported", None: "undecided"}
    return Verdict(claim, names[supported], because)


def paired(differences: Any) -> tuple[float, float]:
    """Mean of differences `[seeds]`, and half the width of its 95 % interval.

    Student's t, which with three seeds is 4.3 standard errors: a mean is clear if it is
    further from 0 than this. Infinite with one seed.
    """
    values = np.asarray(differences, np.float64)
    num = len(values)
    if num < 2:
        return float(values.mean()), float("inf")
    error = values.std(ddof=1) / np.sqrt(num)
    return float(values.mean()), float(scipy.special.stdtrit(num - 1, 0.975) * error)


def with_margin(differences: Any, digits: int = 2, sign: str = "+") -> str:
    """`mean ± half the 95 % interval`; with one seed the number alone."""
    mean, margin = paired(differences)
    text = f"{mean:{sign}.{digits}f}"
    return f"{text} ± {margin:.{digits}f}" if np.isfinite(margin) else text


def spread(values: Any, digits: int = 2) -> str:
    """`mean ± one sample standard deviation`; a dash where a number is missing."""
    if any(value is None for value in values):
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def deviation(values: np.ndarray) -> np.ndarray | None:
    """Of each row of `[n, seeds]`, for the bars of a figure; None with one seed."""
    return values.std(axis=1, ddof=1) if values.shape[1] > 1 else None


def percent(ratio: float) -> str:
    """Of a ratio of prompts kept: `30 %`."""
    return f"{100 * ratio:g} %"


def clear(differences: Any) -> bool | None:
    """Whether a mean is clearly above 0 (True), below (False), or neither (None)."""
    mean, margin = paired(differences)
    return None if abs(mean) <= margin else mean > 0


Drawing = tuple[str, str, Callable[..., None]]
"""Heading, caption, and what draws into the empty figure that it is given."""


def drawn(drawings: Mapping[str, Drawing], *args: Any) -> list[Figure]:
    """Figures by the names that their SVG has; all are drawn from `args`."""

    def draw(figure: Any, name: str) -> bool:
        drawings[name][2](figure, *args)
        return True

    svgs = figures.render({n: functools.partial(draw, name=n) for n in drawings})
    return [Figure(*drawings[name][:2], svg) for name, svg in svgs.items()]


def html(section: Section) -> str:
    """A section of a page."""
    parts = [f"<h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{escape(text)}</p>" for text in section.text]
    for claim in section.verdicts:
        check_choice("verdict", claim.verdict, VERDICTS)
        parts.append(
            f"<p><b>{escape(claim.verdict.capitalize())}:</b>"
            f" {escape(claim.claim)} <span class='soft'>{escape(claim.because)}</span>"
            "</p>"
        )
    parts += map(_html_table, section.tables)
    shown = {str(i): figure for i, figure in enumerate(section.figures)}
    captions = {name: figure[:2] for name, figure in shown.items()}
    svgs = {name: figure.svg for name, figure in shown.items()}
    return "\n".join([*parts, page.figures(svgs, captions=captions)])


def _html_table(table: Table) -> str:
    header = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    rows = ("".join(f"<td>{escape(text)}</td>" for text in row) for row in table.rows)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"""<div class="wide"><table><thead><tr>{header}</tr></thead>
<tbody>{body}</tbody></table></div><p class="soft">{escape(table.caption)}</p>"""


def print_section(section: Section) -> None:
    """Prints sentences, tables and verdicts."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Shown

    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = max(100, console.width)
    for text in section.text:
        console.print(text)
    for table in section.tables:
        shown = Shown(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
        for i, name in enumerate(table.header):
            shown.add_column(name, justify="right" if i else "left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
        if table.caption:
            console.print(table.caption)
    for claim in section.verdicts:
        console.print(f"{claim.verdict.upper()}: {claim.claim} ({claim.because})")


def measured(name: str, study: ModuleType, lab: Lab, command: str) -> Result:
    """The result of a study (a module), from `NAME.json` if that is of this config.

    Else it is measured now. `about` in it says what it is of.
    """
    path = lab.workdir / f"{name}.json"
    config = parsing.to_dict(lab.config)
    if path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["about"]["config"] == config:
            print(f"{name}: measured before, in {path}")
            return result
    result = study.run(lab)
    result["about"] = {
        "command": cli.without_place(command),
        "config": config,
        "task": lab.pictures.task.name,
        "backbone": lab.model.info,
        "versions": experiment.versions(),
    }
    workdirs.write_json(path, result)
    return result


def start(name: str, study: ModuleType) -> None:
    """The command line of a study; does not return."""

    def main(values: ConfigDict, workdir: Path, command: str) -> None:
        lab = make_lab(fixed(values), workdir)
        section = study.show(measured(name, study, lab, command))
        text = page.page(section.title, html(section._replace(title="Result")))
        workdirs.write_text(workdir / f"{name}.html", text)
        print_section(section)
        print(f"study: {workdir / f'{name}.html'}")

    cli.start(main, benchmark_config.complete)
