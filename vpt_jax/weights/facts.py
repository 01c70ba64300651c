# SPDX-License-Identifier: Apache-2.0
"""What weights cannot say of their network: who tells it, and what is assumed.

In this order: the caller; the `config.json` beside the file; the table of published
files, by the path; the file's own model card. Where all are silent, what is assumed is
said in one line, and what published files of the same names and sizes have differently
is asked for.
"""

import os
from collections.abc import Mapping
from typing import Any

from vpt_jax.files.checks import check_integer, check_path
from vpt_jax.models.posemb import RESIZES
from vpt_jax.models.swin import EPSILON
from vpt_jax.prompts import check_choice
from vpt_jax.weights.backbones import AMBIGUOUS, architecture, known_backbone
from vpt_jax.weights.naming import Named
from vpt_jax.weights.readers import CheckpointError
from vpt_jax.weights.remote import local_path
from vpt_jax.weights.sidecar import config_facts
from vpt_jax.weights.sizes import differing


def card_of(path: str | os.PathLike, own: Mapping[str, Any]) -> dict[str, Any]:
    """All that is told of a file: `own` is its model card; `{}` if nothing is.

    Raises:
      CheckpointError: If the `config.json` beside it cannot be used.
    """
    config = config_facts(local_path(path))
    # Sizes are held against the file where a config.json says them.
    card = {k: v for k, v in own.items() if k not in ("width", "depth")}
    if facts := architecture(path):
        card |= facts | {"architecture": os.path.basename(path)}
    for name in (path, config.get("architecture", "")):
        card |= architecture(name)
        row = known_backbone(name) if name else None
        card |= {k: v for k, v in row.card().items() if v} if row else {}
    return card | {k: v for k, v in config.items() if v}


def check_given(variant: Any, path: Any, image_size: Any, resize: str) -> int:
    """The side of pictures, 0 for the file's own.

    Raises:
      ValueError: If one of the arguments of `load_backbone` cannot be what it is for.
    """
    for name, value in (("variant", variant), ("path", path or "")):
        check_path(name, value)
    if resize:
        check_choice("resize", resize, RESIZES)
    return check_integer("image_size", image_size, 0)


def check_sizes(named: Named, card: Mapping[str, Any], path: Any) -> None:
    """Raises unless the `config.json` is that of the weights.

    Raises:
      CheckpointError: It names the sizes, or what a Swin of ours does not compute.
    """
    wrong = differing(named, dict(card))
    if named.kind == "swin":
        if card.get("activation", "gelu") != "gelu":
            wrong.append(f"activation {card['activation']} (Swin has gelu here)")
        if card.get("epsilon", EPSILON) != EPSILON:
            wrong.append(f"epsilon {card['epsilon']} (Swin has {EPSILON} here)")
    if wrong:
        raise CheckpointError(
            f"{path}: the config.json beside it has {', '.join(wrong)}; expected that"
            " of this file. Move it away if it belongs to another."
        )


def assumed(
    model: Any, card: Mapping[str, Any], given: Mapping[str, Any], resized: bool
) -> str:
    """The line that says what nobody told; empty where somebody did.

    Args:
      model: As it was found.
      card: Of `card_of`.
      given: The caller's arguments, without the empty ones.
      resized: Whether the position table was.
    """
    if _is_whole(card):
        return ""
    names = ["num_heads", "activation", "epsilon", "readout", "norm"]
    told = {n: getattr(model, n) for n in names if hasattr(model, n)}
    if resized and model.posemb == "learned":
        told["resize"] = "corner_aligned"
    if "num_heads" in told and not isinstance(told["num_heads"], int):
        del told["num_heads"]  # a Swin's follow from its tables
    told = {n: value for n, value in told.items() if n not in given and not card.get(n)}
    shown = ", ".join(f"{n}={value!r}" for n, value in told.items())
    beside = "no config.json lies beside it"
    beside = "neither its card nor a config.json says more" if card else beside
    return shown and f"no published file has this name and {beside}; assumed {shown}"


def _is_whole(card: Mapping[str, Any]) -> bool:
    """Whether a card is of a model that is known: what it does not say is usual."""
    return bool({"name", "kind", "architecture", "variant"} & card.keys())


def ask(
    model: Any,
    named: Named,
    card: Mapping[str, Any],
    given: Mapping[str, Any],
    path: Any,
) -> None:
    """Raises where nobody told what published files of these arrays have differently.

    Raises:
      ValueError: With the arguments to pass and their possible values.
    """
    fused = any(e.source.endswith("attn.qkv.weight") for e in named.entries)
    if _is_whole(card) or named.kind != "vit" or not (fused or model.pre_norm):
        return
    open_questions = [
        f"{q.fact}={q.answers}"
        for q in AMBIGUOUS
        if q.fact not in given and not card.get(q.fact) and q.applies(model)
    ]
    if open_questions:
        raise ValueError(
            f"{path} does not say, by its name or a config.json beside it, what"
            f" published files of its sizes have differently; pass"
            f" {'; and '.join(open_questions)}."
        )
