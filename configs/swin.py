# SPDX-License-Identifier: Apache-2.0
r"""VTAB-1k or FGVC with a Swin Transformer, VPT-Deep and Prompt Condensation.

python -m vpt_jax.main --config=configs/swin.py --workdir=out/swin \
    --config.backbone.checkpoint=swin_base_patch4_window7_224_22k.pth

The protocol of configs/vtab.py, or with `fgvc` that of configs/fgvc.py; but the number
of prompts per block is tried too (1, 5, 10, 50: VPT's grid for Swin), as the best ones
were not published. In mode `published` all tasks have 10. After the file's name:

    task=svhn     one task (may be repeated)
    fgvc          the FGVC sets
    published     no grid: one sensible default
"""

from ml_collections import ConfigDict

from vpt_jax.bench.benchmark_config import vpt, words
from vpt_jax.data.public.vtab import BENCHMARKS

VTAB = tuple(name for name, row in BENCHMARKS.items() if row.group != "fgvc")
FGVC = tuple(name for name, row in BENCHMARKS.items() if row.group == "fgvc")

NUM_PROMPTS, DEFAULT = 10, (2.5, 1e-4)


def get_config(arg: str = "") -> ConfigDict:
    """See the module's docstring for `arg`."""
    names, given = words(arg, tuple(BENCHMARKS), ("fgvc", "published"))
    fgvc = "fgvc" in given
    tasks = FGVC if fgvc else VTAB
    if other := [name for name in names if name not in tasks]:
        raise ValueError(
            f"{other[0]} is {'not ' * fgvc}one of FGVC; {'drop' if fgvc else 'add'}"
            " the argument fgvc."
        )
    own = {
        name: {
            "num_prompts": NUM_PROMPTS,
            # Used in mode published.
            "base_lr": DEFAULT[0],
            "weight_decay": DEFAULT[1],
        }
        for name in names or tasks
    }
    mode = "published" if "published" in given else "sweep"
    c = vpt("fgvc" if fgvc else "vtab", mode, own)
    if mode == "sweep":
        c.benchmark.num_prompts = (1, 5, 10, 50)  # tried too
    if fgvc:
        c.benchmark.final_splits = "all"
    else:
        c.task.resize = "corner"  # TensorFlow 1's rule, with which VPT ran VTAB
    c.backbone.variant = "Swin-B"
    return c
