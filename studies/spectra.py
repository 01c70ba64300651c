# SPDX-License-Identifier: Apache-2.0
"""Attention matrices, their singular values, and what counts as their rank.

What docs/rank_bound.md says of these matrices is checked in
tests/studies/test_study_rank.py.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax.models.inputs import normalise
from vpt_jax.models.layers import Attention
from vpt_jax.prompts import counts

# JAX decomposes the matrices of a batch on all cores at once, by SciPy's OpenBLAS,
# which shares each of them out to all cores again: on two busy cores a matrix of 265
# rows takes 180 ms instead of 3. It reads this when JAX first decomposes something.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Of n tokens and m prompts: all rows and keys [n + m, n + m], as papers mean it; the
# tokens' rows [n, n + m], all that is computed here; of those the tokens' keys [n, n].
MATRICES = ("all", "rows", "block")


def attention_matrices(
    model: Any,
    backbone: Any,
    images: jax.Array,
    prompts: Sequence[jax.Array],
    *,
    deep: bool = True,
) -> list[jax.Array]:
    """Softmax attention with prompts as tokens, `[b, h, n + m, n + m]` per layer.

    Tokens lie as class token, registers, prompts, patches. The rows of the model's own
    tokens are those of the keys-and-values formulation; its last block computes fewer.
    """
    weights = []

    def keep(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = call(*args, **kwargs)
        if isinstance(context.module, Attention) and context.method_name == "__call__":
            weights.append(result[1])
        return result

    with nn.intercept_methods(keep):
        how = {"prompts": prompts, "deep": deep, "formulation": "tokens"}
        model.apply({"params": backbone}, images, **how)
    return weights


@functools.partial(jax.jit, static_argnames=("model", "normalisation", "deep"))
def _of_pictures(
    backbone: Any,
    prompts: Sequence[jax.Array],
    images: jax.Array,
    *,
    model: Any,
    normalisation: str,
    deep: bool,
) -> list[jax.Array]:
    images = normalise(images, normalisation)
    return attention_matrices(model, backbone, images, prompts, deep=deep)


def singular_values(
    backbone: Any,
    prompts: Sequence[jax.Array],
    images: jax.Array | np.ndarray,
    *,
    model: Any,
    normalisation: str,
    deep: bool,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Singular values of every picture's attention, and the attention on prompts.

    One compilation per number of prompts. The cost is that of the decompositions,
    layers times heads times pictures of them, about 0.2 ms for 65 tokens and 3 ms for
    265 on one CPU core. They are done on the host, on all its cores: accelerators
    decompose small matrices one after the other.

    Args:
      backbone: The model's parameters.
      prompts: One `[m, d]` array per layer.
      images: uint8 `[b, s, s, 3]`.
      model: A `ViT`.
      normalisation: As the backbone expects it.
      deep: As the model is run.

    Returns:
      By name in `MATRICES`, `[layers, b, h, k]`, falling; and the share of the tokens'
      attention that prompts get, `[layers, b, h]`.
    """
    how = {"model": model, "normalisation": normalisation, "deep": deep}
    found = _of_pictures(backbone, prompts, images, **how)
    m, first = counts(prompts)[0], int(model.class_token) + model.registers
    own = slice(first, first + m)
    mass, matrices = [], []
    for a in map(np.asarray, found):
        rows = np.delete(a, own, axis=-2)
        mass.append(rows[..., own].sum(axis=-1).mean(axis=-1))
        matrices += [a, rows, np.delete(rows, own, axis=-1)]
    values = [_decomposed(a) for a in matrices]
    number = len(MATRICES)
    return (
        {name: np.stack(values[i::number]) for i, name in enumerate(MATRICES)},
        np.stack(mass),
    )


_svd = jax.jit(functools.partial(jnp.linalg.svd, compute_uv=False))


def _decomposed(matrices: np.ndarray) -> np.ndarray:
    # One batch at a time: two that JAX (0.10) decomposes at once can wait for each
    # other's threads for ever.
    host = jax.local_devices(backend="cpu")[0]
    return np.asarray(_svd(jax.device_put(matrices, host)))


def energy_rank(values: np.ndarray, share: float) -> np.ndarray:
    """How many singular values `[..., k]`, largest first, hold a share of the energy.

    Energy is the sum of squares. A millionth of slack: rounding must not cost a rank.
    """
    return np.asarray((cumulative(values, 2) < share - 1e-6).sum(axis=-1) + 1)


def entropy_rank(values: np.ndarray, power: int = 1) -> np.ndarray:
    """The exponential of the entropy of singular values' shares, `[..., k] -> [...]`.

    Power 1 is the effective rank of Roy and Vetterli (EUSIPCO 2007); power 2 takes the
    shares of the energy. Between 1 and k: all of k equal values count as k.
    """
    p = np.asarray(values, np.float64) ** power
    p /= p.sum(axis=-1, keepdims=True)
    log = np.log(p, out=np.zeros_like(p), where=p > 0)
    return np.asarray(np.exp(-(p * log).sum(axis=-1)))


def cumulative(values: np.ndarray, power: int = 1) -> np.ndarray:
    """Cumulative shares of singular values to a power, largest first; the last is 1."""
    total = np.cumsum(np.asarray(values, np.float64) ** power, axis=-1)
    return total / total[..., -1:]


MEASURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "90": functools.partial(energy_rank, share=0.90),
    "95": functools.partial(energy_rank, share=0.95),
    "99": functools.partial(energy_rank, share=0.99),
    "effective": entropy_rank,
    "energy_entropy": functools.partial(entropy_rank, power=2),
}


def linformer_rank(n: int, epsilon: float) -> float:
    """Rank of Linformer's theorem 1 (arXiv 2006.04768) for n tokens, natural log."""
    return 5 * float(np.log(n)) / (epsilon**2 - epsilon**3)
