# SPDX-License-Identifier: Apache-2.0
"""Reads what `prepare.py` prepared through vpt_jax: `python read_back.py FOLDER`.

Leaves FOLDER/read_back.json: of each file format and benchmark, the digest of the
picture and the label of every example of every part, in order; and how far the pictures
of whole splits are from TensorFlow's. Fails if TensorFlow was imported on the way.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from vpt_jax.data.public import records, vtab


def digest(picture):
    return hashlib.sha256(repr(picture.shape).encode() + picture.tobytes()).hexdigest()


def parts(benchmark, folder):
    directory = vtab.find(benchmark, str(folder))
    known = vtab.part_runs(benchmark, records.split_sizes(directory))
    read = {part: vtab.load(benchmark, part, data_dir=str(folder)) for part in known}
    return {
        part: [(digest(picture), label) for picture, label in pictures]
        for part, pictures in read.items()
    }


def distance(benchmark, folder, split, path):
    """Largest and mean difference from TensorFlow's pictures, and names with labels.

    TensorFlow read the TFRecord files, so that only those can be compared in order.
    """
    examples = records.open_split(vtab.find(benchmark, str(folder)), split)
    worst, means, names = 0, [], []
    with np.load(path) as theirs:
        assert len(theirs.files) == len(examples), (len(theirs.files), len(examples))
        for i, example in enumerate(examples):
            if folder.name == "tfrecord":
                mine = benchmark.picture(example)
                other = theirs[str(i)].astype(np.int16)
                if benchmark.source.name == "dsprites":
                    other = other * 255
                assert mine.shape == other.shape, (mine.shape, other.shape)
                gap = np.abs(mine - other)
                worst, means = max(worst, int(gap.max())), [*means, float(gap.mean())]
            name = example.get("name", example.get("file_name", b""))
            if "label" in example:
                names.append((name.decode(), int(example["label"])))
    return {"worst": worst, "mean": float(np.mean(means or [0])), "names": names}


def main(folder):
    expected = json.loads((folder / "expected.json").read_text())
    chosen = [b for b in vtab.BENCHMARKS.values() if b.source.name in expected]
    found: dict = {"parts": {}, "distances": {}}
    for form in ("array_record", "tfrecord"):
        found["parts"][form] = {b.name: parts(b, folder / form) for b in chosen}
        found["distances"][form] = {
            b.source.name: {
                split: distance(b, folder / form, split, path)
                for split, path in expected[b.source.name]["read"].items()
            }
            for b in chosen
        }
    assert "tensorflow" not in sys.modules
    (folder / "read_back.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
