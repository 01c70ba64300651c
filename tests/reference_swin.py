# SPDX-License-Identifier: Apache-2.0
"""A prompted Swin in plain NumPy, float64, one picture and one window at a time.

Written from the papers' equations and not from the package: a copy of the prompts
stands in front of every window, their attention outputs are averaged over the windows,
they are replaced before every block (VPT-Deep) or inserted once and merged with
themselves between stages (VPT-Shallow). Slow and obvious on purpose.
"""

import numpy as np
from reference import mlp


def layer_norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-5) * p["scale"] + p["bias"]


def bias_and_mask(cells, side, shift, window, table):
    """What is added to the logit of every pair of a window's `(row, column)` cells.

    Cells are places in the moved picture; a cell that came from the other edge is not
    seen by one that did not.
    """
    added = np.zeros((len(cells), len(cells), table.shape[1]))
    for i, (row, column) in enumerate(cells):
        for j, (other_row, other_column) in enumerate(cells):
            down = row - other_row + window - 1
            right = column - other_column + window - 1
            added[i, j] = table[down * (2 * window - 1) + right]
            for a, b in ((row, other_row), (column, other_column)):
                if (a >= side - shift) != (b >= side - shift):
                    added[i, j] = added[i, j] - 100
                    break
    return added


def attention(x, p, added):
    """Tokens `[t, d]` of one window; `added [t, t, h]` to the logits."""
    out = p["out"]["bias"]
    for h in range(added.shape[-1]):
        q, k, v = (
            x @ p[n]["kernel"][:, h] + p[n]["bias"][h]
            for n in ("query", "key", "value")
        )
        logits = q @ k.T / np.sqrt(q.shape[-1]) + added[..., h]
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = out + weights @ v @ p["out"]["kernel"][h]
    return out


def block(x, prompts, p, window, shift):
    """Picture `[s, s, d]` and prompts `[n, d]`."""
    side, n = len(x), len(prompts)
    window = min(window, side)
    shift = 0 if window == side else shift
    normed, normed_prompts = (layer_norm(y, p["LayerNorm_0"]) for y in (x, prompts))
    table = p["attention"]["relative_position_bias_table"]
    x, from_windows = x.copy(), []
    for top in range(0, side, window):
        for left in range(0, side, window):
            cells = [(top + i, left + j) for i in range(window) for j in range(window)]
            places = [((i + shift) % side, (j + shift) % side) for i, j in cells]
            tokens = [normed[place] for place in places]
            added = np.zeros((n + len(cells), n + len(cells), table.shape[1]))
            added[n:, n:] = bias_and_mask(cells, side, shift, window, table)
            y = attention(np.stack([*normed_prompts, *tokens]), p["attention"], added)
            from_windows.append(y[:n])
            for place, value in zip(places, y[n:], strict=True):
                x[place] = x[place] + value
    prompts = prompts + np.mean(from_windows, axis=0)
    x, prompts = (
        y + mlp(layer_norm(y, p["LayerNorm_1"]), p["MlpBlock_0"]) for y in (x, prompts)
    )
    return x, prompts


def merge(x, p):
    return layer_norm(x, p["norm"]) @ p["reduction"]["kernel"]


def features(params, image, window, prompts=None, deep=True, with_prompts=False):
    """Mean token `[d]` after the final norm, of one `[s, s, 3]` picture."""
    kernel = params["patch_embed"]["kernel"]
    patch, side = kernel.shape[0], len(image) // kernel.shape[0]
    x = np.zeros((side, side, kernel.shape[-1]))
    for i in range(side):
        for j in range(side):
            cut = image[i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            x[i, j] = (cut[..., None] * kernel).sum((0, 1, 2))
    x = layer_norm(x + params["patch_embed"]["bias"], params["patch_norm"])
    names = sorted(  # blocks_{stage}_{block}
        tuple(map(int, name.split("_")[1:]))
        for name in params
        if name.startswith("blocks_")
    )
    state = np.zeros((0, x.shape[-1]))
    for layer, (i, j) in enumerate(names):
        if i and not j:
            quarters = [x[a::2, b::2] for b in (0, 1) for a in (0, 1)]
            x = merge(np.concatenate(quarters, axis=-1), params[f"merging_{i - 1}"])
            state = merge(np.tile(state, 4), params[f"merging_{i - 1}"])
        if prompts is not None and (deep or layer == 0):
            state = prompts[layer]
        shift = window // 2 if j % 2 else 0
        x, state = block(x, state, params[f"blocks_{i}_{j}"], window, shift)
    tokens = x.reshape(-1, x.shape[-1])
    if with_prompts:
        tokens = np.concatenate([state, tokens])
    return layer_norm(tokens, params["norm"]).mean(0)
