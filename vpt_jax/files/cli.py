# SPDX-License-Identifier: Apache-2.0
"""The command line that the package's programs share: flags, errors, exit codes.

Exit codes: 0, done. 2, bad input, or a disk that refuses: one line on stderr. 75,
SIGTERM (a machine that is taken away): a checkpoint was saved and the same command
continues; see `preemption.py`. 130, Ctrl-C. 143, a second SIGTERM. 1, a bug of ours,
with a traceback; `--traceback` shows one for every error.
"""

import ast
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from vpt_jax.files import durable, messages, preemption
from vpt_jax.files.messages import did_you_mean, printable, reason

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file.", lock_config=True
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where results are kept; by default out/ and the config's name."
)
TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where an error was raised.")
COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "Of several processes: HOST:PORT of process 0."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Several processes whose addresses JAX finds (Slurm, TPU)."
)
HEARTBEAT = flags.DEFINE_integer(
    "heartbeat", 100, "Seconds after which a silent process counts as lost."
)
# Names in the errors of what carries sums between processes, and of what watches them.
_TRANSPORTS = ("Gloo", "NCCL", "coordination service", "heartbeat", "Connection reset")
INTERRUPTED = 130  # by Ctrl-C, as shells have it
_PLACE = ("workdir", "launcher", "address", "resources")


class _ConfigFile(config_flags.ConfigFileFlagParser):
    """A config file's `ConfigDict`, to which `complete` adds the keys it leaves out."""

    values: Any = None

    def __init__(self, complete: Callable[[ConfigDict], None]):
        super().__init__("config", lock_config=True)
        self.complete = complete

    def parse(self, path: str) -> Any:
        name, colon, arg = path.partition(":")
        self.values = super().parse(f"{find_config(name)}{colon}{arg}")
        if isinstance(self.values, ConfigDict):
            with self.values.unlocked():
                self.complete(self.values)
            self.values.lock()  # the new groups too
        return self.values


def shipped_configs() -> dict[str, Path]:
    """Name to path of the configs in the wheel, or in the clone that is in use."""
    package = Path(__file__).parent.parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "demo.py").is_file():
            return {f"configs/{p.name}": p for p in sorted(folder.glob("*.py"))}
    return {}


def find_config(name: str) -> str:
    """A config file: the one of that name, else a shipped one.

    Raises:
      flags.Error: If there is neither; names what there is.
    """
    if Path(name).is_file():
        return name
    shipped = shipped_configs()
    if name in shipped:
        return str(shipped[name])
    near = did_you_mean(name, shipped) or did_you_mean(f"configs/{name}", shipped)
    raise flags.Error(f"no config file {name!r}; {near}there are {', '.join(shipped)}.")


class _Tuple(flags.ArgumentParser):
    """A tuple on the command line: `(0.3, 0.1)`, or one value.

    Given again it counts anew; ml_collections' own would append.
    """

    def parse(self, argument: Any) -> tuple:
        if not isinstance(argument, str):
            return tuple(argument or ())
        try:
            value = ast.literal_eval(argument)
        except (SyntaxError, ValueError):
            value = argument  # a word
        if type(value) is int:
            raise ValueError(
                f"{value} could be one value or how many there are; write ({value},)"
                " for the one value, or all of them, such as (0, 1, 2)."
            )
        return tuple(value) if isinstance(value, tuple | list) else (value,)

    def flag_type(self) -> str:
        return "tuple"


config_flags.register_flag_parser_for_type(tuple, _Tuple())


