# SPDX-License-Identifier: Apache-2.0
r"""Ours beside PyTorch, in one run: the same network, weights, pictures and prompts.

pip install '.[peers]'
python benchmarks/peers.py                    # ViT-B/16, batch 8, float32, five rounds

- `PyTorch` is VPT-Deep as every published implementation has it: prompts are tokens of
  every block, thrown away behind it; its fused attention; weights frozen, so that it
  computes no gradient for them.
- `timm` is timm's ViT without any prompts: what a prompted network can hardly beat.
- `vpt_jax` is this package: prompts as keys and values; prefilled for inference.

Both networks get the same random weights, and the script stops unless their logits
and prompt gradients agree. A training step is forward, backward, and SGD with momentum
and weight decay of prompts and head, `--steps` of them in a row: PyTorch in a loop,
ours in one call of `train.train_epoch`, as `fit` and the command train. `alone` are
ours in a loop too, each step a call: XLA's CPU code then asks the system for its memory
in every step. All programs take turns within a round, in an order that turns with the
rounds, so that a drift of the machine's speed hits all alike; ratios are medians of the
rounds' own ratios, with the smallest and largest behind.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
import turns

import vpt_jax
from vpt_jax import train

CLASSES = 100
RATE, DECAY, MOMENTUM = 0.1, 1e-3, 0.9
TRAINING = "training step"


def parse() -> argparse.Namespace:
    parser = turns.parser(__doc__, dtype=None)
    parser.add_argument("--prompts", type=int, nargs="+", default=(100, 200))
    parser.add_argument("--steps", type=int, default=2, help="of training, in a row")
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch; 0: cores")
    parser.add_argument(
        "--compile", action="store_true", help="also PyTorch through torch.compile"
    )
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    return parser.parse_args()


class TokenViT(torch.nn.Module):
    """VPT-Deep, prompts as tokens, with the parameters of our ViT."""

    def __init__(self, model: vpt_jax.ViT, backbone: Any) -> None:
        super().__init__()
        self.heads, self.patch = model.num_heads, model.patch
        width, blocks = model.width, backbone["Transformer"]

        def keep(name: str, value: Any) -> None:
            self.register_buffer(name, torch.tensor(np.asarray(value)))

        keep("embed", backbone["embedding"]["kernel"].transpose(3, 2, 0, 1))
        keep("embed_bias", backbone["embedding"]["bias"])
        keep("cls", backbone["cls"])
        keep("positions", blocks["posembed_input"]["pos_embedding"])
        keep("norm_scale", blocks["encoder_norm"]["scale"])
        keep("norm_bias", blocks["encoder_norm"]["bias"])
        for i in range(model.depth):
            block = blocks[f"encoderblock_{i}"]
            attention = block["MultiHeadDotProductAttention_0"]
            qkv = [attention[name] for name in ("query", "key", "value")]
            kernels = [p["kernel"].reshape(width, width) for p in qkv]
            keep(f"qkv_{i}", np.concatenate(kernels, axis=1).T)
            keep(f"qkv_bias_{i}", np.concatenate([p["bias"].ravel() for p in qkv]))
            keep(f"out_{i}", attention["out"]["kernel"].reshape(width, width).T)
            keep(f"out_bias_{i}", attention["out"]["bias"])
            for j in (0, 1):
                dense = block["MlpBlock_0"][f"Dense_{j}"]
                keep(f"dense{j}_{i}", dense["kernel"].T)
                keep(f"dense{j}_bias_{i}", dense["bias"])
                keep(f"norm{j}_scale_{i}", block[f"LayerNorm_{j}"]["scale"])
                keep(f"norm{j}_bias_{i}", block[f"LayerNorm_{j}"]["bias"])

    def normed(self, x: torch.Tensor, name: str, at: str = "") -> torch.Tensor:
        scale = getattr(self, f"{name}_scale{at}")
        return F.layer_norm(
            x, scale.shape, scale, getattr(self, f"{name}_bias{at}"), 1e-6
        )

    def dense(self, x: torch.Tensor, name: str, i: int) -> torch.Tensor:
        return F.linear(
            x, getattr(self, f"{name}_{i}"), getattr(self, f"{name}_bias_{i}")
        )

    def forward(self, images: torch.Tensor, prompts: list[torch.Tensor]):
        b = images.shape[0]
        x = F.conv2d(images, self.embed, self.embed_bias, stride=self.patch)
        x = torch.cat([self.cls.expand(b, -1, -1), x.flatten(2).transpose(1, 2)], 1)
        x = x + self.positions
        for i, p in enumerate(prompts):
            if i:
                x = torch.cat([x[:, :1], x[:, 1 + len(prompts[i - 1]) :]], dim=1)
            x = torch.cat([x[:, :1], p.expand(b, -1, -1), x[:, 1:]], dim=1)
            t, d = x.shape[1:]
            qkv = self.dense(self.normed(x, "norm0", f"_{i}"), "qkv", i)
            q, k, v = qkv.view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v)
            x = x + self.dense(y.transpose(1, 2).reshape(b, t, d), "out", i)
            y = F.gelu(self.dense(self.normed(x, "norm1", f"_{i}"), "dense0", i))
            x = x + self.dense(y, "dense1", i)
        return self.normed(x, "norm")[:, 0]


def torch_programs(
    peer: torch.nn.Module,
    trainable: dict[str, Any],
    images: np.ndarray,
    labels: np.ndarray,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Callable, Callable, Callable]:
    """Inference, one training step, and the prompt gradients of the weights now.

    The network and what it sees are of `dtype`; what is learned, and the loss, float32.
    """
    peer = peer.to(device, dtype)
    x = torch.tensor(images.transpose(0, 3, 1, 2)).contiguous().to(device, dtype)
    y = torch.tensor(labels).long().to(device)
    head = trainable["head"]
    learned = [
        torch.tensor(np.asarray(value)).to(device).requires_grad_(True)
        for value in (*trainable["prompts"], head["kernel"], head["bias"])
    ]
    *prompts, kernel, bias = learned
    optimizer = torch.optim.SGD(learned, lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)

    def logits():
        return peer(x, [p.to(dtype) for p in prompts]).float() @ kernel + bias

    def infer():
        with torch.inference_mode():
            return logits()

    def backward():
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits(), y).backward()

    def step():
        backward()
        optimizer.step()

    def gradient():
        backward()
        return [p.grad.cpu().numpy().copy() for p in prompts]

    return infer, step, gradient


def timm_program(
    variant: str,
    images: np.ndarray,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Callable | None:
    """A ViT of timm without prompts, random weights; None if it has no such size."""
    try:
        import timm
    except RuntimeError:
        # timm imports PyPI's torchvision, which is built for CUDA: beside PyTorch's
        # CPU build its operators are absent. timm's ViT uses none; names will do.
        library = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float limit) -> Tensor")
        import timm

    names = {"Ti": "tiny", "S": "small", "B": "base", "L": "large"}
    size, patch = variant.split("/")
    name = f"vit_{names.get(size)}_patch{patch}_224"
    if name not in timm.list_models():
        return None
    model = timm.create_model(name, num_classes=CLASSES).eval().to(device, dtype)
    x = torch.tensor(images.transpose(0, 3, 1, 2)).contiguous().to(device, dtype)

    def infer():
        with torch.inference_mode():
            return model(x)

    return infer


def our_programs(
    model: vpt_jax.ViT,
    backbone: Any,
    trainable: dict[str, Any],
    images: np.ndarray,
    labels: np.ndarray,
    steps: int,
) -> tuple[Callable, Callable, Callable, Callable]:
    """Inference with prefilled prompts, `steps` of training, one step, gradients."""
    recipe = train.Recipe(dropout=0.0, normalisation="half")
    ready = vpt_jax.prefill(model, backbone, trainable["prompts"])
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    batch = {"image": images, "label": labels, "mask": jnp.ones(len(labels), bool)}

    @jax.jit
    def forward(trainable, backbone, images):
        return train.predict(trainable, backbone, images, model=model, recipe=recipe)

    @jax.jit
    def gradient(trainable, backbone, batch):
        def loss(trainable):
            logits = forward(trainable, backbone, batch["image"])
            return vpt_jax.cross_entropy(logits, batch).mean()

        return jax.grad(loss)(trainable)["prompts"]

    one_step = jax.jit(
        train.train_step, static_argnames=("model", "recipe"), donate_argnums=0
    )
    held = [train.init_state(jax.tree.map(jnp.copy, trainable), recipe)]
    kept = jax.tree.map(jnp.copy, held)
    key = jax.random.key(0)
    order = jnp.tile(jnp.arange(len(labels)), (steps, 1))
    full, rates = jnp.ones(order.shape, bool), jnp.full(steps, RATE)
    infer_with = {**trainable, "prompts": ready}

    def infer():
        return np.asarray(forward(infer_with, backbone, images))

    def step():
        held[0], sums = one_step(
            held[0], backbone, batch, RATE, DECAY, key, model=model, recipe=recipe
        )
        return float(sums["loss"]), jax.block_until_ready(held[0])

    def epoch():
        data = images, labels, order, full, rates, DECAY, key
        kept[0], metrics = train.train_epoch(
            kept[0], backbone, *data, model=model, recipe=recipe
        )
        return float(metrics["loss"]), jax.block_until_ready(kept[0])

    return infer, epoch, step, lambda: gradient(trainable, backbone, batch)


def in_a_row(step: Callable, steps: int) -> Callable:
    return lambda: [step() for _ in range(steps)]


def check_same(name: str, ours: Any, theirs: Any, limit: float) -> None:
    """Stops unless two results agree, relative to the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    off = np.abs(ours - theirs).max() / np.abs(theirs).max()
    if not off < limit:
        raise SystemExit(f"{name} differ by {off:.1e}; at most {limit} was expected")
    print(f"{name} agree to {off:.1e}", flush=True)


