# SPDX-License-Identifier: Apache-2.0
r"""All studies, one illustrated page: each claim, what the numbers say of it, and why.

python -m studies.all --config=configs/demo.py:shapes_location,seeds=3 \
    --workdir=out/studies

Writes `studies.html` and every study's `NAME.json`; a study that is there for the same
config is not measured again. Verdicts are made by the studies' code from their results.
"""

import importlib
import json
from html import escape
from pathlib import Path

from ml_collections import ConfigDict

from studies import study
from studies.study import Result, Section
from vpt_jax.bench import benchmark_config
from vpt_jax.files import cli, workdirs
from vpt_jax.report import page

NAMES = (
    "prompts",
    "rank",
    "importance",
    "selection",
    "unlabelled",
    "cost",
    "transfer",
)


def main(values: ConfigDict, workdir: Path, command: str) -> None:
    """Measures what is missing and writes the page."""
    lab = study.make_lab(study.fixed(values), workdir)
    sections, result = [], {}
    for number, name in enumerate(NAMES, start=1):
        print(f"[{number}/{len(NAMES)}] {name}", flush=True)
        module = importlib.import_module(f"studies.{name}")
        result = study.measured(name, module, lab, command)
        sections.append(module.show(result))
        study.print_section(sections[-1])
    about = {**result["about"], "command": cli.without_place(command)}
    workdirs.write_text(workdir / "studies.html", html(sections, about))
    print(f"studies: {workdir / 'studies.html'}")


def html(sections: list[Section], about: Result) -> str:
    """The page: all verdicts first, then every study."""
    rows = "".join(
        f"<tr class='prose'><td><b>{escape(claim.verdict.capitalize())}</b></td>"
        f"<td class='prose'>{escape(claim.claim)}<br>"
        f"<span class='soft'>{escape(claim.because)}</span></td></tr>"
        for section in sections
        for claim in section.verdicts
    )
    title = f"The paper's claims on {about['backbone']['name']}, {about['task']}"
    return page.page(
        title,
        f"""<p>Kim et al., "Do We Really Need a Large Number of Visual Prompts?", arXiv
2305.17223. Every verdict follows from the numbers beside it by a rule in the study's
code; they hold for this backbone and this task.</p>
<div class="wide"><table><thead><tr><th>Verdict</th>
<th class="prose">Claim, and the numbers</th></tr></thead><tbody>{rows}</tbody>
</table></div>
{"".join(map(study.html, sections))}
<h2>How this was made</h2><pre>{escape(json.dumps(about, indent=2))}</pre>""",
    )


if __name__ == "__main__":
    cli.start(main, benchmark_config.complete)
