# SPDX-License-Identifier: Apache-2.0
r"""VTAB-1k with VPT-Deep and Prompt Condensation, by the field's protocol.

python -m vpt_jax.main --config=configs/vtab.py \
    --config.backbone.checkpoint=ViT-B_16.npz --workdir=out/vtab

For each of the 19 tasks: 40 pairs of rate and decay are tried on train800 and judged on
val200 after the last epoch; then five seeds train with the best pair on all 1,000
pictures, are condensed, fine-tuned, and tested once. A linear probe has a grid of its
own. The same command goes on where it stopped; `--list` shows how far it is;
`--launcher=ray` or `--launcher=slurm` spreads the runs over machines.

After the file's name, separated by commas:

    task=svhn     one task (may be repeated)
    published     no grid: the rate and decay that VPT's authors published for four of
                  the tasks, and one sensible default for the others
    search        not VPT's recipe but that of configs/folder.py: AdamW, its rate found
                  by six shorter trainings and not by forty
    smoke         a trial of the whole way on the small backbone of the package

The data sets must have been prepared by tensorflow-datasets in ~/tensorflow_datasets,
$TFDS_DATA_DIR or --config.task.data_dir: `python -m vpt_jax.data list`. Or
--config.task.data_dir=vtab-1k is the folder that PETL code has, extracted: of each task
(cifar, clevr_dist and so on are understood) train800.txt, val200.txt, test.txt.
"""

from ml_collections import ConfigDict

from vpt_jax.bench.benchmark_config import recipe, shorten, vpt, words
from vpt_jax.data.public.vtab import BENCHMARKS

TASKS = tuple(name for name, row in BENCHMARKS.items() if row.group != "fgvc")

# Base rate and weight decay where VPT's authors published them.
PUBLISHED = {
    "dmlab": (1.0, 1e-3),
    "eurosat": (1.0, 1e-3),
    "sun397": (25.0, 1e-4),
    "svhn": (2.5, 0.0),
}
DEFAULT = (2.5, 1e-4)  # the middle of their grid


def get_config(arg: str = "") -> ConfigDict:
    """See the module's docstring for `arg`."""
    names, given = words(arg, TASKS, ("published", "search", "smoke"))
    own = {
        name: {
            "num_prompts": BENCHMARKS[name].prompts,
            # Used in mode published.
            "base_lr": PUBLISHED.get(name, DEFAULT)[0],
            "weight_decay": PUBLISHED.get(name, DEFAULT)[1],
            "how": "published" if name in PUBLISHED else "default",
        }
        for name in names or TASKS
    }
    c = vpt("vtab", "published" if "published" in given else "sweep", own)
    c.task.resize = "corner"  # TensorFlow 1's rule, with which VPT ran VTAB
    if "search" in given:
        recipe(c)
    if "smoke" in given:
        shorten(c, image_size=8)
    return c
