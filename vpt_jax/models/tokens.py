# SPDX-License-Identifier: Apache-2.0
"""The tokens that enter each block: what prompts can be started from."""

import re
from typing import Any

import flax.linen as nn
import jax
import numpy as np

BLOCKS = r"encoderblock_\d+|blocks_\d+_\d+"  # of ViT and Linen code like it; of Swin


def block_tokens(
    model: Any, backbone: Any, images: jax.Array, *, block: str = ""
) -> tuple[np.ndarray, ...]:
    """The tokens that enter each block on some pictures, without prompts.

    Args:
      model: A `ViT`, a `Swin` or a `PromptedModel`.
      backbone: Its parameters.
      images: `[b, s, s, 3]`, normalised as the backbone expects; 64 training pictures
        are plenty.
      block: Regular expression for a block's name, for foreign models that have others.

    Returns:
      One `[m_i, d]` array per layer for `init_prompts(..., init="tokens")`: the tokens
      of all pictures, class token and registers among them; of Swin those of a stage.

    Raises:
      ValueError: If not every layer was found.

    Example:
      >>> from vpt_jax import ViT, init_prompts
      >>> model = ViT("demo/4")
      >>> images = jax.numpy.zeros((2, 32, 32, 3))
      >>> backbone = model.init(jax.random.key(0), images)["params"]
      >>> tokens = block_tokens(model, backbone, images)
      >>> start = {"init": "tokens", "tokens": tokens}
      >>> prompts = init_prompts(jax.random.key(0), model, 3, **start)
      >>> len(tokens), tokens[0].shape, prompts[0].shape
      (6, (130, 128), (3, 128))
    """
    pattern = re.compile(block or getattr(model, "block", "") or BLOCKS)

    @jax.jit
    def run(backbone: Any, images: jax.Array) -> list[jax.Array]:
        found: list[jax.Array] = []

        def keep(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            name = context.module.name or ""
            if context.method_name == "__call__" and pattern.fullmatch(name) and args:
                found.append(args[0].reshape(-1, args[0].shape[-1]))
            return call(*args, **kwargs)

        with nn.intercept_methods(keep):
            model.apply({"params": backbone}, images)
        return found

    found = run(backbone, images)
    widths = [t.shape[1] for t in found]
    if widths != list(model.widths):
        raise ValueError(
            f"blocks named {pattern.pattern!r} were called with tokens of widths"
            f" {widths}; expected {list(model.widths)}, one per layer. Pass block=, a"
            " regular expression that matches the blocks' names."
        )
    return tuple(map(np.asarray, found))
