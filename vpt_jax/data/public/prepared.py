# SPDX-License-Identifier: Apache-2.0
"""Parts of a benchmark that tfds prepared, decoded once into a memory-mapped cache.

Benchmarks of one source that have the same pictures (location and orientation of
dSprites, two labels of CLEVR, two of SmallNORB) share its files: next to the pictures
lie the labels of all of them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import PIL
from PIL import Image

from vpt_jax.data import cache, pictures, strips
from vpt_jax.data.public import vtab

VERSION = 2  # to be raised when the same files give other pixels or labels
_STRIP = "strip"  # in the place of a rule
_BATCH = 32  # in memory while reading: 0.1 GB of 1000 x 1000 px
_REPORT = 1024  # pictures between lines of text


def arrays(
    row: vtab.Benchmark,
    part: str,
    side: int,
    *,
    rule: str,
    data_dir: str = "",
) -> tuple[np.ndarray, np.ndarray]:
    """The pictures and labels of one part, decoded and resized once.

    `rule` is one of `pictures.RULES`; `crop` resizes pictures that have the side
    already too, as FGVC is evaluated. The others are as in `vtab.load`.

    Returns:
      A read-only memory map uint8 `[n, side, side, 3]`, and int32 `[n]`.

    Raises:
      ValueError: If the data set is missing (with how to prepare it) or damaged, or the
        cache cannot be written.
    """

    def square(pixels: np.ndarray) -> np.ndarray:
        if rule == "crop":
            return pictures.centre_crop(Image.fromarray(pixels), side)
        return pictures.to_square(pixels, side, rule)

    images, info = _cached(row, part, side, rule, square, data_dir)
    return images, np.asarray(info["labels"][row.name], np.int32)


def strip(
    row: vtab.Benchmark,
    part: str,
    side: int,
    *,
    data_dir: str = "",
) -> tuple[strips.Strip, np.ndarray]:
    """The same with room for random crops: the short side to 256/224 of `side`.

    Returns:
      A strip of which the pixels are a read-only memory map, and int32 `[n]`.

    Raises:
      ValueError: As `arrays`, or if a picture is too long, see `pictures.resize_short`.
    """

    def resized(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(pictures.resize_short(Image.fromarray(pixels), side))

    height = pictures.short_side(side)
    pixels, info = _cached(row, part, height, _STRIP, resized, data_dir)
    made = strips.make(pixels, info["length"], info["wide"])
    return made, np.asarray(info["labels"][row.name], np.int32)


def _cached(
    row: vtab.Benchmark,
    part: str,
    height: int,
    rule: str,
    resize: Callable[[np.ndarray], np.ndarray],
    data_dir: str,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Pixels, and what is known of the pictures: labels; in a strip, how they lie."""
    directory = vtab.find(row, data_dir)
    files = sorted(p for p in directory.iterdir() if p.is_file())
    same = row.source, row.picture
    rows = [r for r in vtab.BENCHMARKS.values() if (r.source, r.picture) == same]
    rows = rows if row in rows else [row]
    key = {
        "version": VERSION,
        "pillow": PIL.__version__,
        "height": height,
        "rule": rule,
        # Whose labels are there. Rows that share them have the same list.
        "tasks": [r.name for r in rows],
        # Together with the files, which say how many examples there are: which ones.
        "part": part,
        "cuts": row.source.cuts,
        "files": [
            (str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files
        ],
    }

    def make(write: Callable[[np.ndarray], None]) -> dict[str, Any]:
        labels: dict[str, list[int]] = {r.name: [] for r in rows}
        info: dict[str, Any] = {"labels": labels, "length": [], "wide": []}

        def label_all(example: Any) -> int:
            for r in rows:
                labels[r.name].append(int(r.label(example)))
            return labels[row.name][-1]

        # One pass over the examples, in order: reading them is what takes time.
        examples = vtab.load(row._replace(label=label_all), part, data_dir=data_dir)

        def read() -> Iterator[tuple[int, np.ndarray]]:
            for i in range(num := len(examples)):
                if i % _REPORT == 0:
                    print(f"reading {row.name} {part}: {i:,} of {num:,}, once")
                yield i, examples[i][0]

        def resize_one(example: tuple[int, np.ndarray]) -> np.ndarray:
            try:
                return resize(example[1])
            except ValueError as e:
                where = f"{row.name} {part}, example {example[0]}"
                raise ValueError(f"{where}: {e}") from e

        for picture in pictures.mapped(resize_one, read(), _BATCH):
            wide = picture.shape[1] > picture.shape[0]  # not if it is a square
            picture = picture.swapaxes(0, 1) if wide else picture
            write(picture)
            if rule == _STRIP:
                info["wide"].append(wide)
                info["length"].append(len(picture))
        return info

    folder, glued = cache.default_folder(), rule == _STRIP
    return cache.cached(folder, key, height, make, strip=glued)
