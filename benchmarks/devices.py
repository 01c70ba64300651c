# SPDX-License-Identifier: Apache-2.0
r"""What one of many devices has to do and to hold, by XLA's own count.

python benchmarks/devices.py                                # ViT-B/16 on 1, 2, 4, 8
python benchmarks/devices.py --model=g/14 --batch=8 --share=8 --devices 8

The training step is compiled for simulated CPU devices from shapes alone: no weights
are made and nothing runs. `--share` devices hold one copy of the backbone together.
FLOP and bytes are of one device; "exchanged" is what a step sends between devices.
"""

import argparse
import os
import re
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import vpt_jax
from vpt_jax import parallel, train

_BYTES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "u8": 1, "pred": 1}
_COLLECTIVE = (
    r" = (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)"
    r"(-start)?\("
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Work and memory of each device.")
    parser.add_argument("--model", default="B/16")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--share", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    print(
        f"training step, ViT-{args.model}, batch {args.batch}, {args.prompts} prompts"
        f" per layer, {args.dtype}"
    )
    print("devices  GFLOP  x devices  arguments MB  temporary MB  exchanged  compiled")
    first = None
    for num in args.devices:
        start = time.perf_counter()
        step = compiled(args, num)
        flop = step.cost_analysis()["flops"]
        first = first or flop * num
        memory = step.memory_analysis()
        print(
            f"{num:7d}  {flop / 1e9:5.0f}  {flop * num / first:9.4f}"
            f"  {memory.argument_size_in_bytes / 1e6:12.0f}"
            f"  {memory.temp_size_in_bytes / 1e6:12.0f}"
            f"  {exchanged(step.as_text())}  {time.perf_counter() - start:.0f} s",
            flush=True,
        )


def compiled(args: argparse.Namespace, num: int) -> jax.stages.Compiled:
    """The training step for `num` devices, compiled from shapes."""
    model = vpt_jax.ViT(args.model, dtype=jnp.dtype(args.dtype))
    side, recipe, key = model.image_size, train.Recipe(), jax.random.key(0)
    axes = {parallel.BATCH: num // args.share, parallel.MODEL: args.share}
    kinds, first = (AxisType.Auto,) * 2, jax.devices()[:num]
    how = {"axis_types": kinds, "devices": first}
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), **how)

    def shape(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def init() -> tuple:
        trainable = {
            "prompts": vpt_jax.init_prompts(key, model, args.prompts),
            "head": vpt_jax.init_head(key, model.width, 100),
        }
        backbone = model.init(key, jnp.zeros((1, side, side, 3)))["params"]
        batch = {
            "image": jnp.zeros((args.batch, side, side, 3), jnp.uint8),
            "label": jnp.zeros(args.batch, jnp.int32),
            "mask": jnp.ones(args.batch, bool),
        }
        return train.init_state(trainable, recipe), backbone, batch

    state, backbone, batch = jax.eval_shape(init)
    whole, split = (NamedSharding(mesh, spec) for spec in (P(), P(parallel.BATCH)))
    shardings = parallel.backbone_shardings(mesh, backbone)
    backbone = jax.tree.map(shape, backbone, shardings)
    state = jax.tree.map(lambda x: shape(x, whole), state)
    batch = jax.tree.map(lambda x: shape(x, split), batch)
    rate = np.float32(0.1)
    static = ("model", "recipe")
    step = jax.jit(train.train_step, static_argnames=static, donate_argnums=0)
    given = state, backbone, batch, rate, rate, key
    with parallel.everywhere(lambda: mesh):
        return step.lower(*given, model=model, recipe=recipe).compile()


def exchanged(text: str) -> str:
    """MB that a device contributes to each kind of collective of a compiled step."""
    total: dict[str, float] = {}
    for line in text.splitlines():
        if found := re.search(_COLLECTIVE, line):
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", found[1]):
                size = np.prod([int(n) for n in shape.split(",") if n])
                size = float(size) * _BYTES.get(dtype, 4) / 1e6
                total[found[2]] = total.get(found[2], 0.0) + size
    return ", ".join(f"{k} {v:.1f} MB" for k, v in sorted(total.items())) or "nothing"


if __name__ == "__main__":
    main()
