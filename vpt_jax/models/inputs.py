# SPDX-License-Identifier: Apache-2.0
"""What a model checks of its prompts, masks and gates; the same for every model."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vpt_jax.models.attention import wide
from vpt_jax.models.layers import KeyValue, batched
from vpt_jax.prompts import check_choice

FORMULATIONS = ("kv", "tokens")


class Inputs(NamedTuple):
    """Checked arguments of a forward pass, one entry per layer."""

    prompts: list[Any]  # None where a layer has none
    # Of the prompts' keys, [b or 1, n_i]; or [b, h, q, n_i], by head and query.
    weights: list[jax.Array | None]
    deep: bool
    formulation: str


def prepare(
    prompts: Sequence[Any] | None,
    mask: Sequence[jax.Array] | None,
    gate: Sequence[jax.Array] | None,
    *,
    widths: tuple[int, ...],
    deep: bool,
    formulation: str,
    dtype: Any,
) -> Inputs:
    """Checks the arguments that every model of this package takes.

    Shallow prompts always run as tokens; a model without prompts as the plain network.

    Raises:
      ValueError: If something does not fit, with got, expected and what to do.
    """
    check_choice("formulation", formulation, FORMULATIONS)
    depth = len(widths)
    if prompts is None:
        if mask is not None or gate is not None:
            raise ValueError("prompt_mask and prompt_gate need prompts; got None.")
        return Inputs([None] * depth, [None] * depth, True, "kv")
    num = check_prompts(prompts, widths)
    weights = key_weights(mask, gate, num)
    prefilled = any(isinstance(p, KeyValue) for p in prompts)
    if not deep:
        if weights[0] is not None and weights[0].ndim == 4:
            raise ValueError(
                f"prompt_gate has shape {weights[0].shape}, by head and query, with"
                " deep=False; shallow prompts act in every layer, pass [b, n_0]."
            )
        if any(num[1:]):
            raise ValueError(
                f"prompts have counts {num} with deep=False; shallow prompts belong to"
                " the first layer only, later counts must be 0."
            )
        weights, formulation = [weights[0]] * depth, "tokens"
    if prefilled and formulation == "tokens":
        raise ValueError(
            "prefilled keys and values only exist in the 'kv' formulation of deep"
            " prompts; pass the prompts themselves."
        )
    cast = [p if isinstance(p, KeyValue) else p.astype(dtype) for p in prompts]
    if formulation == "kv":  # a layer without prompts is the plain block
        cast = [p if n else None for p, n in zip(cast, num, strict=True)]
    return Inputs(cast, weights, deep, formulation)


def check_prompts(prompts: Sequence[Any], widths: tuple[int, ...]) -> tuple[int, ...]:
    """Raises ValueError unless there is one array of the right width per layer.

    Returns:
      The counts.
    """
    if len(prompts) != len(widths):
        raise ValueError(
            f"prompts have {len(prompts)} layers but the model has depth {len(widths)};"
            f" pass one array per layer (an empty [0, {widths[0]}] array for none)."
        )
    num = []
    for i, (p, width) in enumerate(zip(prompts, widths, strict=True)):
        if isinstance(p, KeyValue):
            h, n, c = p.key.shape[-3:]
            got = h * c
        else:
            n, got = p.shape[-2:] if p.ndim in (2, 3) else (0, -1)
        if got != width:
            shape = tuple(jnp.shape(p.key if isinstance(p, KeyValue) else p))
            raise ValueError(
                f"prompts[{i}] has shape {shape} but that layer has width {width};"
                f" expected [n, {width}] (or [b, n, {width}]). Were these prompts made"
                " for another backbone?"
            )
        num.append(n)
    return tuple(num)


def key_weights(
    mask: Sequence[jax.Array] | None,
    gate: Sequence[jax.Array] | None,
    num: tuple[int, ...],
) -> list[jax.Array | None]:
    """Mask times gate as float32 `[b or 1, n_i]` per layer; None where neither is.

    A gate `[b, h, q, n_i]` (per head and query) keeps its axes.
    """
    for name, given in (("prompt_mask", mask), ("prompt_gate", gate)):
        if given is None:
            continue
        got = tuple(int(g.shape[-1]) for g in given)
        if got != num:
            raise ValueError(
                f"{name} has {got} entries per layer but the prompts have {num}; pass"
                " one entry per prompt, layer by layer."
            )
    result: list[jax.Array | None] = []
    for i, n in enumerate(num):
        weight = None
        if n and gate is not None:
            weight = gate[i] if gate[i].ndim == 4 else batched(gate[i], 2)
            weight = weight.astype(wide(weight.dtype))
        if n and mask is not None:
            keep = batched(mask[i], 2)
            if weight is None:
                weight = keep.astype(jnp.float32)
            else:
                keep = keep if weight.ndim == 2 else keep[:, None, None]
                weight = jnp.where(keep, weight, jnp.zeros((), weight.dtype))
        result.append(weight)
    return result


def prefill(model: Any, backbone: Any, prompts: Sequence[jax.Array]) -> Any:
    """The prompts' keys and values for inference, computed once.

    Args:
      model: The model that will take them.
      backbone: Its parameters.
      prompts: One `[n_i, d]` array per layer (deep prompts).

    Returns:
      One `KeyValue` per layer (the last layer's prompts stay as they are where the
      read-out averages over their outputs); pass it as `prompts=` in their place.
    """
    return model.apply({"params": backbone}, prompts, method="prefill")
