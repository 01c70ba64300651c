# SPDX-License-Identifier: Apache-2.0
r"""What VTAB's resizing rule changes: corners, half pixels, or antialiasing.

python benchmarks/resize_rules.py                              # Fashion-MNIST
python benchmarks/resize_rules.py --zip=cifar10_jpeg.zip       # CIFAR-10 as JPEG files

Two Markdown tables. First, how far pictures are apart at 224 px by `pictures.RULES`,
and how far `corner` is from VPT's formula, and from TensorFlow 1's resize where that is
installed (0.5 is rounding). Second, what the rule does to a linear probe of the demo
backbone (32 px) on pictures that come in another size.

Photographs are what packages have brought along: matplotlib one, scikit-image and
scikit-learn more, if installed. They are cut to the proportions and reduced; those that
are too small are mirrored at their edges, not enlarged. The zip has
test/<class>/<number>.jpg, Fashion-MNIST is that of Debian's dataset-fashion-mnist; the
demo backbone has seen the test pictures of neither. Draws of train, val and test are
disjoint, also between seeds, and the same for all rules.
"""

import argparse
import gzip
import importlib.util
import io
import shlex
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import vpt_jax
from vpt_jax.data import pictures
from vpt_jax.run.probe import extract_features

SIZES = (32, 32), (64, 64), (96, 96), (300, 200), (480, 320), (1242, 375)  # width first
PROBED = (16, 28, 96)  # brought to these, antialiased, before the rule is applied
RULES = ("corner", "half_pixel", "squash")
PAIRS = (RULES[:2], RULES[::2], RULES[1:])
NUM_TRAIN, NUM_VAL, NUM_TEST, SEEDS = 800, 200, 500, 5
FASHION = "/usr/share/datasets/fashion-mnist/t10k-{}-ubyte.gz"
PHOTOS = {
    "matplotlib": "mpl-data/sample_data/grace_hopper.jpg",
    "skimage": "data/astronaut.png data/chelsea.png data/coffee.png data/ihc.png "
    "data/motorcycle_left.png data/rocket.jpg data/hubble_deep_field.jpg "
    "data/retina.jpg",
    "sklearn": "datasets/images/china.jpg datasets/images/flower.jpg",
}


def photos() -> list[Image.Image]:
    """Those of `PHOTOS` that are there."""
    found = []
    for package, names in PHOTOS.items():
        spec = importlib.util.find_spec(package)
        folders = (spec and spec.submodule_search_locations) or ()
        paths = [Path(folder) / name for folder in folders for name in names.split()]
        found += [Image.open(path).convert("RGB") for path in paths if path.exists()]
    return found


