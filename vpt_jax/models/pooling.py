# SPDX-License-Identifier: Apache-2.0
"""Attention pooling (Zhai et al., arXiv 2106.04560; SigLIP), with big_vision's names.

It takes no prompts: those end with the last block, and their outputs are not pooled
over. So a prompt stays a key and value of its layer and nothing else, and a prompt that
is masked there is gone from the features.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpt_jax.models.layers import Attention, LayerNorm, MlpBlock
from vpt_jax.prompts import per_example


class MAPHead(nn.Module):
    """One learned query attends to the patches; then `x + MLP(LN(x))`."""

    num_heads: int
    mlp_dim: int
    activation: str = "gelu"
    epsilon: float = LayerNorm.epsilon
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Patches after the final norm `[b, t, d]` to features `[b, d]`."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        probe = self.param(
            "probe",
            nn.initializers.xavier_uniform(),
            (1, 1, x.shape[2]),
            self.param_dtype,
        )
        query = per_example(probe[0].astype(x.dtype), x)
        attention = Attention(
            self.num_heads, **kinds, name="MultiHeadDotProductAttention_0"
        )
        pooled, _ = attention(query, x, None, None)
        y = LayerNorm(**kinds, epsilon=self.epsilon)(pooled)
        y = MlpBlock(self.mlp_dim, activation=self.activation, **kinds)(y)
        return (pooled + y)[:, 0]