def build(args: argparse.Namespace) -> dict[tuple[str, str, int], Callable]:
    """All programs by (what, whose, prompts), checked against each other."""
    model = vpt_jax.ViT(args.variant)
    side, keys = model.image_size, jax.random.split(jax.random.key(0), 3)
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (args.batch, side, side, 3)).astype(np.uint8)
    images = (pictures.astype(np.float32) / 255 - 0.5) / 0.5
    labels = random.integers(0, CLASSES, args.batch).astype(np.int32)
    backbone = jax.jit(model.init)(keys[0], jnp.asarray(images[:1]))["params"]
    peer = TokenViT(model, jax.tree.map(np.asarray, backbone)).eval()
    peers = {"PyTorch": peer}
    if args.compile:
        peers["torch.compile"] = torch.compile(peer)
    programs: dict[tuple[str, str, int], Callable] = {}
    bare = timm_program(args.variant, images)
    if bare is not None:
        programs["inference", "timm", 0] = bare
    for num in args.prompts:
        prompts = vpt_jax.init_prompts(keys[1], model, num)
        head = vpt_jax.init_head(keys[2], model.width, CLASSES)
        trainable = {"prompts": prompts, "head": head}
        infer, epoch, step, gradient = our_programs(
            model, backbone, trainable, pictures, labels, args.steps
        )
        programs["inference", "vpt_jax", num] = infer
        programs[TRAINING, "vpt_jax", num] = epoch
        programs[TRAINING, "vpt_jax alone", num] = in_a_row(step, args.steps)
        for whose, net in peers.items():
            their_infer, their_step, their_gradient = torch_programs(
                net, trainable, images, labels
            )
            programs["inference", whose, num] = their_infer
            programs[TRAINING, whose, num] = in_a_row(their_step, args.steps)
            what = f"{whose}, {num} prompts:"
            check_same(f"{what} logits", infer(), their_infer(), 1e-4)
            # Float32 through twelve layers and back, in two libraries.
            check_same(f"{what} gradients", gradient(), their_gradient(), 1e-3)
    return programs