def start(
    main: Callable[[ConfigDict, Path, str], None],
    complete: Callable[[ConfigDict], None] = lambda values: None,
) -> None:
    """Parses the flags and calls `main(config, workdir, command)`; does not return.

    `complete` adds the keys that a config file leaves out, so that they can be set.
    """
    flags.FLAGS["config"].parser = _ConfigFile(complete)
    program = sys.modules["__main__"].__spec__
    # As a module, or by the script that an installation makes.
    name = Path(sys.argv[0]).name
    words = ["python", "-m", program.name] if program else [name]

    def run(argv: list[str]) -> None:
        if len(argv) > 1:
            fail(f"unexpected arguments: {' '.join(argv[1:])}")
        logging.set_verbosity(logging.WARNING)  # Orbax tells of every file otherwise
        filename = config_flags.get_config_filename(flags.FLAGS["config"])
        workdir = WORKDIR.value or default_workdir(filename)
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", workdir):  # a path would mangle it
            folder = "a folder of this machine, such as a mounted bucket"
            fail(f"--workdir is {workdir!r}; expected {folder}.")
        command = shlex.join([*words, *sys.argv[1:]])
        spare_memory(CONFIG.value)
        keep_compiled()
        preemption.watch()
        try:
            join()
            main(CONFIG.value, Path(workdir), command)
        except (preemption.Preempted, KeyboardInterrupt) as end:
            sigterm = isinstance(end, preemption.Preempted)
            what = "SIGTERM" if sigterm else "interrupted"
            print(f"\n{what}; the same command continues here", file=sys.stderr)
            leave(preemption.EXIT_CODE if sigterm else INTERRUPTED)
        except Exception as error:
            lost = several() and lost_another(error)
            ours = isinstance(error, ValueError | FloatingPointError | OSError)
            if TRACEBACK.value or not (ours or lost):
                if not several():
                    raise
                traceback.print_exc()
                leave(1)
            if lost:
                lost = "another process of this job was lost; start all of them again"
                fail(f"{lost}, and they continue here ({reason(error)})", code=1)
            fail(durable.explain(error) if isinstance(error, OSError) else error)

    app.run(run, flags_parser=parse_flags)


def join() -> None:
    """Makes this process one of several, if a flag says so; see docs/devices.md.

    Raises:
      ValueError: If only some of the flags that name the processes are given.
    """
    named = (COORDINATOR.value or None, NUM_PROCESSES.value, PROCESS_ID.value)
    if named == (None, None, None) and not DISTRIBUTED.value:
        return
    if None in named and not DISTRIBUTED.value:
        raise ValueError(
            "--coordinator, --num_processes and --process_id belong together; pass all"
            " three, or --distributed."
        )
    import jax

    jax.distributed.initialize(
        *named,
        cluster_detection_method=None if None in named else "deactivate",
        heartbeat_timeout_seconds=HEARTBEAT.value,
    )


def several() -> bool:
    """Whether this process is one of several."""
    jax = sys.modules.get("jax")  # not imported for the sake of a wrong flag
    return jax is not None and jax.distributed.is_initialized()


def alone(what: str) -> None:
    """Raises ValueError if this process is one of several."""
    if several():
        raise ValueError(f"{what} is one process; leave --coordinator out.")


def lost_another(error: Exception) -> bool:
    """Whether an error says that a process did not answer.

    JAX has no class for it: it raises what the transport said, also as ValueError.
    """
    return any(name in str(error) for name in _TRANSPORTS)


def leave(code: int) -> NoReturn:
    """Exits; at once if the device may still compute, or others wait for this process.

    Python's end would take away what a program reads, and JAX's waits for the others.
    """
    if several() or code in (preemption.EXIT_CODE, INTERRUPTED):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def keep_compiled() -> None:
    """Compiled programs are kept on disk, for the next process with the same shapes.

    In `~/.cache/vpt_jax/xla`, in `VPT_JAX_CACHE`, or where JAX's own variable says.
    """
    import jax  # after the flags are read: --help need not wait for it

    root = Path(os.environ.get("VPT_JAX_CACHE") or "~/.cache/vpt_jax").expanduser()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(root / "xla"))
    # Its list of fonts too: nothing is written outside of the workdir and this cache.
    os.environ.setdefault("MPLCONFIGDIR", str(root / "matplotlib"))
    # JAX keeps what took a second; small programs are many.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def spare_memory(values: ConfigDict) -> None:
    """With `backbone.remat`, has XLA's CPU code run what frees memory first.

    Otherwise all is computed a second time at once (of ViT-B/16, 935 MB instead of
    249). The flag is read when the CPU backend starts; the caller's own stays.
    """
    backbone = values.get("backbone")
    remat = backbone.get("remat") if isinstance(backbone, ConfigDict) else None
    flags_of_xla = os.environ.get("XLA_FLAGS", "")
    if remat not in (None, "none") and "xla_cpu_scheduler_type" not in flags_of_xla:
        order = "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
        os.environ["XLA_FLAGS"] = f"{flags_of_xla} {order}".strip()