def reduced(photo: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """A photograph as if taken in that size (width, height)."""
    lacking = [max(0, a - b) for a, b in zip(size, photo.size, strict=True)]
    pad = (0, lacking[1]), (0, lacking[0]), (0, 0)
    larger = Image.fromarray(np.pad(np.asarray(photo), pad, "symmetric"))
    return np.asarray(ImageOps.fit(larger, size, Image.Resampling.LANCZOS))


def by_formula(picture: np.ndarray, side: int) -> np.ndarray:
    """VPT's rule, pixel by pixel: source = target * in / out, then between two."""
    h, w, _ = picture.shape
    x, out = picture.astype(np.float64), np.empty((side, side, 3))
    for i in range(side):
        top, fy = divmod(i * h / side, 1)
        row = x[int(top)] * (1 - fy) + x[min(int(top) + 1, h - 1)] * fy
        for j in range(side):
            left, fx = divmod(j * w / side, 1)
            out[i, j] = row[int(left)] * (1 - fx) + row[min(int(left) + 1, w - 1)] * fx
    return out


def by_tensorflow(picture: np.ndarray, side: int) -> np.ndarray:
    if not importlib.util.find_spec("tensorflow"):
        return np.full((side, side, 3), np.nan)
    import tensorflow as tf  # pyright: ignore[reportMissingImports]

    return tf.compat.v1.image.resize(picture[None], (side, side))[0].numpy()


def compare_pixels(side: int = 224) -> None:
    """Prints the first table."""
    originals = photos()
    print(f"\n{len(originals)} photographs to {side} x {side}, differences of 255\n")
    columns = " | ".join(f"{a}, {b}: mean / largest" for a, b in PAIRS)
    print("| width x height | half_pixel is right and down of corner by | ", end="")
    print(f"{columns} | corner, formula: largest | corner, TensorFlow |")
    print("|---|---|---|---|---|---|---|")
    for size in SIZES:
        sources = [reduced(photo, size) for photo in originals]
        squares = {
            rule: np.array([pictures.to_square(x, side, rule) for x in sources], float)
            for rule in RULES
        }
        gaps = [np.abs(squares[a] - squares[b]) for a, b in PAIRS]
        cells = [f"{gap.mean():.1f} / {gap.max():.0f}" for gap in gaps]
        for oracle in (by_formula, by_tensorflow):
            gap = np.abs(squares["corner"][0] - oracle(sources[0], side)).max()
            cells.append("not installed" if np.isnan(gap) else f"{gap:.3f}")
        shift = ", ".join(f"{(side / n - 1) / 2:+.2f} px" for n in size)
        print(f"| {size[0]} x {size[1]} | {shift} | {' | '.join(cells)} |")


def read(path: str) -> tuple[np.ndarray, np.ndarray]:
    """The 10,000 test pictures of the zip or of Fashion-MNIST, and their labels."""
    if not path:
        with gzip.open(FASHION.format("images-idx3")) as file:
            images = np.frombuffer(file.read(), np.uint8, offset=16)
        with gzip.open(FASHION.format("labels-idx1")) as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
        return np.repeat(images.reshape(-1, 28, 28, 1), 3, -1), labels
    with zipfile.ZipFile(path) as file:
        names = [n for n in sorted(file.namelist()) if n.endswith(".jpg")]
        names = [n for n in names if n.startswith("test/")]
        images = [Image.open(io.BytesIO(file.read(n))).convert("RGB") for n in names]
    _, labels = np.unique([n.split("/")[1] for n in names], return_inverse=True)
    return np.stack([np.asarray(image) for image in images]), labels


def probe(features: np.ndarray, labels: np.ndarray) -> float:
    """Test accuracy in % of ridge regression; its decay is chosen on val."""
    x = features - features[:NUM_TRAIN].mean(0)
    x, *held_out = np.split(x / x[:NUM_TRAIN].std(0), (NUM_TRAIN, NUM_TRAIN + NUM_VAL))
    y, *right = np.split(labels, (NUM_TRAIN, NUM_TRAIN + NUM_VAL))
    targets = np.eye(labels.max() + 1)[y]
    found = []
    for decay in 10.0 ** np.arange(0, 5, 0.5):
        gram = x.T @ x + decay * np.eye(x.shape[1])
        weights = np.linalg.solve(gram, x.T @ (targets - targets.mean(0)))
        logits = [part @ weights + targets.mean(0) for part in held_out]
        pairs = zip(logits, right, strict=True)
        found.append([float((z.argmax(-1) == k).mean()) for z, k in pairs])
    return 100 * max(found, key=lambda pair: pair[0])[1]


def compare_accuracy(path: str) -> None:
    """Prints the second table."""
    images, labels = read(path)
    num = NUM_TRAIN + NUM_VAL + NUM_TEST
    order = np.random.default_rng(0).permutation(len(labels))[: SEEDS * num]
    images, labels = images[order], labels[order].reshape(SEEDS, num)
    model, backbone = vpt_jax.load_backbone("demo/4")
    name = "CIFAR-10 (JPEG copy)" if path else "Fashion-MNIST"
    print(
        f"\n{name} brought to a size, then to {model.image_size} px; linear probe,"
        f" {NUM_TRAIN} + {NUM_VAL} + {NUM_TEST} pictures; mean accuracy in % over"
        f" {SEEDS} seeds, paired difference ± its standard error\n"
    )
    print(f"| from | {' | '.join(RULES)} | half_pixel - corner | squash - corner |")
    print("|---|---|---|---|---|---|")
    for size in PROBED:
        way = (size, size), Image.Resampling.BICUBIC
        sources = [np.asarray(Image.fromarray(x).resize(*way)) for x in images]
        found = {}
        for rule in RULES:
            squares = [pictures.to_square(x, model.image_size, rule) for x in sources]
            features = extract_features(
                backbone,
                np.stack(squares),
                model=model,
                normalisation="half",
                batch_size=100,
            ).reshape(SEEDS, num, -1)
            found[rule] = np.array([*map(probe, features, labels)])
        cells = [f"{found[rule].mean():.2f}" for rule in RULES]
        for rule in RULES[1:]:
            gap = found[rule] - found["corner"]
            cells.append(f"{gap.mean():+.2f} ± {gap.std(ddof=1) / SEEDS**0.5:.2f}")
        print(f"| {size} x {size} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zip", default="", help="CIFAR-10 as JPEG files")
    args = parser.parse_args()
    print(f"`{shlex.join(['python', 'benchmarks/resize_rules.py', *sys.argv[1:]])}`")
    compare_pixels()
    compare_accuracy(args.zip)


if __name__ == "__main__":
    main()
