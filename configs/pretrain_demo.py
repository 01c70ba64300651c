# SPDX-License-Identifier: Apache-2.0
r"""Pretrains the demo backbone: ViT demo/4 (1.2 M parameters, 32 x 32 pictures).

python -m scripts.pretrain --config=configs/pretrain_demo.py --workdir=out/pretrain \
    --config.data=cifar10_jpeg.zip

`data` is a zip of `train/<class>/*.jpg` and `test/<class>/*.jpg`. The picture side
grows while training (16, 24, 32 px): a step at 16 px costs a quarter of one at 32 px.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is empty, or `smoke` for a run of seconds."""
    if arg not in ("", "smoke"):
        raise ValueError(f"unknown argument {arg!r}; use none, or 'smoke'.")
    c = ConfigDict()
    c.data = "cifar10_jpeg.zip"
    c.teacher = ""  # a file of weights, such as DINOv2-S/14
    c.teacher_variant, c.teacher_side = "S/14", 56
    c.variant = "demo/4"
    c.seed = 0
    c.stages = ((16, 20), (24, 8), (32, 7))  # (picture side in px, epochs)
    c.batch_size = 128
    c.learning_rate = 1e-3  # AdamW peak
    c.weight_decay = 0.05
    c.warmup_epochs = 2
    c.label_smoothing = 0.1
    c.crop_pad = 4  # px at 32 x 32
    c.normalisation = "half"
    c.steps_per_call = 65
    if arg == "smoke":
        c.stages = ((16, 1), (32, 1))
        c.batch_size, c.steps_per_call, c.warmup_epochs = 8, 2, 1
    return c
