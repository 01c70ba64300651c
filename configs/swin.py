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

from ml_collections import ConfigDict, config_dict

from vpt_jax.data.vtab import BENCHMARKS

VTAB = tuple(name for name, row in BENCHMARKS.items() if row.group != "fgvc")
FGVC = tuple(name for name, row in BENCHMARKS.items() if row.group == "fgvc")

NUM_PROMPTS, DEFAULT = 10, (2.5, 1e-4)


def get_config(arg: str = "") -> ConfigDict:
    """See the module's docstring for `arg`."""
    names, mode, fgvc = [], "sweep", False
    for word in filter(None, arg.split(",")):
        key, _, value = word.partition("=")
        if key == "task" and value in BENCHMARKS:
            names.append(value)
        elif word == "published":
            mode = word
        elif word == "fgvc":
            fgvc = True
        else:
            raise ValueError(
                f"unknown argument {word!r}; use task=NAME, fgvc, published;"
                f" {tuple(BENCHMARKS)}."
            )
    tasks = FGVC if fgvc else VTAB
    if other := [name for name in names if name not in tasks]:
        raise ValueError(
            f"{other[0]} is {'not ' * fgvc}one of FGVC; {'drop' if fgvc else 'add'}"
            " the argument fgvc."
        )
    c = ConfigDict()
    c.benchmark = ConfigDict(
        {
            "name": "fgvc" if fgvc else "vtab",
            "mode": mode,
            # Base rates: times batch_size / 256.
            "rates": (50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05),
            "decays": (0.01, 0.001, 0.0001, 0.0),
            "num_prompts": (1, 5, 10, 50) if mode == "sweep" else (),  # tried too
            # Of the chosen rate: prompts that are tuned already need less.
            "finetune_rate": 0.1,
            "final_splits": "all" if fgvc else "final",
        }
    )
    c.tasks = ConfigDict()
    for name in names or tasks:
        c.tasks[name] = ConfigDict(
            {
                "num_prompts": NUM_PROMPTS,
                # Used in mode published.
                "base_lr": DEFAULT[0],
                "weight_decay": DEFAULT[1],
                "how": "default",
            }
        )
    c.seeds = (42, 44, 82, 100, 800)
    c.task = ConfigDict(
        {
            "data_dir": "",
            # TensorFlow 1's rule, with which VPT ran VTAB; FGVC has crops.
            "resize": "" if fgvc else "corner",
        }
    )
    c.backbone = ConfigDict(
        {
            "variant": "Swin-B",
            "checkpoint": "",
            "image_size": 224,
            "readout": "",
            "norm": "",
            "resize": "",
            "skip": (),
            # Empty: the backbone's own. VPT's pipeline has imagenet, whatever it is.
            "normalisation": "",
            "dtype": "float32",
        }
    )
    # None: each task's own.
    num_prompts = config_dict.placeholder(int)
    c.prompts = ConfigDict({"num_prompts": num_prompts, "deep": True, "dropout": 0.1})
    # True draws one mask per step, not one per picture: less work, not VPT's recipe.
    c.prompts.dropout_shared = False
    c.tune = ConfigDict(
        {
            "optimizer": "sgd",
            "schedule": "epoch",
            "epochs": 100,
            "warmup_epochs": 10,
            # None: chosen by the grid, or the task's own in mode published.
            "base_lr": config_dict.placeholder(float),
            "weight_decay": config_dict.placeholder(float),
            # None: 128, and 64 from 100 prompts per layer on, as VPT.
            "batch_size": config_dict.placeholder(int),
        }
    )
    # Rates, decay and batch size of these come from the grids too.
    c.linear = ConfigDict(
        {"optimizer": "sgd", "schedule": "epoch", "epochs": 100, "warmup_epochs": 10}
    )
    c.finetune = ConfigDict(
        {"optimizer": "sgd", "schedule": "epoch", "epochs": 20, "warmup_epochs": 0}
    )
    c.finetune.head = False
    c.score = ConfigDict({"score": "removal", "reduction": "", "batch_size": 64})
    c.condense = ConfigDict(
        {"keep_ratios": (0.5, 0.3, 0.2, 0.1), "scopes": ("global",)}
    )
    c.baselines = ("linear", "random", "scratch")
    c.eval_batch_size = 64
    c.checkpoint_every = 10
    return c
