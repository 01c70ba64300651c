# SPDX-License-Identifier: Apache-2.0
r"""Visual prompt tuning and prompt condensation from the command line.

python -m vpt_jax.main --config=configs/demo.py --workdir=out/demo

Tunes, scores, condenses, fine-tunes and evaluates (`experiment.py`). In the workdir:
`report.html`, `report.json`, `prompts/` (released prompts with their head), `results/`,
`scores/`, `checkpoints/`, `events/` (TensorBoard), `log.txt`; `best.json` names the
model with which `python -m vpt_jax.predict` answers. `--list` shows what is done.

python -m vpt_jax.main --config=configs/vtab.py --workdir=out/vtab

runs a benchmark of many tasks, by the field's protocol (`protocol.py`). In the workdir:
`leaderboard.html` (and .md, .csv, .tex, .json), `runs/TASK/NAME/` of every run.
`--list` shows what is done and how long the rest takes. `--launcher=ray` or `slurm`
spreads the runs over machines.

Running the same command again continues where it stopped.
"""

from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from vpt_jax.files import cli

LAUNCHER = flags.DEFINE_string(
    "launcher",
    "here",
    "Of a benchmark: here, ray or slurm, see vpt_jax/bench/launch.py.",
)
ADDRESS = flags.DEFINE_string(
    "address", "", "Ray: auto or ray://host:10001. Slurm: local runs processes here."
)
RESOURCES = flags.DEFINE_string(
    "resources", "", "Of each run: GPU=1 (Ray), timeout_min=240,... (submitit)."
)
LIST = flags.DEFINE_bool("list", False, "Show what is done and what is left, and stop.")


def main(values: ConfigDict, workdir: Path, command: str) -> None:
    """Runs what the config describes and says where the results lie."""
    if "benchmark" in values:
        run_benchmark(values, workdir, command)
        return
    if LAUNCHER.value != "here" or ADDRESS.value or RESOURCES.value:
        raise ValueError(
            "--launcher, --address and --resources are for benchmarks; leave them out."
        )
    from vpt_jax.bench import search  # after the flags: they are heavy
    from vpt_jax.files import workdirs
    from vpt_jax.report import document as report
    from vpt_jax.run import experiment

    if LIST.value:
        search.print_status(values, workdir)
        return
    config, found = search.choose(values, workdir)
    content = experiment.run(config, workdir, command, found)
    if workdirs.writes():
        report.print_table(content)
        print(f"report: {workdir / 'report.html'}")
        print(f"answers: python -m vpt_jax.predict {workdir} PICTURES")


def run_benchmark(values: ConfigDict, workdir: Path, command: str) -> None:
    """Many tasks."""
    from vpt_jax.bench import benchmark, launch, protocol
    from vpt_jax.data.public import extracted
    from vpt_jax.report import leaderboard

    cli.alone("a benchmark (--launcher spreads its runs)")
    given: Any = values
    tasks, folder = given.tasks, given.task.data_dir or ""
    if missing := extracted.missing(tasks, folder):
        print(f"not in {folder}, left out: {', '.join(missing)}", flush=True)
        with values.unlocked():
            for task in missing:
                del tasks[task]
    if LIST.value:
        benchmark.print_status(protocol.parse(values), workdir)
        return
    launcher = launch.make(LAUNCHER.value, workdir, ADDRESS.value, RESOURCES.value)
    content = benchmark.run(values, workdir, launcher, cli.without_place(command))
    leaderboard.print_table(content)
    print(f"leaderboard: {workdir / 'leaderboard.html'}")


def complete(values: ConfigDict) -> None:
    """Adds the keys of the schema that a config file leaves out."""
    from vpt_jax.bench import benchmark_config

    benchmark_config.complete(values)


def start() -> None:
    """The command, as a module or as the script `vpt-jax`."""
    cli.start(main, complete)


if __name__ == "__main__":
    start()
