# SPDX-License-Identifier: Apache-2.0
r"""Prompt condensation on the shipped demo backbone: minutes, no network, no GPU.

python -m vpt_jax.main --config=configs/demo.py
python -m vpt_jax.main --config=configs/demo.py:digits
python -m vpt_jax.main --config=configs/demo.py:shapes_location,seeds=5

The argument is a list of a task (`shapes_location`, `shapes_orientation`, `digits`),
`seeds=N`, and `smoke` (two epochs, for tests).
"""

from ml_collections import ConfigDict

# Task: AdamW's base rate, chosen on the validation split among 0.05 ... 2.5 (seed 0).
TASKS = {
    "shapes_location": 1.0,
    "shapes_orientation": 1.0,
    "digits": 0.15,
}


def get_config(arg: str = "") -> ConfigDict:
    """The demo's config; see the module's docstring for `arg`."""
    task, seeds, smoke = next(iter(TASKS)), 1, False
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
                f"unknown argument {word!r}; use one of {tuple(TASKS)}, seeds=N, smoke."
            )
    c = ConfigDict()
    c.seeds = tuple(range(seeds))
    c.task = ConfigDict({"name": task, "data_dir": ""})
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
    c.prompts = ConfigDict({"num_prompts": 20, "deep": True, "dropout": 0.1})
    # True draws one mask per step, not one per picture: less work, not VPT's recipe.
    c.prompts.dropout_shared = False
    c.tune = ConfigDict(
        {
            # 18 epochs instead of the reference's 100: Adam gets further in few steps,
            # and a rate per step wastes none of them.
            "optimizer": "adamw",
            "schedule": "step",
            "epochs": 18,
            "warmup_epochs": 2,
            "base_lr": TASKS[task],
            "weight_decay": 0.0,
            "batch_size": 32,
        }
    )
    # On precomputed features: 100 epochs take seconds.
    c.linear = c.tune.copy_and_resolve_references()
    c.linear.update(epochs=100, warmup_epochs=10, base_lr=0.2)
    c.score = ConfigDict({"score": "removal", "reduction": "", "batch_size": 64})
    c.condense = ConfigDict({"keep_ratios": (0.3, 0.1), "scopes": ("global", "layer")})
    c.finetune = c.tune.copy_and_resolve_references()
    c.finetune.update(epochs=4, warmup_epochs=0, base_lr=0.3 * TASKS[task])
    c.finetune.head = False
    c.baselines = ("linear", "random", "scratch")
    c.eval_batch_size = 100
    c.checkpoint_every = 10
    if smoke:
        c.prompts.num_prompts = 4
        c.tune.update(epochs=2, warmup_epochs=1)
        c.linear.update(epochs=2, warmup_epochs=1)
        c.finetune.update(epochs=1, warmup_epochs=0)
        c.condense.keep_ratios = (0.3,)
        c.checkpoint_every = 1
    return c
