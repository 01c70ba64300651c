# SPDX-License-Identifier: Apache-2.0
"""The command line that the package's programs share: flags, errors, exit codes.

Exit codes: 0, done. 2, bad input, or a disk that refuses: one line on stderr. 75,
SIGTERM (a machine that is taken away): a checkpoint was saved and the same command
continues; see `preemption.py`. 130, Ctrl-C. 143, a second SIGTERM. 1, a bug of ours,
with a traceback; `--traceback` shows one for every error.
"""

import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from vpt_jax import durable, preemption
from vpt_jax.messages import printable, reason

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


def start(main: Callable[[ConfigDict, Path, str], None]) -> None:
    """Parses the flags and calls `main(config, workdir, command)`; does not return."""
    program = sys.modules["__main__"].__spec__
    name = program.name if program else sys.argv[0]

    def run(argv: list[str]) -> None:
        if len(argv) > 1:
            fail(f"unexpected arguments: {' '.join(argv[1:])}")
        logging.set_verbosity(logging.WARNING)  # Orbax tells of every file otherwise
        filename = config_flags.get_config_filename(flags.FLAGS["config"])
        workdir = Path(WORKDIR.value or default_workdir(filename))
        command = shlex.join(["python", "-m", name, *sys.argv[1:]])
        spare_memory(CONFIG.value)
        keep_compiled()
        preemption.watch()
        try:
            join()
            main(CONFIG.value, workdir, command)
        except preemption.Preempted:
            print("\nSIGTERM; the same command continues here", file=sys.stderr)
            leave(preemption.EXIT_CODE)
        except KeyboardInterrupt:
            print("\ninterrupted; the same command continues here", file=sys.stderr)
            leave(INTERRUPTED)
        except Exception as error:
            lost = several() and lost_another(error)
            ours = isinstance(error, ValueError | FloatingPointError | OSError)
            if TRACEBACK.value or not (ours or lost):
                if not several():
                    raise
                traceback.print_exc()
                leave(1)
            if lost:
                fail(
                    "another process of this job was lost; start all of them again,"
                    f" and they continue here ({reason(error)})",
                    code=1,
                )
            fail(durable.explain(error) if isinstance(error, OSError) else error)

    flags.mark_flag_as_required("config")
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
            " three, or --distributed alone where JAX finds them (Slurm, TPU pods)."
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
        raise ValueError(
            f"{what} runs in one process, on all of its devices; leave --coordinator"
            " and --distributed out. Several processes are for one run of main."
        )


def lost_another(error: Exception) -> bool:
    """Whether an error says that a process did not answer.

    JAX has no class for it: it raises what the transport said, also as ValueError.
    """
    return any(name in str(error) for name in _TRANSPORTS)


def leave(code: int) -> NoReturn:
    """Exits; at once if something may still be computing.

    Interrupted, the device may be in the middle of a program, and Python's end would
    take away what it reads. As one of several processes, JAX's own end waits for the
    others, who may be waiting for this one.
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

    In its own order all that is computed a second time would be computed at once (of
    ViT-B/16, 935 MB instead of 249). A flag of the CPU backend alone, read when it
    starts; one that the caller has set stays.
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


def parse_flags(argv: list[str]) -> list[str]:
    """Parses as absl does, but a config key or value that is wrong is one line."""
    try:
        rest = flags.FLAGS(argv)
        if not isinstance(CONFIG.value, ConfigDict):
            # A file that could not be loaded says so when it is looked at.
            getattr(CONFIG.value, "seeds", None)
            raise TypeError(
                f"got {type(CONFIG.value).__name__} from its get_config; expected a"
                " ConfigDict"
            )
        return rest
    except Exception as error:  # a config file is a program: it raises what it likes
        if "--traceback" in argv:
            raise
        text = str(error.args[0] if error.args else error) or type(error).__name__
        if "Traceback" in text:  # of the config file, within the message: its last line
            text = text.strip().splitlines()[-1]
        elif isinstance(error, flags.Error):
            fail(text)
        fail(f"cannot read --config: {' '.join(text.split())}")


def fail(error: Any, code: int = 2) -> NoReturn:
    """Prints one line and exits with 2, as command lines do for bad input."""
    # One line, whatever names of files or values are in it.
    print(f"error: {printable(str(error))} (--traceback shows where)", file=sys.stderr)
    leave(code)


def default_workdir(filename: str) -> str:
    """`configs/demo.py:digits,seeds=5` -> `out/demo-digits-seeds5`.

    Of a word that is a path, its last part: `folder.py:my/pets` -> `out/folder-pets`.
    """
    path, _, arg = filename.partition(":")
    words = [Path(word).name for word in arg.replace("=", "").split(",")]
    words.insert(0, Path(path).stem)
    return "/".join(("out", "-".join(w for w in words if w)))
