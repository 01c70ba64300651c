# SPDX-License-Identifier: Apache-2.0
"""The command line that the package's programs share: flags, errors, exit codes.

Bad input is one line on stderr and exit code 2, Ctrl-C is exit code 130; a traceback
is shown for what is a bug of ours, or when asked for (`--traceback`).
"""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file.", lock_config=True
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where results are kept; by default out/ and the config's name."
)
TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where an error was raised.")
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
        keep_compiled()
        try:
            main(CONFIG.value, workdir, command)
        except KeyboardInterrupt:
            print("\ninterrupted; the same command continues here", file=sys.stderr)
            sys.exit(130)
        except (ValueError, FloatingPointError) as error:
            if TRACEBACK.value:
                raise
            fail(error)

    flags.mark_flag_as_required("config")
    app.run(run, flags_parser=parse_flags)


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


def fail(error: Any) -> NoReturn:
    """Prints one line and exits with 2, as command lines do for bad input."""
    # One line, whatever names of files or values are in it.
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error))
    print(f"error: {line} (--traceback shows where)", file=sys.stderr)
    sys.exit(2)


def default_workdir(filename: str) -> str:
    """`configs/demo.py:digits,seeds=5` -> `out/demo-digits-seeds5`.

    Of a word that is a path, its last part: `folder.py:my/pets` -> `out/folder-pets`.
    """
    path, _, arg = filename.partition(":")
    words = [Path(word).name for word in arg.replace("=", "").split(",")]
    words.insert(0, Path(path).stem)
    return "/".join(("out", "-".join(w for w in words if w)))
