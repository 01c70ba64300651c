# SPDX-License-Identifier: Apache-2.0
r"""How long loading a backbone takes, and how much memory.

python benchmarks/load_time.py --variants B/16 L/16

Writes random weights of a variant in several formats to a temporary folder, loads each
in a fresh process, and prints seconds (median of `--rounds`) and the most memory that
the process used above what it used before loading, over the file's size.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

MEASURE = """
import json, resource, sys, time
import jax, jax.numpy as jnp, vpt_jax
jnp.zeros(1).block_until_ready()
# Peak memory counts from here (Linux).
open("/proc/self/clear_refs", "w").write("5")
def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(s.split()[1]) for s in lines if s.startswith(name)) * 1024
before = status("VmRSS")
start = time.perf_counter()
_, backbone = vpt_jax.load_backbone(sys.argv[1], sys.argv[2])
jax.block_until_ready(backbone)
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "bytes": status("VmHWM") - before}))
"""


def write_files(variant, folder):
    """Random weights by Google's names and, if timm is there, as PyTorch has them."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import safetensors.numpy

    import vpt_jax
    from vpt_jax.weights.naming import named_leaves

    model = vpt_jax.ViT(variant)
    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    flat = {
        name: rng.standard_normal(leaf.shape, np.float32)
        for name, leaf in named_leaves(shapes).items()
    }
    np.savez(folder / "google.npz", **flat)
    safetensors.numpy.save_file(flat, folder / "google.safetensors")
    try:
        import timm
        import torch
        from safetensors.torch import save_file
    except ImportError:
        print("timm is not installed: PyTorch's files are left out")
        return
    size, patch = variant.split("/")
    name = {"S": "small", "B": "base", "L": "large"}[size]
    net = timm.create_model(f"vit_{name}_patch{patch}_224", num_classes=0)
    state = net.state_dict()
    torch.save(state, folder / "timm.pth")
    save_file(state, folder / "timm.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=["B/16", "L/16"])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print("variant  file                   MB   seconds  memory / file")
    for variant in args.variants:
        with tempfile.TemporaryDirectory() as folder:
            write_files(variant, Path(folder))
            for path in sorted(Path(folder).iterdir()):
                command = [sys.executable, "-c", MEASURE, variant, str(path)]
                how = {"check": True, "capture_output": True, "text": True}
                runs = [
                    json.loads(subprocess.run(command, **how).stdout)
                    for _ in range(args.rounds)
                ]
                size = path.stat().st_size
                seconds = statistics.median(r["seconds"] for r in runs)
                memory = max(r["bytes"] for r in runs) / size
                print(
                    f"{variant:8} {path.name:20} {size / 1e6:6.0f}   {seconds:7.2f}"
                    f"  {memory:13.2f}"
                )


if __name__ == "__main__":
    main()
