# SPDX-License-Identifier: Apache-2.0
r"""What prompts cost: time and memory of both formulations, in one run.

python benchmarks/prompt_cost.py                    # ViT-B/16, batch 8, float32
python benchmarks/prompt_cost.py --variant=S/16 --batch=32 --dtype=bfloat16

For 0, 50, 100 and 200 prompts per layer: seconds per picture (median over rounds) and
XLA's peak temporary memory of inference and of a training step (loss, gradient of
prompts and head, SGD update), for prompts as tokens (the reference) and as keys and
values (this package). All programs take turns within a round, so that a drift of the
machine's speed hits all alike; the ratios are medians of the rounds' own ratios.
Weights are random: nothing is downloaded.
"""

import argparse
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import roofline
import turns

import vpt_jax
from vpt_jax import train

PROMPTS = (0, 50, 100, 200)


def parse() -> argparse.Namespace:
    parser = turns.parser(__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS)
    return parser.parse_args()


def programs(args: argparse.Namespace) -> dict[tuple, tuple[Callable, int]]:
    """Compiled programs and their temporary bytes, by (what, formulation, prompts)."""
    model = vpt_jax.ViT(args.variant, dtype=jnp.dtype(args.dtype))
    given = roofline.make_inputs(model, args.batch)
    backbone, labels = given.backbone, given.batch["label"]
    images = train.normalise(given.batch["image"], "half")
    recipe = train.Recipe(dropout=0.0)
    optimizer = train.make_optimizer(recipe, 0.01, 1e-4)

    def logits(trainable, backbone, images, formulation):
        how = {"prompts": trainable["prompts"], "formulation": formulation}
        features, _ = model.apply({"params": backbone}, images, **how)
        return vpt_jax.apply_head(trainable["head"], features)

    def step(state, backbone, images, formulation):
        def loss(trainable):
            out = logits(trainable, backbone, images, formulation)
            return vpt_jax.cross_entropy(out, {"label": labels}).mean()

        grads = jax.grad(loss)(state.trainable)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = jax.tree.map(jnp.add, state.trainable, updates)
        return train.TrainState(state.step + 1, trainable, opt_state)

    found = {}
    for num in args.prompts:
        trainable = roofline.trainable_of(given, num)
        ready = vpt_jax.prefill(model, backbone, trainable["prompts"])
        ready = {**trainable, "prompts": ready}
        state = train.init_state(trainable, recipe)
        cases = [
            ("inference", "tokens", logits, trainable),
            ("inference", "kv", logits, trainable),
            ("inference, prefilled", "kv", logits, ready),
            ("training step", "tokens", step, state),
            ("training step", "kv", step, state),
        ]
        for what, formulation, function, first in cases:
            inputs = (first, backbone, images)
            lowered = jax.jit(function, static_argnums=3).lower(*inputs, formulation)
            compiled = lowered.compile()
            memory = compiled.memory_analysis().temp_size_in_bytes
            run = functools.partial(compiled, *inputs)
            found[what, formulation, num] = run, memory
            print(f"compiled {what}, {formulation}, {num} prompts", flush=True)
    return found


def main() -> None:
    args = parse()
    print(turns.where(args))
    compiled = programs(args)
    times = turns.rounds({n: run for n, (run, _) in compiled.items()}, args.rounds)
    columns = f"{'s/picture':>11}{'temp. MB':>10}{'vs 0':>8}{'vs tokens':>11}"
    print(f"\n{'':34}{'prompts':>8}{columns}")
    for (what, formulation, num), (_, memory) in compiled.items():
        mine = np.array(times[what, formulation, num])

        def ratio(other: tuple, mine: np.ndarray = mine) -> str:
            if other not in times:
                return ""
            return f"{np.median(mine / np.array(times[other])):.2f}"

        peer = (what.split(",")[0], "tokens", num)
        least = min(args.prompts)
        print(
            f"{what + ' (' + formulation + ')':34}{num:8d}"
            f"{np.median(mine) / args.batch:11.4f}{memory / 2**20:10.0f}"
            f"{ratio((what, formulation, least)):>8}{ratio(peer):>11}"
        )
    for what in ("inference", "training step"):
        for num in args.prompts:
            kv, tokens = (compiled[what, f, num][1] for f in ("kv", "tokens"))
            share = f"temporary memory kv/tokens {kv / tokens:.2f}"
            print(f"{what}, {num} prompts: {share}")


if __name__ == "__main__":
    main()
