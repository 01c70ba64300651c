# SPDX-License-Identifier: Apache-2.0
r"""Prompt condensation on your own pictures, with a rate that is found, not asked for.

python -m vpt_jax.main --config=configs/folder.py:DIR \
    --config.backbone.variant=B/16 --config.backbone.checkpoint=ViT-B_16.npz

DIR is one of:

    DIR                  DIR                 DIR                      FILE.npz
    ├── train            ├── cat             ├── train800.txt         ├── train_images
    │   ├── cat          │   ├── 1.jpg       │     a/1.jpg 0          ├── train_labels
    │   │   ├── 1.jpg    │   └── ...         │     a/2.jpg 1          ├── val_images
    │   │   └── ...      └── dog             ├── val200.txt           ├── val_labels
    │   └── dog              └── ...         ├── test.txt             ├── test_images
    ├── val (same)                           ├── classes.txt          └── test_labels
    └── test (same)                          └── images/a/1.jpg

`val` and `test` may be missing: each is then a fifth of every class, chosen once and
for all by the pictures' names. `images` and `labels` do in an npz; labels are numbers
or one-hot. VPT's `train.json` (paths and labels) and CUB_200_2011 as it is unpacked are
read too. Classes are those with pictures; their names are kept with the released
prompts. What cannot be read is named in one error; what was left out is said. Pictures
are decoded once and kept in `~/.cache/vpt_jax` (`VPT_JAX_CACHE`).

Without a backbone of your own, the small one of the package is used (32 x 32 px): it
shows that all works, not how well. Its normalisation and most others' are known; see
docs/backbones.md.

The rate, and the epochs for so many pictures, are chosen by training on train and
looking at val, for 1.8 times the price of one full training.
`--config.tune.base_lr=0.03` skips that; `--config.search.rates` tries others.

What is not set here has its default from vpt_jax/run/config.py; any key can be set on
the command line: `--config.task.resize=squash` (crop for class folders otherwise),
`--config.task.skip_broken=true` (leaves out what cannot be read).
"""

from ml_collections import ConfigDict

from vpt_jax.bench.benchmark_config import recipe
from vpt_jax.run.parsing import defaults


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is the folder or npz file, or empty: set `task.data_dir` then."""
    c = defaults()
    c.task.update(name="folder", data_dir=arg)
    c.backbone.variant = "demo/4"  # its weights are in the package
    c.prompts.num_prompts = 10
    recipe(c)
    c.condense.keep_ratios = (0.3, 0.1)
    c.condense.scopes = ("global",)
    c.eval_batch_size = 64
    return c
