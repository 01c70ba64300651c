# SPDX-License-Identifier: Apache-2.0
"""Runs the real tfds builders on raw fixtures: `python prepare.py FOLDER [NAME...]`.

Leaves FOLDER/array_record and FOLDER/tfrecord, each a tfds data folder, and
FOLDER/expected.json: for each builder what `raw_fixtures` says of its examples, and
what TensorFlow reads, in order. This is the only part of the tests that imports it.
"""

import json
import os
import sys
from pathlib import Path
from unittest import mock

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import raw_fixtures

# First, as in vpt_jax/data/public/builders.py, which says why.
import tensorflow  # noqa: F401
import tensorflow_datasets as tfds

import vpt_jax.data.public.nabirds  # noqa: F401  registers our own builder

SHARDS = 3


def prepare(name, raw, folder, file_format):
    """Prepares a builder as a user would, but for the downloads."""
    patches = {
        method: lambda self, *args, **kwargs: raw.result
        for method in ("download", "download_and_extract")
    }
    if raw.download:
        patches["download"] = lambda self, urls, *args, **kwargs: raw.download(urls)
    if raw.extract:
        patches["extract"] = lambda self, *args, **kwargs: raw.extract
    if raw.manual:
        patches["manual_dir"] = raw.manual
    config = tfds.download.DownloadConfig(num_shards=SHARDS, try_download_gcs=False)
    builder = tfds.builder(name, data_dir=folder, file_format=file_format)
    with mock.patch.multiple(tfds.download.DownloadManager, **patches):
        builder.download_and_prepare(download_config=config)


def picture(example):
    """The picture as VTAB's wrapper in TensorFlow gives it to the model."""
    image = example["image"]
    return np.repeat(image, 3, -1) if image.shape[-1] == 1 else image


def main(folder, names):
    expected = {}
    for name in names or raw_fixtures.MAKERS:
        home = folder / "raw" / name.replace("/", "_")
        home.mkdir(parents=True)
        raw = raw_fixtures.MAKERS[name](home, np.random.default_rng(0))
        for file_format in ("array_record", "tfrecord"):
            prepare(name, raw, folder / file_format, file_format)
        builder = tfds.builder(name, data_dir=folder / "tfrecord")
        splits = builder.info.splits
        read, np_dir = {}, folder / "read"
        np_dir.mkdir(exist_ok=True)
        for split in splits:
            # One file after the other: tf.data would read several at once.
            files = tfds.ReadConfig(interleave_cycle_length=1)
            dataset = builder.as_dataset(split=split, read_config=files)
            pictures = [picture(example) for example in tfds.as_numpy(dataset)]
            path = np_dir / f"{name.replace('/', '_')}-{split}.npz"
            np.savez(path, **{str(i): x for i, x in enumerate(pictures)})
            read[split] = str(path)
        expected[name] = {
            "examples": raw.examples,
            "named": raw.named,
            "read": read,
            "shards": {split: splits[split].num_shards for split in splits},
        }
    (folder / "expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
