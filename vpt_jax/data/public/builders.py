# SPDX-License-Identifier: Apache-2.0
"""Runs the tfds builder of a benchmark's data set, in this process.

The only part of the package that imports TensorFlow, and only when it prepares.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

from vpt_jax.data.public import vtab
from vpt_jax.files.messages import mismatch

# The extra `prepare`, as imported. tfds imports what a builder needs when it needs it:
# that is after the download.
_NEEDED = ("tensorflow", "h5py", "cv2")


def require(row: vtab.Benchmark, data_dir: str = "") -> None:
    """Looks, before anything is downloaded, whether a data set can be prepared.

    Raises:
      ValueError: If files that are fetched by hand are not there, or a package that
        builders need is not installed.
    """
    folder = vtab.manual_folder(data_dir)
    lacking = [name for name in row.source.files if not (folder / name).exists()]
    if lacking:
        got, by_hand = f"no {', '.join(lacking)} in {folder}", "what is fetched by hand"
        raise mismatch(row.name, got, by_hand, row.source.manual)
    if row.source.own:
        return
    lacking = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        got = ", ".join(lacking)
        remedy = "pip install tensorflow h5py opencv-python-headless"
        expected = "those that tfds prepares with"
        raise mismatch(row.name, f"no package {got}", expected, remedy)


def prepare(row: vtab.Benchmark, data_dir: str = "") -> Path:
    """Downloads and prepares the data set of a benchmark, as ArrayRecord files.

    Returns:
      The directory of the version that was prepared, in the first of
      `vtab.data_dirs`. It appears when it is whole.

    Raises:
      ValueError: If the version is not one that `vtab` accepts, or our own builder
        does not get its files. tfds' builders raise errors of many kinds.
    """
    root = str(vtab.data_dirs(data_dir)[0])
    _builder(row.source, root).download_and_prepare()
    return vtab.find(row, root)


def _builder(source: vtab.Source, root: str) -> Any:
    if source.own:
        from vpt_jax.data.public import nabirds

        return nabirds.NABirds(data_dir=root, file_format="array_record")
    # TensorFlow first: importing it changes the state of NumPy's generator, and tfds
    # would do so between seeding and drawing caltech101's train split, which then
    # shares most pictures of the test split.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf  # pyright: ignore[reportMissingModuleSource]
    import tensorflow_datasets as tfds

    # It would take a GPU's whole memory from who trains there.
    tf.config.set_visible_devices([], "GPU")
    return tfds.builder(source.name, data_dir=root, file_format="array_record")
