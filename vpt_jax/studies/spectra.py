# SPDX-License-Identifier: Apache-2.0
"""Attention matrices, their singular values, and how ranks grow with prompts.

What docs/rank_bound.md says of these matrices is checked in tests/test_study_rank.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax.data.augment import normalise
from vpt_jax.models.layers import Attention
from vpt_jax.models.vit import drop

# Of n tokens and m prompts: all rows and keys [n + m, n + m], as papers mean it; the
# tokens' rows [n, n + m], all that is computed here; of those the tokens' keys [n, n].
MATRICES = ("all", "rows", "block")
# How a rank may grow with x = m / n.
GROWTH: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "log": np.log1p,
    "sqrt": np.sqrt,
    "linear": lambda x: x,
}


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
        model.apply(
            {"params": backbone},
            images,
            prompts=prompts,
            deep=deep,
            formulation="tokens",
        )
    return weights


@functools.partial(jax.jit, static_argnames=("model", "normalisation", "deep"))
def singular_values(
    backbone: Any,
    prompts: Sequence[jax.Array],
    images: jax.Array,
    *,
    model: Any,
    normalisation: str,
    deep: bool,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Singular values of every picture's attention, and the attention on prompts.

    One compilation per number of prompts. The cost is that of the decompositions,
    layers times heads times pictures of them: about 0.5 ms each for 65 tokens and 20 ms
    for 265 on one CPU core. Eigenvalues of `A A^T` take longer there and lose half of
    the digits.

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
    images = normalise(images, normalisation)
    matrices = attention_matrices(model, backbone, images, prompts, deep=deep)
    m, first = prompts[0].shape[0], int(model.class_token) + model.registers
    values: dict[str, list[jax.Array]] = {name: [] for name in MATRICES}
    mass = []
    for a in matrices:
        rows = drop(a, m, first, axis=2)
        block = drop(rows, m, first, axis=3)
        for name, matrix in zip(MATRICES, (a, rows, block), strict=True):
            values[name].append(jnp.linalg.svd(matrix, compute_uv=False))
        mass.append(rows[..., first : first + m].sum(axis=-1).mean(axis=-1))
    return {name: jnp.stack(v) for name, v in values.items()}, jnp.stack(mass)


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


def fit(x: np.ndarray, y: np.ndarray, form: str) -> tuple[np.ndarray, np.ndarray]:
    """Least squares `a + b GROWTH[form](x)`, for `x [c]` and `y [..., c]`."""
    f = GROWTH[form](x)
    centred = f - f.mean()
    b = np.asarray((y * centred).sum(axis=-1) / (centred @ centred))
    return np.asarray(y.mean(axis=-1) - b * f.mean()), b


def held_out(x: np.ndarray, y: np.ndarray, form: str) -> np.ndarray:
    """Root mean square error at points that a fit has not seen, one at a time.

    Of `y [..., c]` at `x [c]` (at least 3 points, or a line cannot be wrong); `[...]`.
    """
    errors = []
    for i in range(len(x)):
        a, b = fit(np.delete(x, i), np.delete(y, i, axis=-1), form)
        errors.append(a + b * GROWTH[form](x[i]) - y[..., i])
    return np.asarray(np.sqrt(np.mean(np.square(errors), axis=0)))


def linformer_rank(n: int, epsilon: float) -> float:
    """Rank of Linformer's theorem 1 (arXiv 2006.04768) for n tokens, natural log."""
    return 5 * float(np.log(n)) / (epsilon**2 - epsilon**3)
