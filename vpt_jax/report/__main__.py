# SPDX-License-Identifier: Apache-2.0
"""`python -m vpt_jax.report DIR` draws a run's or a benchmark's report once more.

`python -m vpt_jax.report RUN1 RUN2 ...` compares runs of one task: what differs in
their configs, and the accuracies of their models, paired by seed.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from vpt_jax.report import compare, document, leaderboard


def main(argv: Sequence[str] | None = None) -> None:
    """Renders a workdir again from its JSON and prints the table; or compares several.

    A benchmark's workdir has a leaderboard.json, that of a single run a report.json.
    """
    parser = argparse.ArgumentParser(prog="python -m vpt_jax.report")
    add = parser.add_argument
    add("workdir", nargs="+", type=Path, help="folder of a run; several: compare them")
    add("--out", type=Path, default=Path("comparison.html"), help="of a comparison")
    args = parser.parse_args(argv)
    if len(args.workdir) > 1:
        compare.main(args.workdir, args.out, parser)
        return
    (workdir,) = args.workdir
    several = (workdir / "leaderboard.json").exists()
    source = workdir / ("leaderboard.json" if several else "report.json")
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
        texts = (leaderboard if several else document).render(content)
    except FileNotFoundError:
        run = f"python -m vpt_jax.main --config=CONFIG --workdir={workdir}"
        parser.error(f"{workdir} has no report.json; a finished run writes it: {run}")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        kind_of_file = "leaderboard" if several else "report"
        parser.error(f"{source} is not a {kind_of_file} ({e!r}).")
    from vpt_jax.files import workdirs  # imports Orbax, which takes seconds

    for suffix, text in texts.items():
        workdirs.write_text(source.with_suffix(f".{suffix}"), text)
    (leaderboard if several else document).print_table(content)
    for suffix in texts:
        print(f"Wrote {source.with_suffix(f'.{suffix}')}")


if __name__ == "__main__":
    main()
