# SPDX-License-Identifier: Apache-2.0
r"""What one dropout mask per step saves, against one per example.

python benchmarks/shared_dropout.py                       # S/16, about a minute
python benchmarks/shared_dropout.py --variant=B/16 --prompts=200 --batch=64
python benchmarks/shared_dropout.py --variant=B/16 --count    # operations, no clock

With a mask per example, keys and values of the prompts are computed for every example.
Operations of a training step by XLA's count, and its time: median over rounds in which
the programs take turns. Weights are random: nothing is downloaded.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import roofline
import turns

import vpt_jax
from vpt_jax import train


def parse() -> argparse.Namespace:
    parser = turns.parser(__doc__, variant="S/16")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--count", action="store_true", help="compile nothing")
    return parser.parse_args()


def main() -> None:
    args = parse()
    model, key = vpt_jax.ViT(args.variant, dtype=jnp.dtype(args.dtype)), jax.random.key
    image = jnp.zeros((1, model.image_size, model.image_size, 3))
    shapes = jax.eval_shape(model.init, key(0), image)["params"]
    rng = np.random.default_rng(0)
    backbone = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.02, x.shape), x.dtype), shapes
    )
    given = roofline.make_inputs(model, args.batch, backbone)
    trainable = roofline.trainable_of(given, args.prompts)
    recipes = {
        "no dropout": train.Recipe(dropout=0.0),
        "per example": train.Recipe(),
        "shared": train.Recipe(shared_dropout=True),
    }
    programs, work = {}, {}
    inputs = backbone, given.batch, jnp.float32(0), jnp.float32(0), key(3)
    for name, recipe in recipes.items():
        step = functools.partial(train.train_step, model=model, recipe=recipe)
        state = train.init_state(trainable, recipe)
        program = jax.jit(step).lower(state, *inputs)
        if not args.count:
            program = program.compile()
            programs[name] = functools.partial(program, state, *inputs)
        work[name] = program.cost_analysis()["flops"] / args.batch / 1e9
    times = turns.rounds(programs, args.rounds)
    print(turns.where(args, f"{args.prompts} prompts"))
    for name, flops in work.items():
        text = f"{name:12} {flops:8.2f} GFLOP/picture"
        if programs:
            ratio = np.median(np.array(times[name]) / np.array(times["per example"]))
            each = 1000 * np.median(times[name]) / args.batch
            text += f" {each:8.1f} ms/picture, {ratio:.3f} of per example"
        print(text)


if __name__ == "__main__":
    main()
