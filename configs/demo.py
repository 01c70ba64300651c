# SPDX-License-Identifier: Apache-2.0
r"""Prompt condensation on the shipped demo backbone: minutes, no network, no GPU.

python -m vpt_jax.main --config=configs/demo.py
python -m vpt_jax.main --config=configs/demo.py:digits
python -m vpt_jax.main --config=configs/demo.py:shapes_location,seeds=5

The argument is a list of a task (`shapes_orientation`, `shapes_location`, `digits`,
`fashion_mnist`), `seeds=N`, and `smoke` (two epochs, for tests).
"""

from ml_collections import ConfigDict

TASKS = ("shapes_orientation", "shapes_location", "digits", "fashion_mnist")


def get_config(arg: str = "") -> ConfigDict:
    """The demo's config; see the module's docstring for `arg`."""
    task, seeds, smoke = TASKS[0], 1, False
    for word in filter(None, arg.split(",")):
        name, _, value = word.partition("=")
        if word in TASKS:
            task = word
        elif name == "seeds" and value.isdecimal() and int(value) > 0:
            seeds = int(value)
        elif word == "smoke":
            smoke = True
        else:
            raise ValueError(
                f"unknown argument {word!r}; use one of {TASKS}, seeds=N, smoke."
            )
    c = ConfigDict()
    c.seeds = tuple(range(seeds))
    c.task = ConfigDict({"name": task, "data_dir": ""})
    c.backbone = ConfigDict(
        {
            "variant": "demo/4",
            "checkpoint": "",  # the weights in the package
            "image_size": 0,
            "resize": "corner_aligned",
            "normalisation": "",  # the backbone's own
            "dtype": "float32",
        }
    )
    c.prompts = ConfigDict({"num_prompts": 20, "deep": True, "dropout": 0.1})
    c.tune = ConfigDict(
        {
            "optimizer": "sgd",
            "schedule": "step",
            "epochs": 15,
            "warmup_epochs": 2,
            "base_lr": 1.0,
            "weight_decay": 0.001,
            "batch_size": 64,
        }
    )
    # On precomputed features: 100 epochs take seconds.
    c.linear = c.tune.copy_and_resolve_references()
    c.linear.update(epochs=100, warmup_epochs=10)
    c.score = ConfigDict({"score": "key_gate", "reduction": "", "batch_size": 64})
    c.condense = ConfigDict(
        {"keep_ratios": (0.5, 0.3, 0.1), "scopes": ("global", "layer")}
    )
    c.finetune = c.tune.copy_and_resolve_references()
    c.finetune.update(epochs=3, warmup_epochs=0)
    c.finetune.head = False
    c.baselines = ("linear", "random", "scratch")
    c.eval_batch_size = 250
    c.checkpoint_every = 5
    if smoke:
        c.prompts.num_prompts = 4
        c.tune.update(epochs=2, warmup_epochs=1)
        c.linear.update(epochs=2, warmup_epochs=1)
        c.finetune.update(epochs=1, warmup_epochs=0)
        c.condense.keep_ratios = (0.3,)
        c.checkpoint_every = 1
    return c
