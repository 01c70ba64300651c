# SPDX-License-Identifier: Apache-2.0
r"""Makes the asset `sign_digits.npz` from a folder of pictures.

python -m scripts.sign_digits sign_digits vpt_jax/assets/sign_digits.npz

The folder has `train`, `val` and `test`, each with a folder of pictures per class, as
cut from https://github.com/ardamavi/Sign-Language-Digits-Dataset (Apache-2.0). The
asset has all pictures, in that order, as 32 px tiles of one JPEG: its blocks of 8 px
end where tiles do, so that no picture leaks into another.
"""

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image

from vpt_jax.data.pictures import read_picture
from vpt_jax.files import durable

SIDE, COLUMNS = 32, 50


def main() -> None:
    """Reads, joins, writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    files = [
        path
        for split in ("train", "val", "test")
        for path in sorted(args.folder.glob(f"{split}/*/*"), key=lambda path: path.name)
    ]
    tiles = np.stack([read_picture(path, SIDE, "crop") for path in files])
    labels = np.array([int(path.parent.name) for path in files], np.uint8)
    rows = tiles.reshape(-1, COLUMNS, SIDE, SIDE, 3).transpose(0, 2, 1, 3, 4)
    mosaic = Image.fromarray(rows.reshape(-1, COLUMNS * SIDE, 3))
    with io.BytesIO() as file:
        mosaic.save(file, "JPEG", quality=95, subsampling=0, optimize=True)
        jpeg = np.frombuffer(file.getvalue(), np.uint8)
    with durable.atomic_path(args.out) as path, open(path, "wb") as file:
        np.savez(file, jpeg=jpeg, labels=labels)
    print(f"{args.out}: {len(files)} pictures, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
