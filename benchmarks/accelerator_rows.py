# SPDX-License-Identifier: Apache-2.0
"""How `accelerator.py` measures: what a row is, its least work, and its programs."""

import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch's part

import jax
import jax.numpy as jnp
import numpy as np
import roofline

import vpt_jax
from vpt_jax import train
from vpt_jax.data.public.vtab import NUM_TRAIN
from vpt_jax.models import vit
from vpt_jax.models.attention import attend, attend_fused

ROOT = Path(__file__).parent.parent
STEPS = 10  # of training in one call; PyTorch's in a loop
TINY = "toy/8"
vit.VARIANTS["toy"] = dict(width=32, depth=2, num_heads=2, mlp_dim=64, image_size=32)


class Row(NamedTuple):
    """One measurement."""

    part: str
    what: str
    who: str = "vpt_jax"
    variant: str = "B/16"
    batch: int = 64
    prompts: int = 100  # per layer
    dtype: str = "bfloat16"
    option: str = ""  # one of OPTIONS

    @property
    def name(self) -> str:
        """Its key among the results."""
        return "; ".join(str(value) for value in self if value != "")


class Sizes(NamedTuple):
    """Of what the rows are; the first of each is the one that matters most."""

    variants: Sequence[str] = ("B/16", "L/16")
    batches: Sequence[int] = (64, 8, 256, 1)
    prompts: Sequence[int] = (100, 200, 50)  # besides none
    dtypes: Sequence[str] = ("bfloat16", "float32")
    pictures: int = NUM_TRAIN  # of a trial
    matrix: int = 8192
    budget: float = 1.0  # seconds for which a program is timed
    tests: Sequence[str] = tuple(
        f"tests/{name}.py"
        for name in (
            "models/test_attention",
            "models/test_vit",
            "models/test_swin",
            "test_condense",
            "test_train",
        )
    )
    demo: Sequence[str] = ()  # flags of the demo's run


SMALL = Sizes(
    (TINY,),
    (2,),
    (4,),
    ("bfloat16",),
    pictures=5,
    matrix=256,
    budget=0.02,
    tests=("tests/models/test_attention.py::test_how_many_blocks",),
    demo=("--config.condense.keep_ratios=()", "--config.baselines=()"),
)

# What is tried beside the plain program: changes of the model, of the epoch, the dtype
# in which the backbone is kept, dropout, a mask.
CUDNN, KEPT = {"attention": "cudnn"}, jnp.bfloat16
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "cudnn": {"model": CUDNN},
    "backbone in bfloat16": {"kept": KEPT},
    "cudnn, backbone in bfloat16": {"model": CUDNN, "kept": KEPT},
    "one step a call": {"epoch": {"steps": 1}},
    "50 steps a call": {"epoch": {"steps": 50}},
    "not donated": {"epoch": {"donate": False}},
    "under a mask": {"mask": True},
    "dropout": {"dropout": 0.1},
    "dropout, shared": {"dropout": 0.1, "epoch": {"shared": True}},
    "remat=attention": {"model": {"remat": "attention"}},
    "remat=block": {"model": {"remat": "block"}},
    "deterministic": {"epoch": {"options": {"xla_gpu_deterministic_ops": True}}},
    "triton_gemm_any": {"epoch": {"options": {"xla_gpu_triton_gemm_any": True}}},
}
ATTENTIONS = ("products", "cudnn", "cudnn, masked", "jax.nn")


def is_training(row: Row) -> bool:
    return row.what in ("tuning", "fine-tuning")


@functools.cache
def model_of(row: Row) -> vpt_jax.ViT:
    change = OPTIONS[row.option].get("model", {})
    return vpt_jax.ViT(row.variant, dtype=jnp.dtype(row.dtype), **change)


@functools.cache
def parameters(variant: str) -> int:
    model = vpt_jax.ViT(variant)
    image = jax.ShapeDtypeStruct(
        (1, model.image_size, model.image_size, 3), jnp.float32
    )
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)
    return sum(x.size for x in jax.tree.leaves(shapes))


