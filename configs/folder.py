# SPDX-License-Identifier: Apache-2.0
r"""Prompt condensation on your own pictures, with the recipe of the VPT reference.

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
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is the folder or npz file, or empty: set `task.data_dir` then."""
    c = ConfigDict()
    c.seeds = (0,)
    c.task = ConfigDict(
        {
            "name": "folder",
            "data_dir": arg,
            # Empty: crop for class folders, squash for lists and npz; or half_pixel or
            # corner, see vpt_jax/data/pictures.py.
            "resize": "",
            "skip_broken": False,  # True: leave out what cannot be read
        }
    )
    c.backbone = ConfigDict(
        {
            "variant": "demo/4",
            "checkpoint": "",  # the weights in the package
            "image_size": 0,
            # Empty: what is known of the backbone.
            "readout": "",
            "norm": "",
            "resize": "",
            "skip": (),
            "normalisation": "",
            "dtype": "float32",
            "remat": "none",
            "attention": "products",
        }
    )
    c.prompts = ConfigDict({"num_prompts": 50, "deep": True, "dropout": 0.1})
    # True draws one mask per step, not one per picture: less work, not VPT's recipe.
    c.prompts.dropout_shared = False
    c.tune = ConfigDict(
        {
            "optimizer": "sgd",
            "schedule": "epoch",
            "epochs": 100,
            "warmup_epochs": 10,
            # The reference tries 0.05 ... 50 and keeps the best on val; so should you,
            # if you report numbers. Times batch_size / 256.
            "base_lr": 2.5,
            "weight_decay": 1e-4,
            "batch_size": 64,
        }
    )
    c.linear = c.tune.copy_and_resolve_references()
    c.score = ConfigDict({"score": "removal", "reduction": "", "batch_size": 64})
    c.condense = ConfigDict({"keep_ratios": (0.3, 0.1), "scopes": ("global", "layer")})
    # Prompts that are tuned already: a fifth of the epochs, a tenth of the rate.
    c.finetune = c.tune.copy_and_resolve_references()
    c.finetune.update(epochs=20, warmup_epochs=0, base_lr=0.25)
    c.finetune.head = False
    c.baselines = ("linear", "random", "scratch")
    c.eval_batch_size = 64
    c.checkpoint_every = 10
    return c