def without_place(command: str) -> str:
    """A command without the flags that say where it runs: what the results are of."""
    kept, words = [], iter(shlex.split(command))
    for word in words:
        name, equals, _ = word.lstrip("-").partition("=")
        if not word.startswith("-") or name not in _PLACE:
            kept.append(word)
        elif not equals:  # --workdir DIR
            next(words, None)
    return shlex.join(kept)


def _unknown_key(argv: Sequence[str], values: Any) -> str:
    """What to say of the first `--config.KEY` that the config does not have, or ''."""
    for word in argv:
        found = re.match(r"--?(?:no)?config\.([\w.]+)(?:=|$)", word)
        group, prefix = values, "config."
        for name in found[1].split(".") if found else ():
            if not isinstance(group, ConfigDict):
                break
            if name not in group:
                return messages.unknown_key(prefix, name, group)
            group, prefix = group[name], f"{prefix}{name}."
    return ""


def parse_flags(argv: list[str]) -> list[str]:
    """Parses as absl does, but a config key or value that is wrong is one line."""
    parser = flags.FLAGS["config"].parser
    try:
        rest = flags.FLAGS(argv)
        if CONFIG.value is None:
            shipped = ", ".join(shipped_configs())
            raise flags.Error(f"no --config; pass --config=FILE: {shipped}.")
        if not isinstance(CONFIG.value, ConfigDict):
            # A file that could not be loaded says so when it is looked at.
            getattr(CONFIG.value, "seeds", None)
            kind = type(CONFIG.value).__name__
            raise TypeError(f"got {kind} from its get_config; expected a ConfigDict")
        return rest
    except Exception as error:  # a config file is a program: it raises what it likes
        if "--traceback" in argv:
            raise
        if message := _unknown_key(argv, getattr(parser, "values", None)):
            fail(message)
        text = str(error.args[0] if error.args else error) or type(error).__name__
        if "Traceback" in text:  # of the config file, within the message: its last line
            text = text.strip().splitlines()[-1]
            if text.startswith("ValueError: "):  # says itself what is wrong
                fail(text.removeprefix("ValueError: "))
        elif isinstance(error, flags.Error):
            for raw, plain in _OF_PYTHON.items():
                text = re.sub(raw, plain, text)
            fail(text)
        fail(f"cannot read --config: {' '.join(text.split())}")


# What Python says within a message of absl's, and what a person understands.
_OF_PYTHON = {
    r"invalid literal for int\(\) with base 10: ": "expected an integer, got ",
    r"could not convert string to float: ": "expected a number, got ",
    r"\('Non-boolean argument[^,]*, (.*)\)": r"expected true or false, got \1",
}


def fail(error: Any, code: int = 2) -> NoReturn:
    """Prints one line and exits with 2, as command lines do for bad input.

    Notes of the error follow, each on a line of its own: see `messages.advised`.
    """
    print(f"error: {printable(str(error))} (--traceback shows where)", file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        print(printable(str(note)), file=sys.stderr)
    leave(code)


def answer(run: Callable[[Any], int], args: Any) -> int:
    """The exit code of `run(args)`, of argparse; says errors as `start` does."""
    try:
        return run(args)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        if args.traceback:
            raise
        fail(error)


def default_workdir(filename: str) -> str:
    """`configs/demo.py:digits,seeds=5` -> `out/demo-digits-seeds5`.

    Of a word that is a path, its last part: `folder.py:my/pets` -> `out/folder-pets`.
    """
    path, _, arg = filename.partition(":")
    words = [Path(word).name for word in arg.replace("=", "").split(",")]
    words.insert(0, Path(path).stem)
    return "/".join(("out", "-".join(w for w in words if w)))