def main() -> None:
    args = parse()
    # As XLA does: or steps that meet numbers below 1e-38 take up to 35 times as long.
    # Before the first operation, since threads take it from their maker.
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    threads = f"torch {torch.__version__} ({torch.get_num_threads()} threads)"
    where = turns.where(args, threads)
    print(where, flush=True)
    programs = build(args)
    times = turns.rounds(programs, args.rounds)
    for (what, *_), seconds in times.items():
        if what == TRAINING:
            seconds[:] = [second / args.steps for second in seconds]
    rows = []

    def ratio(name: tuple, other: tuple) -> str:
        found = np.array(times[other]) / np.array(times[name])
        rows[-1][f"{other[1]} / {name[1]}"] = [float(x) for x in found]
        return f"{np.median(found):.2f} ({found.min():.2f}-{found.max():.2f})"

    print(
        f"\n{'':15}{'':15}{'prompts':>8}{'ms/picture':>12}   {'vs PyTorch':18}vs timm"
    )
    for name, seconds in times.items():
        what, whose, num = name
        median = 1000 * np.median(seconds) / args.batch
        rows.append({"what": what, "whose": whose, "prompts": num, "ms": float(median)})
        peer, bare = (what, "PyTorch", num), (what, "timm", 0)
        print(
            f"{what:15}{whose:15}{num:8}{median:12.1f}  "
            f" {ratio(name, peer) if peer in times and name != peer else '':18}"
            f"{ratio(name, bare) if bare in times and name != bare else ''}"
        )
    print("vs: how many times as fast, median (smallest-largest) of the rounds")
    if args.json:
        args.json.write_text(json.dumps({"where": where, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
