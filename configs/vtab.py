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
    smoke         a trial of the whole way on the small backbone of the package

The data sets must have been prepared by tensorflow-datasets in ~/tensorflow_datasets,
$TFDS_DATA_DIR or --config.task.data_dir: `python -m vpt_jax.data list`.
"""

from ml_collections import ConfigDict, config_dict

from vpt_jax.data.vtab import BENCHMARKS

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
    names, mode, smoke = [], "sweep", False
    for word in filter(None, arg.split(",")):
        key, _, value = word.partition("=")
        if key == "task" and value in TASKS:
            names.append(value)
        elif word == "published":
            mode = word
        elif word == "smoke":
            smoke = True
        else:
            raise ValueError(
                f"unknown argument {word!r}; use task=NAME, published, smoke; {TASKS}."
            )
    c = ConfigDict()
    c.benchmark = ConfigDict(
        {
            "name": "vtab",
            "mode": mode,
            # Base rates: times batch_size / 256.
            "rates": (50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05),
            "decays": (0.01, 0.001, 0.0001, 0.0),
            "num_prompts": (),  # numbers to try too; empty: each task's own, below
            # Of the chosen rate: prompts that are tuned already need less.
            "finetune_rate": 0.1,
            "final_splits": "final",  # trained on train800val200, tested on test
        }
    )
    c.tasks = ConfigDict()
    for name in names or TASKS:
        rate, decay = PUBLISHED.get(name, DEFAULT)
        c.tasks[name] = ConfigDict(
            {
                "num_prompts": BENCHMARKS[name].prompts,
                # Used in mode published.
                "base_lr": rate,
                "weight_decay": decay,
                "how": "published" if name in PUBLISHED else "default",
            }
        )
    c.seeds = (42, 44, 82, 100, 800)
    c.task = ConfigDict(
        {
            "data_dir": "",
            "resize": "corner",  # TensorFlow 1's rule, with which VPT ran VTAB
        }
    )
    c.backbone = ConfigDict(
        {
            "variant": "B/16",
            "checkpoint": "",
            "image_size": 224,
            "readout": "",
            "norm": "",
            "resize": "",
            "skip": (),
            # Empty: the backbone's own. VPT's pipeline has imagenet, whatever it is.
            "normalisation": "",
            "dtype": "float32",
            "remat": "none",
            "attention": "products",
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
    if smoke:
        c.benchmark.update(rates=(2.5, 0.5), decays=(1e-4, 0.0))
        c.seeds = (42, 44)
        c.backbone.update(variant="demo/4", image_size=8)
        c.prompts.num_prompts = 2
        c.tune.update(epochs=2, warmup_epochs=1)
        c.linear.update(epochs=2, warmup_epochs=1)
        c.finetune.update(epochs=1)
        c.condense.keep_ratios = (0.3,)
        c.checkpoint_every = 1
    return c
