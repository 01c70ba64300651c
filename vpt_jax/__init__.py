# SPDX-License-Identifier: Apache-2.0
"""Visual Prompt Tuning and Prompt Condensation for JAX/Flax."""

import importlib
from typing import TYPE_CHECKING, Any

from vpt_jax.condense import condense, importance, keep_mask
from vpt_jax.intercept import PromptedModel, prompted
from vpt_jax.macs import macs
from vpt_jax.models.inputs import normalise, prefill
from vpt_jax.models.layers import KeyValue
from vpt_jax.models.posemb import resize_pos_embedding
from vpt_jax.models.swin import Swin
from vpt_jax.models.tokens import block_tokens
from vpt_jax.models.vit import ViT
from vpt_jax.prompts import (
    apply_head,
    counts,
    cross_entropy,
    init_head,
    init_prompts,
    prompt_dropout,
)
from vpt_jax.weights.checkpoint import load_backbone, read_card
from vpt_jax.weights.readers import CheckpointError
from vpt_jax.weights.release import (
    PromptFile,
    backbone_hash,
    load_prompts,
    save_prompts,
)

if TYPE_CHECKING:
    from vpt_jax.serve.classifier import Classifier, load_classifier
    from vpt_jax.serve.export import export

__version__ = "0.1.0"

# What needs Pillow and optax is imported when it is asked for, from `serve`.
_LATER = {
    "Classifier": "classifier",
    "load_classifier": "classifier",
    "export": "export",
}

__all__ = [
    "CheckpointError",
    "Classifier",
    "KeyValue",
    "PromptFile",
    "PromptedModel",
    "Swin",
    "ViT",
    "apply_head",
    "backbone_hash",
    "block_tokens",
    "condense",
    "counts",
    "cross_entropy",
    "export",
    "importance",
    "init_head",
    "init_prompts",
    "keep_mask",
    "load_backbone",
    "load_classifier",
    "load_prompts",
    "macs",
    "normalise",
    "prefill",
    "prompt_dropout",
    "prompted",
    "read_card",
    "resize_pos_embedding",
    "save_prompts",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"vpt_jax.serve.{_LATER[name]}"), name)
