# SPDX-License-Identifier: Apache-2.0
r"""What training many runs in one program buys, against one run at a time.

python benchmarks/many_runs.py                         # a minute or two on one core
python benchmarks/many_runs.py --variants B/16 --batch=64 --runs 2 4 8 16 --prompts=50

Training steps per second of all runs together, as a ratio to one run at a time: `grid`
for runs that see the same batches (rates and decays at one seed), `seeds` for runs with
their own. Programs take turns within a round; ratios are medians of the rounds' own.
Beside it XLA's count of operations against as many single runs, and its temporary
memory. Weights and pictures are random: nothing is downloaded.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vpt_jax
from vpt_jax import together, train


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=("demo/4", "Ti/16"))
    parser.add_argument("--runs", type=int, nargs="+", default=(4,))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    return parser.parse_args()


def programs(args: argparse.Namespace, variant: str) -> dict[tuple, tuple]:
    """By (what, runs): a function that does one step of each run, and its program."""
    model = vpt_jax.ViT(variant, dtype=jnp.dtype(args.dtype))
    side, b, keys = model.image_size, args.batch, jax.random.split(jax.random.key(0), 4)
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, keys[0], image)["params"]
    rng = np.random.default_rng(0)
    backbone = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.02, x.shape), x.dtype), shapes
    )
    images = jnp.asarray(rng.integers(0, 256, (b, side, side, 3), np.uint8))
    labels = jnp.arange(b) % 10
    recipe = train.Recipe()
    trainable = {
        "prompts": vpt_jax.init_prompts(keys[2], model, args.prompts),
        "head": vpt_jax.init_head(keys[3], model.width, 10),
    }
    order, real = train.epoch_order(0, 0, b, b)

    def compiled(function: Any, state: Any, *own: Any) -> tuple[Callable, Any]:
        order, rates, decay, key = own
        rest = backbone, images, labels, order, real, rates, decay, key
        static = {"model": model, "recipe": recipe}
        program = function.lower(state, *rest, **static).compile()
        states = [state]

        def step() -> None:  # the state is donated: the next step starts from it
            states[0], metrics = program(states[0], *rest)
            jax.block_until_ready(metrics)

        return step, program

    def fresh(r: int) -> train.TrainState:
        return together.init_states(together.stack([trainable] * r), recipe)

    one = train.init_state(jax.tree.map(jnp.copy, trainable), recipe)
    key = jax.random.key(0)
    found = {
        ("one", 1): compiled(
            train.train_epoch, one, order, jnp.zeros(1), jnp.float32(0.0), key
        )
    }
    for r in args.runs:
        rates, decays = jnp.zeros((r, 1)), jnp.zeros(r)
        orders, own_keys = np.stack([order] * r), jax.random.split(key, r)
        found["grid", r] = compiled(
            together.train_epoch, fresh(r), order, rates, decays, key
        )
        found["seeds", r] = compiled(
            together.train_epoch, fresh(r), orders, rates, decays, own_keys
        )
    return found


def main() -> None:
    args = parse()
    print(
        f"batch {args.batch}, {args.prompts} prompts per layer, {args.dtype}; jax"
        f" {jax.__version__}, {jax.devices()[0].device_kind}"
    )
    columns = f"{'ms/step':>10}{'speed-up':>10}{'operations':>12}{'temp. MB':>10}"
    print(f"\n{'':10}{'':8}{'runs':>5}{columns}")
    for variant in args.variants:
        found = programs(args, variant)
        times: dict[tuple, list[float]] = {name: [] for name in found}
        for number in range(args.rounds + 1):
            for name, (step, _) in found.items():
                start = time.perf_counter()
                step()
                if number:  # the first round warms up
                    times[name].append(time.perf_counter() - start)
        work = found["one", 1][1].cost_analysis()["flops"]
        single = np.array(times["one", 1])
        for (what, r), (_, program) in found.items():
            mine = np.array(times[what, r]) / r
            memory = program.memory_analysis().temp_size_in_bytes / 2**20
            # A scan's body is counted once: it is one step here.
            share = program.cost_analysis()["flops"] / r / work
            print(
                f"{variant:10}{what:8}{r:5d}{1000 * np.median(mine):10.1f}"
                f"{np.median(single / mine):10.2f}{share:12.2f}{memory:10.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
