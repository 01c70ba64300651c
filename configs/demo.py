# SPDX-License-Identifier: Apache-2.0
r"""Prompt condensation on the shipped demo backbone: minutes, no network, no GPU.

python -m vpt_jax.main --config=configs/demo.py
python -m vpt_jax.main --config=configs/demo.py:digits
python -m vpt_jax.main --config=configs/demo.py:shapes_location,seeds=5

The task is `sign_digits`, photographs of hands that show digits. The argument is a list
of another task (`digits`, `shapes_location`, `shapes_orientation`), `seeds=N`, and
`smoke` (two epochs, for tests). The rate is the one that the search of
`configs/folder.py` finds for this task and backbone. What is not set here has its
default from vpt_jax/run/config.py; any key can be set on the command line.
"""

from ml_collections import ConfigDict

from vpt_jax.bench.benchmark_config import recipe
from vpt_jax.prompts import check_choice
from vpt_jax.run.parsing import defaults

TASKS = ("sign_digits", "digits", "shapes_location", "shapes_orientation")


def get_config(arg: str = "") -> ConfigDict:
    """The demo's config; see the module's docstring for `arg`."""
    task, seeds, smoke = TASKS[0], 1, False
    for word in filter(None, arg.split(",")):
        name, _, value = word.partition("=")
        if name == "seeds" and value.isdecimal() and int(value) > 0:
            seeds = int(value)
        elif word == "smoke":
            smoke = True
        else:
            check_choice("argument", word, (*TASKS, "seeds=N", "smoke"))
            task = word
    c = defaults()
    c.seeds = tuple(range(seeds))
    c.task.name = task
    c.backbone.variant = "demo/4"  # its weights are in the package
    c.prompts.num_prompts = 20
    recipe(c)
    c.condense.keep_ratios = (0.3, 0.1)
    c.eval_batch_size = 100
    if smoke:
        c.prompts.num_prompts = 4
        c.tune.update(epochs=2, warmup_epochs=1, base_lr=0.03)
        c.finetune.update(epochs=1, base_lr=0.03)
        del c.search
        c.condense.keep_ratios = (0.3,)
        c.checkpoint_every = 1
    elif task == "sign_digits":  # what the search finds; docs/real.md
        c.prompts.update(num_prompts=10, head_init="probe")
        c.tune.base_lr = c.finetune.base_lr = 0.01
        c.condense.scopes = ("global",)
        c.baselines = ("linear", "scratch")
    return c
