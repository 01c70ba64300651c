# SPDX-License-Identifier: Apache-2.0
r"""Loads timm's models, or sees them refused by family: there is no third outcome.

python benchmarks/timm_scan.py --json scan.json && \
    python benchmarks/timm_scan.py --json scan.json --table

Every model of timm whose name is like that of a ViT, at its default size, with random
weights, as a file of its name: either the features of one random picture equal timm's
to 1e-4 of the largest, or the message names a family. A model that is loaded is also
put under a name that tells nothing: then the same model must come of it, or a question.
What is done is kept in the JSON file; the same command continues. `--blocks 2` compares
what is still to do with two blocks (of a Swin, in each stage), for machines that are
too small for the whole: all that a block's number does not change.
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
    parser.add_argument("--blocks", type=int, default=0, help="0: all")
    parser.add_argument("--words", nargs="*", default=WORDS)
    args = parser.parse_args()
    done = json.loads(args.json.read_text()) if args.json.exists() else {}
    if args.table:
        return table(done)
    with tempfile.TemporaryDirectory() as folder:
        for name in names(args.words, done):
            path = Path(folder) / f"{name}.safetensors"
            keep(args.json, done, name, refused(name, path, args.largest))
        to_do = [n for n, found in done.items() if found["outcome"] == "to do"]
        for name in sorted(to_do, key=lambda n: done[n]["parameters"]):
            path = Path(folder) / f"{name}.safetensors"
            found = compare(name, path, args.blocks)
            keep(args.json, done, name, done[name] | found)
    wrong = [n for n, found in done.items() if found["outcome"] == "WRONG"]
    print(f"{len(done)} models, {len(wrong)} wrong: {wrong}")


def keep(file, done, name, found):
    done[name] = found
    print(name, found, flush=True)
    file.write_text(json.dumps(done, indent=0))


def names(words, done):
    import timm

    every = timm.list_models()
    return [n for n in every if n not in done and any(word in n for word in words)]


def refused(name, path, largest):
    """What a file of the model's names and shapes gives; "to do" if it would load."""
    import timm
    import torch

    import vpt_jax

    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0)
    size = sum(p.numel() for p in net.parameters())
    found = {"parameters": size, "kind": type(net).__name__}
    hollow(net, path)
    try:
        vpt_jax.load_backbone(path)
    except ValueError as error:
        path.unlink()
        if family := FAMILY.search(str(error)):
            return found | {"outcome": "refused", "family": family[1]}
        if "NaN" not in str(error):
            return found | {"outcome": "WRONG", "message": str(error)}
    return found | {"outcome": "not run" if size > largest else "to do"}


def hollow(net, path):
    """A safetensors file of the model's names and shapes that takes no room on disk.

    A refusal by family reads no values; what is read of a file first is NaN here.
    """
    header, end = {}, 0
    for name, tensor in net.state_dict().items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape)}
        header[name]["data_offsets"] = [begin, end]
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.write(b"\xff" * next(iter(header.values()))["data_offsets"][1])
        file.truncate(8 + len(text) + end)


def compare(name, path, blocks=0):
    """Features of one picture, timm's and ours; and what an unknown name gives."""
    import jax.numpy as jnp
    import numpy as np
    import safetensors.torch
    import timm
    import torch

    import vpt_jax

    torch.manual_seed(0)
    fewer = {"depths": (blocks,) * 4} if "swin" in name else {"depth": blocks}
    fewer = fewer if blocks else {}
    if any(word in name for word in ("dinov3", "lingbot")):
        fewer |= {"global_pool": "token"}  # as upstream and we read them
    net = timm.create_model(name, num_classes=0, **fewer).eval()
    side = net.patch_embed.img_size[0]
    x = torch.randn(1, 3, side, side)
    with torch.no_grad():
        for p in net.parameters():
            deviation = p[0].numel() ** -0.5 if p.ndim > 1 else 0.2
            p.add_(torch.randn_like(p) * deviation)
        want = net(x).numpy()
        if "distilled" in name:  # timm's mean is of both tokens
            want = net.forward_features(x)[:, 0].numpy()
    state = {n: t.contiguous() for n, t in net.state_dict().items()}
    safetensors.torch.save_file(state, path)
    del net, state
    model, backbone = vpt_jax.load_backbone(path)
    # timm's patches of 14 px leave the last pixels of 384 alone; ours are whole.
    images = jnp.asarray(x.permute(0, 2, 3, 1).numpy())
    images = images[:, : model.image_size, : model.image_size]
    got = np.asarray(model.apply({"params": backbone}, images)[0])
    off = float(np.abs(got - want).max() / np.abs(want).max())
    del backbone
    unknown = path.rename(path.parent / "mine.safetensors")
    try:
        same = vpt_jax.load_backbone(unknown)[0] == model
        unnamed = "same" if same else "WRONG"
    except ValueError as error:
        asks = any(f"pass {n}=" in str(error) for n in ("num_heads", "activation"))
        unnamed = "asked" if asks else str(error)
    unknown.unlink()
    wrong = off >= 1e-4 or unnamed not in ("same", "asked")
    return {
        "outcome": "WRONG" if wrong else "loaded",
        "off": off,
        "unnamed": unnamed,
        "variant": model.variant or f"{model.width} x {model.depth}",
    } | ({"blocks": blocks} if blocks else {})


def table(done):
    """Markdown: a row per family, those that are loaded first."""
    rows = collections.defaultdict(list)
    for name, found in done.items():
        outcome, kind = found["outcome"], found.get("family", "")
        if blocks := found.get("blocks"):
            kind = f"compared with {blocks} blocks"
        rows[outcome, kind].append(name)
    print("| outcome | family, or how | models | for example | most off | unnamed |")
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
