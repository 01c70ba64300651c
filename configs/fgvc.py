# SPDX-License-Identifier: Apache-2.0
r"""FGVC with VPT-Deep and Prompt Condensation: birds (two sets), flowers, dogs, cars.

python -m vpt_jax.main --config=configs/fgvc.py \
    --config.backbone.checkpoint=ViT-B_16.npz --workdir=out/fgvc

For each of the five sets: 36 pairs of rate and decay are tried on train and judged on
val after the last epoch; then five seeds train with the best pair on train, are
condensed, fine-tuned, and tested once. VPT's scripts have one such run and choose by
hand. Its lists of train and val are lost: ours are the first 90 % and the rest of
tensorflow-datasets' hashed order, of the same sizes. A linear probe, on features of
centre crops, has a grid of its own.

Training pictures are resized to 256 px on the short side and cropped and flipped at
random on the device, where a whole set stays (NABirds: 5.6 GB); val and test are
centre crops.

The same command goes on where it stopped; `--list` shows how far it is;
`--launcher=ray` or `--launcher=slurm` spreads the runs over machines. After the file's
name, separated by commas:

    task=cub      one set (may be repeated)
    published     no grid: one sensible default (VPT published no rates for these)
    smoke         a trial of the whole way on the small backbone of the package

The data sets must have been prepared by tensorflow-datasets in ~/tensorflow_datasets,
$TFDS_DATA_DIR or --config.task.data_dir: `python -m vpt_jax.data list`.
"""

from ml_collections import ConfigDict

from vpt_jax.bench.benchmark_config import shorten, vpt, words
from vpt_jax.data.public.vtab import BENCHMARKS

TASKS = tuple(name for name, row in BENCHMARKS.items() if row.group == "fgvc")

DEFAULT = (2.5, 1e-4)  # the middle of VPT's grid


def get_config(arg: str = "") -> ConfigDict:
    """See the module's docstring for `arg`."""
    names, given = words(arg, TASKS, ("published", "smoke"))
    own = {
        name: {
            "num_prompts": BENCHMARKS[name].prompts,
            # Used in mode published.
            "base_lr": DEFAULT[0],
            "weight_decay": DEFAULT[1],
        }
        for name in names or TASKS
    }
    c = vpt("fgvc", "published" if "published" in given else "sweep", own)
    c.benchmark.rates = c.benchmark.rates[:-1]  # VPT's grid for FGVC ends at 0.1
    c.benchmark.final_splits = "all"  # as VPT: trained on train, not on val too
    if "smoke" in given:
        shorten(c, image_size=16)
    return c
