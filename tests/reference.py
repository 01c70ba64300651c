# SPDX-License-Identifier: Apache-2.0
"""A prompted ViT in plain NumPy, float64, one picture at a time: the oracle.

Written from the papers' equations and not from the package: prompts are tokens between
class token and patches, replaced before every layer (VPT-Deep) or inserted once
(VPT-Shallow). Slow and obvious on purpose.
"""

import numpy as np
from scipy.special import erf


def layer_norm(x, p, epsilon=1e-6):
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + epsilon) * p["scale"] + p["bias"]


def attend(queries, x, p, turned=lambda x: x):
    heads = []
    for h in range(p["query"]["kernel"].shape[1]):
        q, k, v = (
            tokens @ p[n]["kernel"][:, h] + p[n]["bias"][h]
            for n, tokens in (("query", queries), ("key", x), ("value", x))
        )
        logits = turned(q) @ turned(k).T / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        heads.append(weights @ v @ p["out"]["kernel"][h])
    return sum(heads) + p["out"]["bias"]


def turned_by_place(x, side):
    """DINOv3's rotary positions: columns j and j + c / 2 as one complex number."""
    half, patches = x.shape[1] // 2, side * side
    z = x[:, :half] + 1j * x[:, half:]
    periods = 100 ** (np.arange(half // 2) / (half // 2))
    for i in range(side):
        for j in range(side):
            place = [2 * (k + 0.5) / side - 1 for k in (i, j)]
            angle = 2 * np.pi * np.concatenate([place[0] / periods, place[1] / periods])
            z[len(x) - patches + i * side + j] *= np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=1)


ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}


def mlp(x, p, activation="gelu"):
    x = x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
    hidden = p["Dense_1"]["kernel"].shape[0]
    if x.shape[-1] == 2 * hidden:  # SwiGLU
        x = x[:, :hidden] / (1 + np.exp(-x[:, :hidden])) * x[:, hidden:]
    else:
        x = ACTIVATIONS[activation](x)
    return x @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]


def patches_of(params, image):
    kernel = params["embedding"]["kernel"]
    patch, side = kernel.shape[0], image.shape[0]
    tokens = []
    for i in range(0, side, patch):
        for j in range(0, side, patch):
            cut = image[i : i + patch, j : j + patch]
            tokens.append((cut[..., None] * kernel).sum((0, 1, 2)))
            tokens[-1] = tokens[-1] + params["embedding"]["bias"]
    return np.stack(tokens)


def sincos(grid, width):
    table = np.zeros((grid, grid, width))
    count = width // 4
    for i in range(grid):
        for j in range(grid):
            for f in range(count):
                slow = 10000 ** (f / (count - 1))
                waves = [np.sin(j / slow), np.cos(j / slow)]
                waves += [np.sin(i / slow), np.cos(i / slow)]
                for part, wave in enumerate(waves):
                    table[i, j, part * count + f] = wave
    return table.reshape(grid * grid, width)


def features(
    params,
    image,
    prompts=None,
    deep=True,
    readout="cls",
    norm="before",
    posemb="learned",
    activation="gelu",
    epsilon=1e-6,
):
    """Features `[d]` of one `[s, s, 3]` picture, by default the class token's."""
    encoder = params["Transformer"]
    x = patches_of(params, image)
    grid = round(len(x) ** 0.5)
    turned = {}
    if posemb == "rotary":
        turned = {"turned": lambda x: turned_by_place(x, grid)}
    has_cls = "cls" in params
    if has_cls:
        x = np.concatenate([params["cls"][0], x])
    if "posembed_input" in encoder:
        x = x + encoder["posembed_input"]["pos_embedding"][0]
    elif posemb == "sincos":
        x[has_cls:] += sincos(grid, x.shape[1])
    first = int(has_cls)
    if "registers" in params:
        x = np.concatenate([x[:first], params["registers"][0], x[first:]])
        first += len(params["registers"][0])
    if "input_norm" in encoder:
        x = layer_norm(x, encoder["input_norm"], epsilon)
    depth = sum(name.startswith("encoderblock_") for name in encoder)
    n = 0
    for i in range(depth):
        if prompts is not None and (deep or i == 0):
            x = np.concatenate([x[:first], prompts[i], x[first + n :]])
            n = len(prompts[i])
        p = encoder[f"encoderblock_{i}"]
        scales = [p.get(f"LayerScale_{k}", {"gamma": 1.0})["gamma"] for k in (0, 1)]
        y = layer_norm(x, p["LayerNorm_0"], epsilon)
        x = x + scales[0] * attend(y, y, p["MultiHeadDotProductAttention_0"], **turned)
        y = layer_norm(x, p["LayerNorm_1"], epsilon)
        x = x + scales[1] * mlp(y, p["MlpBlock_0"], activation)
    start = first if readout == "mean_with_prompts" else first + n
    read = x[:1] if readout == "cls" else x[start:]
    if norm == "after":
        return layer_norm(read.mean(0), encoder["encoder_norm"], epsilon)
    read = layer_norm(read, encoder["encoder_norm"], epsilon)
    if readout == "map":  # prompts are not pooled over
        p = params["MAPHead_0"]
        x = attend(p["probe"][0], read, p["MultiHeadDotProductAttention_0"])[0]
        y = layer_norm(x, p["LayerNorm_0"], epsilon)
        return x + mlp(y, p["MlpBlock_0"], activation)
    return read.mean(0)
