# SPDX-License-Identifier: Apache-2.0
r"""Loads timm's models, or sees them refused by family: there is no third outcome.

python benchmarks/timm_scan.py --json scan.json && \
    python benchmarks/timm_scan.py --json scan.json --table

Every model of timm whose name is like that of a ViT, at its default size, with random
weights, as a file of its name: either the features of one random picture equal timm's
to 1e-4 of the largest, or the message names a family. A model that is loaded is also
put under a name that tells nothing: then the same model must come of it, or a question.
What is done is kept in the JSON file; the same command continues.
"""

import argparse
import collections
import json
import re
import struct
import tempfile
from pathlib import Path

WORDS = ("vit", "deit", "swin", "moco", "mae", "dino", "beit", "eva", "clip", "hiera")
WORDS += ("cait", "xcit", "volo", "sam", "jepa", "aim")
FAMILY = re.compile(r"holds (an? .*?), which is not supported: ")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="print what was found")
    parser.add_argument("--largest", type=float, default=1.2e9, help="parameters")
    parser.add_argument("--words", nargs="*", default=WORDS)
    args = parser.parse_args()
    done = json.loads(args.json.read_text()) if args.json.exists() else {}
    if args.table:
        return table(done)
    for name, size in described(args.words, done):
        with tempfile.TemporaryDirectory() as folder:
            done[name] = scan(name, size, Path(folder), args.largest)
        print(name, done[name], flush=True)
        args.json.write_text(json.dumps(done, indent=0))
    wrong = [n for n, found in done.items() if found["outcome"] == "WRONG"]
    print(f"{len(done)} models, {len(wrong)} wrong: {wrong}")


def described(words, done):
    """Names that are still to be scanned, small models first."""
    import timm
    import torch

    found = []
    for name in timm.list_models():
        if name in done or not any(word in name for word in words):
            continue
        with torch.device("meta"):
            net = timm.create_model(name, num_classes=0)
        found.append((name, sum(p.numel() for p in net.parameters())))
    return sorted(found, key=lambda pair: pair[1])


def scan(name, size, folder, largest):
    import timm
    import torch

    import vpt_jax

    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0)
    found = {"parameters": size, "kind": type(net).__name__}
    path = folder / f"{name}.safetensors"
    hollow(net, path)  # a refusal reads no values
    try:
        vpt_jax.load_backbone(path)
    except ValueError as error:
        family = FAMILY.search(str(error))
        told = {"family": family[1]} if family else {"message": str(error)}
        return found | {"outcome": "refused" if family else "WRONG", **told}
    except MemoryError:
        return found | {"outcome": "not run"}
    if size > largest:
        return found | {"outcome": "not run"}
    return found | compare(name, path)


def hollow(net, path):
    """A safetensors file of the model's names and shapes that takes no room on disk."""
    header, end = {}, 0
    for name, tensor in net.state_dict().items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape)}
        header[name]["data_offsets"] = [begin, end]
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def compare(name, path):
    """Features of one picture, timm's and ours; and what an unknown name gives."""
    import jax.numpy as jnp
    import numpy as np
    import safetensors.torch
    import timm
    import torch

    import vpt_jax

    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0).eval()
    side = net.patch_embed.img_size[0]
    x = torch.randn(1, 3, side, side)
    with torch.no_grad():
        for p in net.parameters():
            deviation = p[0].numel() ** -0.5 if p.ndim > 1 else 0.2
            p.add_(torch.randn_like(p) * deviation)
        want = net(x).numpy()
    state = {n: t.contiguous() for n, t in net.state_dict().items()}
    path.unlink()
    safetensors.torch.save_file(state, path)
    del net, state
    model, backbone = vpt_jax.load_backbone(path)
    images = jnp.asarray(x.permute(0, 2, 3, 1).numpy())
    got = np.asarray(model.apply({"params": backbone}, images)[0])
    off = float(np.abs(got - want).max() / np.abs(want).max())
    del backbone
    unknown = path.rename(path.parent / "mine.safetensors")
    try:
        same = vpt_jax.load_backbone(unknown)[0] == model
        unnamed = "same" if same else "WRONG"
    except ValueError as error:
        unnamed = "asked" if "pass num_heads=" in str(error) else str(error)
        unnamed = "asked" if "pass activation=" in str(error) else unnamed
    wrong = off >= 1e-4 or unnamed not in ("same", "asked")
    return {
        "outcome": "WRONG" if wrong else "loaded",
        "off": off,
        "unnamed": unnamed,
        "variant": model.variant or f"{model.width} x {model.depth}",
    }


def table(done):
    """Markdown: a row per family, those that are loaded first."""
    rows = collections.defaultdict(list)
    for name, found in done.items():
        kind = found.get("family") or found["outcome"]
        rows[found["outcome"], kind if found["outcome"] == "refused" else ""].append(
            name
        )
    print("| outcome | family | models | for example | most off | unnamed |")
    print("|---|---|---|---|---|---|")
    for (outcome, family), names in sorted(rows.items()):
        off = [done[n]["off"] for n in names if "off" in done[n]]
        unnamed = collections.Counter(done[n].get("unnamed", "") for n in names)
        said = ", ".join(f"{k} {v}" for k, v in sorted(unnamed.items()) if k)
        most = f"{max(off):.0e}" if off else ""
        few = ", ".join(sorted(names, key=len)[:3])
        print(f"| {outcome} | {family} | {len(names)} | {few} | {most} | {said} |")


if __name__ == "__main__":
    main()
