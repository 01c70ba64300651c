# SPDX-License-Identifier: Apache-2.0
"""What benchmarks of one network share: their flags, and programs that take turns."""

import argparse
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def parser(doc: str, **defaults: Any) -> argparse.ArgumentParser:
    """With `--variant`, `--batch`, `--rounds` and, unless that is None, `--dtype`."""
    given = {"variant": "B/16", "batch": 8, "rounds": 5, "dtype": "float32", **defaults}
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--variant", default=given["variant"])
    made.add_argument("--batch", type=int, default=given["batch"])
    made.add_argument("--rounds", type=int, default=given["rounds"])
    if given["dtype"]:
        kinds = ("float32", "bfloat16")
        made.add_argument("--dtype", default=given["dtype"], choices=kinds)
    return made


def where(args: argparse.Namespace, *more: str) -> str:
    """What was measured, and on what."""
    dtype = getattr(args, "dtype", "float32")
    return ", ".join(
        (
            f"{args.variant}, batch {args.batch}, {dtype}; jax {jax.__version__}",
            *more,
            jax.devices()[0].device_kind,
            platform.machine(),
        )
    )


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def rounds(
    programs: Mapping[Any, Callable[[], Any]], number: int
) -> dict[Any, list[float]]:
    """Seconds of every program in every round.

    They take turns within a round, so that a drift of the machine's speed hits all
    alike, and each round begins with another one. The first round warms up.
    """
    times: dict[Any, list[float]] = {name: [] for name in programs}
    order = list(programs)
    for i in range(number + 1):
        first = i % max(1, len(order))
        for name in order[first:] + order[:first]:
            seconds = timed(programs[name])
            if i:
                times[name].append(seconds)
    return times