def work(row: Row) -> tuple[float, float]:
    """Least FLOP of one picture, and least bytes of one step or call."""
    model, n = model_of(row._replace(option="")), row.prompts
    d, t = model.width, (model.image_size // model.patch) ** 2 + 1
    if row.part == "attention":  # forward and backward: two and four products
        width = jnp.dtype(row.dtype).itemsize
        return 12 * t * (t + n) * d, 4 * row.batch * (2 * t + n) * d * width
    if row.part in ("card", "command", "start"):
        return 0.0, 0.0
    counts = (round(0.3 * n) if row.what == "fine-tuning" else n,) * model.depth
    weights = parameters(row.variant) * (2 if "kept" in OPTIONS[row.option] else 4)
    pictures = row.batch * 3 * model.image_size**2
    if row.what == "inference":
        return 2 * vpt_jax.macs(model, counts), weights + pictures
    learn = row.what != "scoring"
    macs = roofline.least_training_macs(model, counts, row.batch, learn)
    return 2 * macs, 2 * weights + pictures


def steps_of(row: Row) -> int:
    if not is_training(row):
        return 1
    return OPTIONS[row.option].get("epoch", {}).get("steps", STEPS)


class Context(NamedTuple):
    """What measuring needs besides the row."""

    sizes: Sizes
    rates: dict[str, float]  # FLOP/s of products, by dtype; of the row `card`
    folder: Path
    left: Callable[[], float]  # seconds


def clock(run: Callable, wait: Callable, budget: float) -> dict[str, Any]:
    """Seconds of a call, many in flight, and of one that is waited for."""

    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            last = run()
        wait(last)
        return (time.perf_counter() - start) / calls

    timed(1)  # warms up
    single = sorted(timed(1) for _ in range(3))[1]
    calls = int(np.clip(0.1 * budget / single, 1, 50))
    rounds = int(np.clip(budget / (single * calls), 3, 9))
    found = [timed(calls) for _ in range(rounds)]
    middle, least, most = np.median(found), min(found), max(found)
    return {"s": float(middle), "least": least, "most": most, "single": single}


@functools.cache
def backbone_of(variant: str) -> Any:
    model = vpt_jax.ViT(variant)
    image = jnp.zeros((1, model.image_size, model.image_size, 3))
    return jax.jit(model.init)(jax.random.key(0), image)["params"]


def inputs(row: Row) -> roofline.Inputs:
    backbone = backbone_of(row.variant)
    if kept := OPTIONS[row.option].get("kept"):
        backbone = jax.tree.map(lambda x: x.astype(kept), backbone)
    return roofline.make_inputs(model_of(row), row.batch, backbone)


def program(row: Row) -> roofline.Program:
    """Our compiled program of a row."""
    if row.part == "attention":
        return attention_program(row)
    given, option = inputs(row), OPTIONS[row.option]
    trainable = roofline.trainable_of(given, row.prompts)
    prompts = trainable["prompts"]
    if row.what == "inference":
        return roofline.inference_program(given, row.name, prompts)
    if row.what == "scoring":
        return roofline.score_program(given, row.name, trainable)
    if row.what == "fine-tuning":
        small = roofline.condensed(prompts, 0.3, given.key)
        trainable = {**trainable, "prompts": small}
    mask = tuple(jnp.arange(len(p)) % 2 == 0 for p in prompts)
    return roofline.epoch_program(
        given,
        row.name,
        trainable,
        option.get("dropout", 0.0),
        mask if "mask" in option else None,
        **{"steps": STEPS, **option.get("epoch", {})},
    )


def attention_program(row: Row) -> roofline.Program:
    """Attention of one layer alone, forward and backward."""
    model, what = model_of(row), row.what
    h, t = model.num_heads, (model.image_size // model.patch) ** 2 + 1

    def library(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        mask = None
        if what == "cudnn, masked":  # the kernel's lengths are even
            ends = [(0, x.shape[2] % 2) for x in (q, k)]
            pads = [((0, 0), (0, 0), end, (0, 0)) for end in (*ends, ends[1])]
            q, k, v = (jnp.pad(x, p) for x, p in zip((q, k, v), pads, strict=True))
            mask = (jnp.arange(k.shape[2]) < t + row.prompts)[None, None, None]
            mask = jnp.broadcast_to(mask, (1, 1, q.shape[2], k.shape[2]))
        kind = "cudnn" if what == "cudnn, masked" else "xla"
        heads_behind = (x.swapaxes(1, 2) for x in (q, k, v))
        return jax.nn.dot_product_attention(
            *heads_behind, mask=mask, scale=1.0, implementation=kind
        )

    run = {
        "products": lambda q, k, v: attend(q, k, v, None)[0],
        "cudnn": lambda q, k, v: attend_fused(q, k, v)[0],
    }.get(what, library)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return run(q, k, v).astype(jnp.float32).sum()

    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (row.batch, h, n, model.width // h), model.dtype)
        for key, n in zip(keys, (t, t + row.prompts, t + row.prompts), strict=True)
    )
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    return roofline.compiled(row.name, (), work(row), gradient, q, k, v)


def speed(row: Row, context: Context) -> dict[str, Any]:
    return (ours if row.who == "vpt_jax" else theirs)(row, context)


def ours(row: Row, context: Context) -> dict[str, Any]:
    ready, steps = program(row), steps_of(row)
    found = clock(ready.run, jax.block_until_ready, context.sizes.budget)
    cost, memory = ready.compiled.cost_analysis(), ready.compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    held += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    result = speeds(row, context, found, steps) | {
        "memory_gb": held / 2**30,
        "xla_gflop": cost["flops"] / row.batch / 1e9,  # of a scan one step is counted
        "xla_gb": cost["bytes accessed"] / 1e9,
        "compile_s": ready.compile_seconds,
    }
    if row.part == "remedy" and row.option in ("50 steps a call", "deterministic"):
        again = [program(row).run()[0].opt_state for _ in range(2)]
        pairs = zip(*map(jax.tree.leaves, again), strict=True)
        result["same_bits"] = all(bool((a == b).all()) for a, b in pairs)
    return result


def speeds(
    row: Row, context: Context, found: dict[str, float], steps: int
) -> dict[str, Any]:
    flop, rate = work(row)[0], context.rates.get(row.dtype)
    each = {k: 1000 * v / steps / row.batch for k, v in found.items()}
    return {
        "ms_a_picture": each["s"],
        "least_ms": each["least"],
        "most_ms": each["most"],
        "single_call_ms": 1000 * found["single"],
        "of_rate": rate and flop * row.batch * steps / found["s"] / rate,
    }


def torch_device() -> tuple[Any, str]:
    """PyTorch, and its name for the device that JAX has.

    Raises:
      ValueError: If it has none: the two would not be compared.
    """
    import torch

    kind = {"gpu": "cuda", "cpu": "cpu"}.get(jax.default_backend(), "")
    if not kind or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(
            f"PyTorch {torch.__version__} cannot use JAX's {jax.devices()[0]}; expected"
            " a build for it. Install one to compare the two."
        )
    return torch, kind


def theirs(row: Row, context: Context) -> dict[str, Any]:
    """PyTorch with prompts as tokens, or timm without prompts, in the same process."""
    torch, device = torch_device()
    import peers

    given = inputs(row)
    images = np.asarray(train.normalise(given.batch["image"], "half"))
    dtype, labels = getattr(torch, row.dtype), np.asarray(given.batch["label"])
    # What JAX's default precision is on such a card.
    torch.set_float32_matmul_precision("high")
    torch.set_flush_denormal(True)
    wait, peak = lambda _: None, None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        wait, peak = lambda _: torch.cuda.synchronize(), torch.cuda.max_memory_allocated
    if row.who == "timm":
        run = peers.timm_program(row.variant, images, device, dtype)
        if run is None:
            raise ValueError(f"timm has no ViT-{row.variant} for 224 px; leave it out.")
    else:
        net = peers.TokenViT(given.model, jax.tree.map(np.asarray, given.backbone))
        net = torch.compile(net.eval()) if row.who == "torch.compile" else net.eval()
        trainable = roofline.trainable_of(given, row.prompts)
        infer, step, _ = peers.torch_programs(
            net, trainable, images, labels, device, dtype
        )
        run = (
            infer if row.what == "inference" else lambda: [step() for _ in range(STEPS)]
        )
    start = time.perf_counter()
    wait(run())
    first = time.perf_counter() - start
    found = clock(run, wait, context.sizes.budget)
    result = speeds(row, context, found, steps_of(row)) | {"compile_s": first}
    if peak:
        result["memory_gb"] = peak() / 2**30
        torch.cuda.empty_cache()
    torch.compiler.reset()
    return result


def card(row: Row, context: Context) -> dict[str, Any]:
    """FLOP/s of products of random matrices, and GB/s of a copy."""
    n, budget = context.sizes.matrix, context.sizes.budget
    model = model_of(row)
    t = (model.image_size // model.patch) ** 2 + 1
    mlp = (row.batch * t, model.width, model.mlp_dim)
    found: dict[str, Any] = {}
    for name, dtype, precision, shape in (
        ("bfloat16", jnp.bfloat16, None, (n, n, n)),
        ("float32", jnp.float32, None, (n, n, n)),
        ("float32, highest", jnp.float32, "highest", (n, n, n)),
        ("bfloat16, the MLP's", jnp.bfloat16, None, mlp),
    ):
        a, b = (
            jax.random.normal(jax.random.key(i), (shape[i], shape[i + 1]), dtype)
            for i in (0, 1)
        )
        product = jax.jit(functools.partial(jnp.matmul, precision=precision))
        run = functools.partial(product.lower(a, b).compile(), a, b)
        s = clock(run, jax.block_until_ready, budget)["s"]
        found[name] = 2 * float(np.prod(shape)) / s
    x = jnp.zeros((4 * n * n,), jnp.float32)
    s = clock(lambda: jnp.negative(x), jax.block_until_ready, budget)["s"]
    found["copy_gb_per_s"] = 2 * x.nbytes / s / 1e9
    stats = jax.devices()[0].memory_stats() or {}
    return found | {"memory_gb": stats.get("bytes_limit", 0) / 2**30}
