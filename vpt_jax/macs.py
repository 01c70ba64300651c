# SPDX-License-Identifier: Apache-2.0
"""Multiply-accumulates of a prompted ViT, counted analytically.

Matrix products only (patch embedding, projections, attention, MLP), as papers count;
elementwise work (normalisation, softmax, GELU) is left out. The paper's table 1 prints
these as "GFLOPs"; one multiply-accumulate is two FLOP.
"""

from collections.abc import Sequence
from typing import Any

from vpt_jax.models.inputs import FORMULATIONS
from vpt_jax.prompts import check_choice


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
      model: A `ViT` (its sizes are read).
      counts: Prompts per layer.
      formulation: `"kv"`, what this package computes for deep prompts: prompts are keys
        and values, the last block computes the class token alone. `"tokens"`, what the
        reference computes and papers count: prompts are tokens of every block.
      deep: False counts shallow prompts (always as tokens).
      prompt_batch: For `"kv"`: how many pictures share one projection of the prompts
        to keys and values. None: projected beforehand (`prefill`), nothing to count.

    Returns:
      An integer (the projection's share is rounded down).

    Raises:
      ValueError: If `counts` does not fit the model's depth.
    """
    check_choice("formulation", formulation, FORMULATIONS)
    if len(counts) != model.depth:
        raise ValueError(
            f"counts has {len(counts)} entries but the model has depth {model.depth}."
        )
    d, m = model.width, model.mlp_dim
    patches = (model.image_size // model.patch) ** 2
    tokens = 1 + patches
    total = patches * 3 * model.patch**2 * d
    for i in range(model.depth):
        n = counts[i] if deep else counts[0]
        if formulation == "tokens" or not deep:
            t = tokens + n
            total += t * (4 * d * d + 2 * d * m) + 2 * t * t * d
        else:
            q = 1 if i == model.depth - 1 else tokens
            # queries, output projection, MLP; keys, values; logits, weighted sum
            total += q * (2 * d * d + 2 * d * m) + 2 * tokens * d * d
            total += 2 * q * (tokens + n) * d
            total += 2 * n * d * d // prompt_batch if prompt_batch else 0
    return total
