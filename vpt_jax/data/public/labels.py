# SPDX-License-Identifier: Apache-2.0
"""VTAB's labels and pictures of one decoded tfds example.

The rules of google-research/task_adaptation, which VPT copied. An example is what
`records.Examples` gives: a dict of tfds' features.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vpt_jax.files.messages import mismatch

Example = Mapping[str, Any]

# A class is the last threshold below the value; a value on a threshold is in the
# class before it.
CLEVR_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)  # the renderer's own units
KITTI_DISTANCES = (-100.0, 8.0, 20.0, 999.0)  # m
_NO_VEHICLE = 1000.0  # m: beyond the last threshold, a class of its own
_VEHICLES = 3  # types 0 to 2: car, van, truck


def _last_below(thresholds: Sequence[float], value: np.float32) -> int:
    """Index of the last threshold strictly below `value`, compared in float32."""
    return int(np.sum(np.array(thresholds, np.float32) < value)) - 1


def _depths(points: Any) -> np.ndarray:
    """float32 `[n]`: the third value of each point; there may be none."""
    return np.asarray(points, np.float32).reshape(-1, 3)[:, 2]


def stored(name: str) -> Callable[[Example], int]:
    """The rule that takes the label as it is stored under `name`."""
    return lambda example: int(example[name])


def clevr_count(example: Example) -> int:
    """How many objects there are, 3 to 10: classes 0 to 7."""
    return len(_depths(example["objects"]["pixel_coords"])) - 3


def clevr_distance(example: Example) -> int:
    """How far the nearest object is: classes 0 to 5; ValueError if there is none."""
    depths = _depths(example["objects"]["pixel_coords"])
    return _last_below(CLEVR_DISTANCES, depths.min())


def kitti_distance(example: Example) -> int:
    """How far the nearest car, van or truck is: classes 0 to 3, 3 for none."""
    kinds = np.asarray(example["objects"]["type"], np.int64).reshape(-1)
    vehicles = _depths(example["objects"]["location"])[kinds < _VEHICLES]
    nearest = vehicles.min(initial=np.float32(_NO_VEHICLE))
    return _last_below(KITTI_DISTANCES, nearest)


def binned(name: str, values: int, bins: int) -> Callable[[Example], int]:
    """The rule that cuts a stored label of `values` values into `bins` classes.

    In float32, as in the reference. Where `bins` does not divide `values`, classes
    differ in size: 40 orientations in 16 classes are 3, 2, 3, 2, ... of them.
    """
    width = np.float32(values / bins)
    return lambda example: int(np.floor(np.float32(example[name]) / width))


def picture(example: Example) -> np.ndarray:
    """The picture, uint8 `[h, w, 3]`; a grey one is repeated to three channels."""
    image = np.asarray(example["image"])
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image


def binary_picture(example: Example) -> np.ndarray:
    """A picture of zeros and ones, as of 0 and 255; ValueError if it has others."""
    image = picture(example)
    if image.max(initial=0) > 1:
        got = f"a picture with values up to {image.max()}"
        raise mismatch("", got, "0 and 1 only", "prepare the data set again")
    return image * np.uint8(255)
