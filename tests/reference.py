# SPDX-License-Identifier: Apache-2.0
"""A prompted ViT in plain NumPy, float64, one picture at a time: the oracle.

Written from the papers' equations and not from the package: prompts are tokens between
class token and patches, replaced before every layer (VPT-Deep) or inserted once
(VPT-Shallow). Slow and obvious on purpose.
"""

import numpy as np
from scipy.special import erf


def layer_norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-6) * p["scale"] + p["bias"]


def attention(x, p):
    heads = []
    for h in range(p["query"]["kernel"].shape[1]):
        q, k, v = (
            x @ p[n]["kernel"][:, h] + p[n]["bias"][h]
            for n in ("query", "key", "value")
        )
        logits = q @ k.T / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        heads.append(weights @ v @ p["out"]["kernel"][h])
    return sum(heads) + p["out"]["bias"]


def mlp(x, p):
    x = x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
    x = x * 0.5 * (1 + erf(x / np.sqrt(2)))
    return x @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]


def features(params, image, prompts=None, deep=True):
    """Class token `[d]` after the final norm, of one `[s, s, 3]` picture."""
    kernel = params["embedding"]["kernel"]
    patch, side = kernel.shape[0], image.shape[0]
    tokens = [params["cls"][0, 0]]
    for i in range(0, side, patch):
        for j in range(0, side, patch):
            cut = image[i : i + patch, j : j + patch]
            tokens.append((cut[..., None] * kernel).sum((0, 1, 2)))
            tokens[-1] = tokens[-1] + params["embedding"]["bias"]
    encoder = params["Transformer"]
    x = np.stack(tokens) + encoder["posembed_input"]["pos_embedding"][0]
    depth = sum(name.startswith("encoderblock_") for name in encoder)
    n = 0
    for i in range(depth):
        if prompts is not None and (deep or i == 0):
            x = np.concatenate([x[:1], prompts[i], x[1 + n :]])
            n = len(prompts[i])
        p = encoder[f"encoderblock_{i}"]
        x = x + attention(
            layer_norm(x, p["LayerNorm_0"]), p["MultiHeadDotProductAttention_0"]
        )
        x = x + mlp(layer_norm(x, p["LayerNorm_1"]), p["MlpBlock_0"])
    return layer_norm(x, encoder["encoder_norm"])[0]
