# SPDX-License-Identifier: Apache-2.0
"""NABirds, which tfds has no builder for: from the publisher's files to tfds' format.

The archive of https://dl.allaboutbirds.org/nabirds unpacks to a folder `nabirds` of
text files with a line for each picture, which begins with the picture's uuid, and of
`images/`. Classes are 555 ids of a tree of 1,011; in order of their numbers they become
0 to 554, as VPT numbers them. Bounding boxes, parts and photographers are left out.

Importing this registers the builder. Only preparing does: reading needs no class.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from vpt_jax.data import lists
from vpt_jax.files.messages import mismatch

CLASSES = 555


def read_lists(folder: Path, classes: int = CLASSES) -> dict[str, lists.Picture]:
    """Reads the publisher's lists: uuid to picture.

    Raises:
      ValueError: As `lists.read_cub`, or if there are more or fewer classes, or a
        picture is not there.
    """
    pictures, numbers = lists.read_cub(folder)
    if len(numbers) != classes:
        expected = f"{classes}, as labels are numbered by them"
        got, file = f"{len(numbers)} classes", folder / lists.CUB[1]
        raise mismatch(file, got, expected, lists.AGAIN)
    missing = [p.path for p in pictures.values() if not p.path.is_file()]
    if missing:
        got = f"no such file, nor {len(missing) - 1} others of images.txt"
        raise mismatch(missing[0], got, f"all {len(pictures)} pictures", lists.AGAIN)
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
            "train": self._generate_examples(pictures, True),
            "test": self._generate_examples(pictures, False),
        }

    def _generate_examples(
        self, pictures: Mapping[str, lists.Picture], train: bool
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for uuid, (path, label, is_train) in pictures.items():
            if is_train != train:
                continue
            data = path.read_bytes()
            if not data.startswith(b"\xff\xd8"):
                got = f"{len(data)} bytes that are no JPEG picture"
                raise mismatch(path, got, "one", lists.AGAIN)
            name = f"{path.parent.name}/{path.name}"
            yield uuid, {"image": data, "image/filename": name, "label": label}
