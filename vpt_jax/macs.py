# SPDX-License-Identifier: Apache-2.0
"""Multiply-accumulates of a prompted ViT or Swin, counted analytically.

Matrix products only (patch embedding, projections, attention, MLP), as papers count;
elementwise work (normalisation, softmax, GELU) is left out. The paper's table 1 prints
these as "GFLOPs"; one multiply-accumulate is two FLOP.
"""

from collections.abc import Sequence
from typing import Any

from vpt_jax.files.checks import check_integer, expect
from vpt_jax.models.inputs import FORMULATIONS
from vpt_jax.models.swin import Swin
from vpt_jax.models.vit import ViT
from vpt_jax.prompts import check_choice, check_counts


def macs(
    model: Any,
    counts: Sequence[int],
    *,
    formulation: str = "kv",
    deep: bool = True,
    prompt_batch: int | None = None,
) -> int:
    """Multiply-accumulates of one picture's forward pass, without the head.

    Args:
      model: A `ViT` or `Swin` (its sizes are read).
      counts: Prompts per layer, e.g. `vpt_jax.counts(prompts)`.
      formulation: `"kv"`, what this package computes for deep prompts: prompts are keys
        and values, the last block computes only the tokens that are read. `"tokens"`,
        what the reference computes and papers count: prompts are tokens of every block.
      deep: False counts shallow prompts (always as tokens).
      prompt_batch: For `"kv"`: how many pictures share one projection of the prompts
        to keys and values. None: projected beforehand (`prefill`), nothing to count.

    Returns:
      An integer (the projection's share is rounded down).

    Raises:
      ValueError: If the model is neither, or `counts` does not fit its depth, is not
        of integers, or has prompts in later layers with `deep=False`.

    Example:
      >>> from vpt_jax import ViT
      >>> counts = (100,) * 12
      >>> [round(2e-9 * macs(ViT("B/16"), counts, formulation=f), 1)
      ...  for f in ("tokens", "kv")]  # GFLOP
      [53.9, 33.4]
    """
    check_choice("formulation", formulation, FORMULATIONS)
    expect(isinstance(model, ViT | Swin), "model", model, "a ViT or a Swin")
    num = check_counts("counts", counts, model.depth, deep)
    if prompt_batch is not None:
        prompt_batch = check_integer("prompt_batch", prompt_batch, 1)
    as_tokens = formulation == "tokens" or not deep
    if not deep:
        num = num[:1] * model.depth
    if isinstance(model, Swin):
        return _swin_macs(model, num, as_tokens, deep, prompt_batch)
    return _vit_macs(model, num, as_tokens, prompt_batch)


def _vit_macs(
    model: ViT, num: tuple[int, ...], as_tokens: bool, prompt_batch: int | None
) -> int:
    d = model.width
    mlp = (3 if model.swiglu else 2) * d * model.mlp_dim  # per token
    patches = (model.image_size // model.patch) ** 2
    tokens = int(model.class_token) + model.registers + patches
    total = patches * 3 * model.patch**2 * d
    for i, n in enumerate(num):
        if as_tokens:
            t = tokens + n
            total += t * (4 * d * d + mlp) + 2 * t * t * d
            continue
        queries, prompts_read = tokens, False
        if i == model.depth - 1:  # only what is read is computed
            prompts_read = model.readout == "mean_with_prompts"
            queries = 1 if model.readout == "cls" else patches + prompts_read * n
        # queries, output projection, MLP; keys, values; logits, weighted sum
        total += queries * (2 * d * d + mlp) + 2 * tokens * d * d
        total += 2 * queries * (tokens + n) * d
        if prompts_read:  # tokens of this block, in every picture
            total += 2 * n * d * d
        elif prompt_batch:
            total += 2 * n * d * d // prompt_batch
    if model.readout == "map":  # one query, its output and MLP; keys, values of patches
        total += 2 * d * d + mlp + 2 * patches * (d * d + d)
    return total


def _swin_macs(
    model: Swin,
    num: tuple[int, ...],
    as_tokens: bool,
    deep: bool,
    prompt_batch: int | None,
) -> int:
    side = model.image_size // model.patch
    total = side**2 * 3 * model.patch**2 * model.embed_dim
    last, layer = model.depth - 1, 0
    for i, depth in enumerate(model.depths):
        d = model.embed_dim * 2**i
        m = int(d * model.mlp_ratio)
        t = (side // 2**i) ** 2
        area = min(t, model.window**2)
        for _ in range(depth):
            n = num[layer]
            read = layer == last and model.readout == "mean_with_prompts"
            if as_tokens or read:
                # A copy of the prompts in front of every window; one in the MLP.
                copied = area + n
                total += t // area * (copied * 4 * d * d + 2 * copied * copied * d)
                total += (t + n) * 2 * d * m
            else:
                total += t * (4 * d * d + 2 * d * m) + 2 * t * (area + n) * d
                total += 2 * n * d * d // prompt_batch if prompt_batch else 0
            layer += 1
        if layer <= last:  # merging; deep prompts do not pass it
            total += (t // 4 + (0 if deep else num[0])) * 8 * d * d
    return total
