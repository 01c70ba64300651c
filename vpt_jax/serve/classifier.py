# SPDX-License-Identifier: Apache-2.0
"""Answers for pictures: a released file with its backbone, preprocessing included.

`load_classifier` takes a released file, a run's folder (its best model, see
`experiment.best`) or a folder of the hub; `Classifier.predict` takes paths, PIL images
and uint8 arrays, and `Classifier.stream` any number of them in bounded memory.
"""

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vpt_jax import parallel, train
from vpt_jax.data import pictures
from vpt_jax.files.messages import shown
from vpt_jax.models.inputs import prefill
from vpt_jax.models.swin import Swin
from vpt_jax.models.vit import ViT
from vpt_jax.prompts import check_choice
from vpt_jax.weights import checkpoint, release

BEST = "best.json"


class Answers(NamedTuple):
    """Of each picture: its class's name, and the probabilities of all, `[n, k]`."""

    labels: list[str]
    probabilities: np.ndarray


class Classifier:
    """A model that answers for pictures; `load_classifier` makes one.

    Attributes:
      model: The network; `image_size` is the side that pictures get.
      class_names: Of the columns of probabilities.
      header: What the released file says.
      resize: How a picture becomes a square, one of `data.pictures.RULES`.
      recipe, parameters: What `train.predict` takes.

    Example:
      >>> classifier = load_classifier("mine.safetensors")
      >>> classifier
      Classifier(demo/4, 10 classes, 12 prompts, 32 px, crop)
      >>> labels, probabilities = classifier.predict(np.zeros((32, 32, 3), np.uint8))
      >>> len(labels), probabilities.shape
      (1, (1, 10))
    """

    def __init__(
        self, model: ViT | Swin, backbone: Any, file: release.PromptFile, resize: str
    ):
        self.model, self.header = model, file.header
        self.class_names: tuple[str, ...] = tuple(file.header["class_names"])
        self.resize = resize
        self.recipe = train.Recipe(
            deep=self.header["deep"], normalisation=self.header["normalisation"]
        )
        prompts = file.prompts
        if self.recipe.deep:  # their keys and values do not depend on the picture
            prompts = prefill(model, backbone, prompts)
        self.parameters = parallel.put_whole(
            ({"prompts": prompts, "head": file.head}, backbone), parallel.all_devices()
        )

    def __repr__(self) -> str:
        return (
            f"Classifier({release.variant_of(self.header)},"
            f" {len(self.class_names)} classes, {sum(self.header['counts'])} prompts,"
            f" {self.model.image_size} px, {self.resize})"
        )

    def predict(self, images: Any, *, batch_size: int = 64) -> Answers:
        """Labels and probabilities of pictures.

        Args:
          images: One picture or several: paths, PIL images, or uint8 arrays
            `[h, w, 3]` or `[h, w]` as they are in a file: of any size, not normalised.
            Or one uint8 array `[n, h, w, 3]`.
          batch_size: Pictures at a time.

        Raises:
          ValueError: If one cannot be read; it names the first.

        Example:
          >>> classifier.predict(["1.jpg", "2.jpg"]).probabilities.shape
          (2, 10)
        """
        found = []
        for _, answer in self.stream(_several(images), batch_size=batch_size):
            if isinstance(answer, ValueError):
                raise answer
            found.append(answer)
        shape = (0, len(self.class_names))
        probabilities = np.stack(found) if found else np.zeros(shape, np.float32)
        labels = [self.class_names[k] for k in probabilities.argmax(-1)]
        return Answers(labels, probabilities)

    def stream(
        self, images: Iterable[Any], *, batch_size: int = 64
    ) -> Iterator[tuple[Any, np.ndarray | ValueError]]:
        """Answers for any number of pictures, in order, in bounded memory.

        Pictures are decoded in parallel, and while the device computes.

        Args:
          images: As `predict`, in any iterable.
          batch_size: Pictures that are decoded and computed at a time.

        Yields:
          The picture as given, and its probabilities `[k]`, or what is wrong with it.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1.")
        before: Iterable[Any] = ()
        images = iter(images)
        with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
            while chunk := list(itertools.islice(images, batch_size)):
                with pictures.quiet():  # the filters of warnings are the process's
                    squares = list(pool.map(self._square, chunk))
                begun = _together(chunk, squares, self._begin(squares))
                yield from before
                before = begun
            yield from before

    def _square(self, picture: Any) -> np.ndarray | ValueError:
        """uint8 `[side, side, 3]`, as the run made it, or what is wrong."""
        side = self.model.image_size
        try:
            if isinstance(picture, str | os.PathLike):
                return pictures.read_picture(picture, side, self.resize)
            if isinstance(picture, Image.Image):
                return pictures.square(picture, side, self.resize)
            return pictures.to_square(_pixels(picture), side, self.resize)
        except ValueError as error:
            return error

    @parallel.everywhere()
    def _begin(self, squares: Sequence[np.ndarray | ValueError]) -> jax.Array | None:
        """Starts computing the answers of those that could be read."""
        good = [x for x in squares if isinstance(x, np.ndarray)]
        if not good:
            return None
        # A few sizes only, each compiled once: powers of two.
        size = parallel.round_up(1 << (len(good) - 1).bit_length())
        batch = np.zeros((size, *good[0].shape), np.uint8)
        batch[: len(good)] = good
        return train.probabilities(
            *self.parameters,
            parallel.feed(batch),
            model=self.model,
            recipe=self.recipe,
        )


def _together(
    chunk: Sequence[Any],
    squares: Sequence[np.ndarray | ValueError],
    found: jax.Array | None,
) -> Iterator[tuple[Any, np.ndarray | ValueError]]:
    rows = iter(() if found is None else np.asarray(found))
    for picture, square in zip(chunk, squares, strict=True):
        yield picture, square if isinstance(square, ValueError) else next(rows)


def _several(given: Any) -> Iterable[Any]:
    """Pictures one by one, of one or several."""
    if isinstance(given, str | os.PathLike | Image.Image):
        return [given]
    shape = np.shape(given) if hasattr(given, "ndim") else None
    one = shape is not None and (len(shape) < 3 or (len(shape) == 3 and shape[-1] < 5))
    return [given] if one or not isinstance(given, Iterable) else given


def _pixels(picture: Any) -> np.ndarray:
    """A uint8 picture of one or three channels; ValueError for anything else."""
    pixels = np.asarray(picture)
    channels = pixels.shape[2:] in ((), (3,)) and pixels.ndim >= 2 and pixels.size > 0
    if pixels.dtype != np.uint8 or not channels:
        raise ValueError(
            f"got a picture of type {type(picture).__name__}, {pixels.dtype}"
            f" {list(pixels.shape)}; expected a path, a PIL image, or uint8 [h, w, 3]"
            " or [h, w] as in a file, not normalised."
        )
    return pixels


def load_classifier(
    path: str | os.PathLike, *, backbone: str | os.PathLike = "", resize: str = ""
) -> Classifier:
    """Loads a released file, with its backbone, ready to answer for pictures.

    Args:
      path: A file that `save_prompts` wrote; or the folder of a finished run: then the
        model that was best on its validation set, see `best.json` there; or a shared
        folder, here or on the hub: `hf://ORG/NAME`.
      backbone: Path or address of the backbone's file. Default: where the file says it
        came from, or a file of that name beside it or in the current folder.
      resize: How pictures become squares, one of `data.pictures.RULES`; for files of
        earlier versions, which do not say it.

    Raises:
      ValueError: If there is no such file, it is damaged, its backbone is not found or
        is another one, or how to resize is not known.

    Example:
      >>> classifier = load_classifier("mine.safetensors")  # or a run: "out/demo"
      >>> labels, probabilities = classifier.predict(["1.jpg", "2.jpg"])
      >>> len(labels), probabilities.shape
      (2, (2, 10))
    """
    file, local = find(path)
    header = release.load_prompts(file).header
    rule = resize or header.get("resize", "")
    if not rule:
        raise ValueError(
            f"{file} is of an earlier version and does not say how pictures become"
            " squares; pass resize='crop' (class folders), 'squash' (lists, npz) or"
            " 'corner' (VTAB-1k), as the run had it; --resize for the command."
        )
    check_choice("resize", rule, pictures.RULES)
    source = _backbone_of(file, header, backbone, local)
    load = {"readout": header["readout"], **header.get("load", {})}
    load["dtype"] = jnp.dtype(load.get("dtype", "float32"))
    model, params = checkpoint.load_backbone(
        header["variant"], source, image_size=header["image_size"], **load
    )
    model = release.with_fields(file, model, header.get("model", {}))
    return Classifier(model, params, release.load_prompts(file, backbone=params), rule)


def find(path: str | os.PathLike) -> tuple[Path, str]:
    """The released file for a path, and where the backbone lay when it was made."""
    path = release.file_of(path)
    if not path.is_dir():
        if not path.exists():
            raise ValueError(
                f"no such file or folder: {path}; expected released prompts"
                " (prompts/NAME.safetensors of a run) or the folder of a run."
            )
        note = path.parent.parent / BEST  # of the run that it is still part of
        return path, _note(note).get("backbone", "") if note.is_file() else ""
    if not (path / BEST).is_file():
        raise ValueError(
            f"{path} has no {BEST}; expected the folder of a finished run. Give the"
            " command that made it again, or pass one of its prompts/*.safetensors."
        )
    note = _note(path / BEST)
    return path / note["prompts"], note["backbone"]


def _note(path: Path) -> dict[str, str]:
    """The words in a `best.json`."""
    try:
        note = dict(json.loads(path.read_bytes()))
        for name in ("prompts", "backbone"):
            if ".." in Path(note[name]).parts or Path(note["prompts"]).is_absolute():
                raise ValueError(f"has {name} {shown(note[name])}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); expected what a run writes. Give the run's"
            " command again."
        ) from error
    return note


def _backbone_of(
    file: Path, header: Mapping[str, Any], given: str | os.PathLike, local: str
) -> str | os.PathLike:
    """Path or address of the backbone that a file belongs to; '' is the package's."""
    if given:
        return given
    source = header.get("source") or header["backbone"]
    shipped = source == "demo" and header["variant"] == "demo/4"
    if shipped or release.is_address(source):
        return "" if shipped else source
    name = Path(source).name
    places = [file.parent / name, Path(name)]
    if local:
        places.insert(0, Path(local))
    for place in places:
        if place.is_file():
            return place
    raise ValueError(
        f"{file} needs the backbone {shown(source)} ({release.variant_of(header)}),"
        f" which is not at {' nor '.join(map(str, places))}; pass its path or address"
        " (docs/backbones.md) as backbone=, or --backbone for the command."
    )
