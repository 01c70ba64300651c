# SPDX-License-Identifier: Apache-2.0
"""Parts of a benchmark that tfds prepared, as squares in a memory-mapped cache."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL

from vpt_jax.data import cache, pictures, vtab

VERSION = 1  # to be raised when the same files give other pixels
_BATCH = 256  # pictures in memory while reading


def arrays(
    row: vtab.Benchmark,
    part: str,
    side: int,
    *,
    rule: str,
    data_dir: str = "",
    report: Callable[[str], None] = print,
) -> tuple[np.ndarray, np.ndarray]:
    """The pictures and labels of one part, decoded and resized once.

    Args:
      row: Of `vtab.BENCHMARKS`.
      part: One of `vtab.PARTS` or, for VTAB, of `vtab.PARTS_1K`.
      side: Height and width of the pictures in px.
      rule: One of `pictures.RULES`.
      data_dir: As in `vtab.data_dirs`.
      report: Called with lines of text while reading.

    Returns:
      A read-only memory map uint8 `[n, side, side, 3]`, and int32 `[n]`.

    Raises:
      ValueError: If the data set is missing (with how to prepare it) or damaged, or the
        cache cannot be written.
    """
    directory = vtab.find(row, data_dir)
    files = sorted(p for p in directory.iterdir() if p.is_file())
    key = {
        "version": VERSION,
        "pillow": PIL.__version__,
        "side": side,
        "rule": rule,
        "task": row.name,
        "part": part,
        "files": [
            (str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files
        ],
    }

    def make(write: Callable[[np.ndarray], None]) -> list[int]:
        examples = vtab.load(row, part, data_dir=data_dir)
        num, labels = len(examples), []
        square = functools.partial(pictures.to_square, side=side, rule=rule)
        with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
            for start in range(0, num, _BATCH):
                report(f"reading {row.name} {part}: {start:,} of {num:,}, once")
                # One thread reads the files, several resize.
                batch = [examples[i] for i in range(start, min(start + _BATCH, num))]
                for done in pool.map(square, [picture for picture, _ in batch]):
                    write(done)
                labels += [int(label) for _, label in batch]
        return labels

    images, labels = cache.cached(cache.default_folder(), key, side, make, report)
    return images, np.asarray(labels, np.int32)
