# SPDX-License-Identifier: Apache-2.0
"""Weights in several files: `model-00001-of-00003.safetensors` and their index."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from vpt_jax.weights.readers import Arrays, CheckpointError, open_arrays
from vpt_jax.weights.remote import local_path

MAX_SHARDS = 1000
_SHARD = re.compile(r"(?P<stem>.*)-(?P<i>\d{5})-of-(?P<n>\d{5})(?P<end>\.\w+)")
_INDEX = re.compile(r".*\.(safetensors|bin)\.index\.json")


@contextlib.contextmanager
def open_weights(path: str | os.PathLike) -> Iterator[Arrays]:
    """`open_arrays` of a file or address; of a shard or an index, of all shards.

    Raises CheckpointError also if a shard is absent, or an array lies in two.
    """
    folder, slash, _ = os.fspath(path).rpartition("/")
    names = _siblings(path)
    with contextlib.ExitStack() as stack:
        if not names:
            yield stack.enter_context(open_arrays(local_path(path)))
            return
        arrays, metadata = {}, {}
        for name in names:
            # Of an address too: every shard lies where the first one lies.
            local = local_path(f"{folder}{slash}{name}")
            file = stack.enter_context(open_arrays(local))
            if twice := sorted(arrays.keys() & file.arrays.keys()):
                raise CheckpointError(
                    f"{path}: {twice[0][:80]!r} lies in {name} and in another shard;"
                    " expected every array once. Download all shards again."
                )
            arrays |= file.arrays
            metadata |= file.metadata
        yield Arrays(arrays, metadata)


def _siblings(path: str | os.PathLike) -> list[str]:
    """The names of all shards; none for a file that is whole."""
    name = os.fspath(path).rpartition("/")[2]
    if shard := _SHARD.fullmatch(name):
        number = int(shard["n"])
        if not 0 < number <= MAX_SHARDS:
            raise CheckpointError(
                f"{path} is one of {number} shards; expected 1 to {MAX_SHARDS}."
            )
        every = range(1, number + 1)
        return [f"{shard['stem']}-{i:05d}-of-{shard['n']}{shard['end']}" for i in every]
    return _listed(local_path(path), path) if _INDEX.fullmatch(name) else []


def _listed(index: Path, path: str | os.PathLike) -> list[str]:
    """The shards that an index lists; names only, never a path elsewhere."""
    try:
        with open(index, "rb") as file:
            listed = json.loads(file.read(64 << 20))["weight_map"].values()
        names = sorted(set(listed))
    except FileNotFoundError:
        raise CheckpointError(f"no such file: {path}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        names = []
    if not 0 < len(names) <= MAX_SHARDS or not all(_SHARD.fullmatch(n) for n in names):
        raise CheckpointError(
            f"{path} is no index of shards; expected JSON with a weight_map to names"
            " such as model-00001-of-00002.safetensors."
        )
    if any("/" in n or "\\" in n for n in names):
        raise CheckpointError(f"{path} lists shards in other folders, expected names.")
    return names
