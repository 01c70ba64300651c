# SPDX-License-Identifier: Apache-2.0
"""NABirds, which tfds has no builder for: from the publisher's files to tfds' format.

The archive of https://dl.allaboutbirds.org/nabirds unpacks to a folder `nabirds` of
text files with a line for each picture, which begins with the picture's uuid, and of
`images/`. Classes are 555 ids of a tree of 1,011; in order of their numbers they become
0 to 554, as VPT numbers them. Bounding boxes, parts and photographers are left out.

Importing this registers the builder. Only preparing does: reading needs no class.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

CLASSES = 555
_AGAIN = "unpack the publisher's archive again."


class Picture(NamedTuple):
    """A picture of the publisher's folder."""

    path: Path
    label: int  # 0 to 554
    train: bool


def _table(path: Path, kind: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Uuid to value, of a file of lines `uuid value`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or e
        raise ValueError(
            f"{path}: got no text file ({reason}); expected lines of a uuid and "
            f"{kind}; {_AGAIN}"
        ) from e
    table = {}
    for number, line in enumerate(lines, 1):
        uuid, _, text = line.strip().partition(" ")
        try:
            value = parse(text)
        except ValueError as e:
            raise ValueError(
                f"{path}:{number}: got {line!r}; expected a uuid and {kind}; {_AGAIN}"
            ) from e
        if uuid in table:
            raise ValueError(
                f"{path}:{number}: got uuid {uuid} again; expected it once; {_AGAIN}"
            )
        table[uuid] = value
    return table


def _path(text: str) -> str:
    path = PurePosixPath(text)
    if not text or path.is_absolute() or ".." in path.parts:
        raise ValueError(text)
    return text


def _bit(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(text)
    return text == "1"


def read_lists(folder: Path, classes: int = CLASSES) -> dict[str, Picture]:
    """Reads the publisher's lists, and looks whether every picture is there.

    Args:
      folder: Of `images.txt`, `image_class_labels.txt`, `train_test_split.txt` and
        `images/`.
      classes: How many there must be.

    Returns:
      Uuid to picture.

    Raises:
      ValueError: If a file is missing or has a line of another form, the files are
        about different pictures, there are more or fewer classes, or a picture is not
        there.
    """
    names = "images.txt", "image_class_labels.txt", "train_test_split.txt"
    files = [folder / name for name in names]
    paths = _table(files[0], "a path below images/", _path)
    ids = _table(files[1], "a class id", int)
    train = _table(files[2], "0 or 1", _bit)
    for other, table in ((files[1], ids), (files[2], train)):
        differing = sorted(paths.keys() ^ table.keys())
        if differing:
            raise ValueError(
                f"{other}: got {len(table)} uuids, {len(differing)} of them or of "
                f"{len(paths)} in images.txt without counterpart, such as "
                f"{differing[0]!r}; expected the same in both; {_AGAIN}"
            )
    # By number: as text, '1003' would come before '295'.
    order = {number: k for k, number in enumerate(sorted(set(ids.values())))}
    if len(order) != classes:
        raise ValueError(
            f"{files[1]}: got {len(order)} classes; expected {classes}, as labels are "
            f"numbered by them; {_AGAIN}"
        )
    pictures = {
        uuid: Picture(folder / "images" / path, order[ids[uuid]], train[uuid])
        for uuid, path in paths.items()
    }
    missing = [p.path for p in pictures.values() if not p.path.is_file()]
    if missing:
        raise ValueError(
            f"{missing[0]}: got no such file, nor {len(missing) - 1} others of "
            f"images.txt; expected all {len(pictures)} pictures; {_AGAIN}"
        )
    return pictures


class NABirds(tfds.core.GeneratorBasedBuilder):
    """The tfds builder of NABirds; pictures keep the bytes of their files."""

    name = "nabirds"
    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Get the archive of https://dl.allaboutbirds.org/nabirds from the Cornell Lab "
        "of Ornithology and unpack it here, so that there is nabirds/images.txt."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="400 bird species of North America in 555 visual categories.",
            homepage="https://dl.allaboutbirds.org/nabirds",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "image/filename": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(num_classes=CLASSES),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> Mapping[str, Any]:
        pictures = read_lists(Path(dl_manager.manual_dir) / "nabirds")
        return {
            split: self._generate_examples(
                {key: p for key, p in pictures.items() if p.train == train}
            )
            for split, train in (("train", True), ("test", False))
        }

    def _generate_examples(
        self, pictures: Mapping[str, Picture]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for uuid, (path, label, _) in pictures.items():
            data = path.read_bytes()
            if not data.startswith(b"\xff\xd8"):
                raise ValueError(
                    f"{path}: got {len(data)} bytes that are no JPEG picture; expected "
                    f"one; {_AGAIN}"
                )
            name = f"{path.parent.name}/{path.name}"
            yield uuid, {"image": data, "image/filename": name, "label": label}
