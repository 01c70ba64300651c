# SPDX-License-Identifier: Apache-2.0
"""Prompts of which it is known what a right score must say of them.

Each takes the place of a layer's least important prompts, so counts stay as they are:

- `twins`: the layer's most important prompt and exact copies of it. Equal by symmetry,
  and each less important than alone, as the others stand in for it.
- `flat`: a constant vector. LayerNorm makes its bias of it whatever the constant, an
  ordinary key and value: the exact change says how important; but the gradient along
  the prompt is 0, and its length in all other directions is LayerNorm's 1 / sqrt(eps).
- `unattended`: a prompt turned away from the queries until next to no attention is
  left. Removing it changes nothing: a right score ranks it last.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax.prompts import counts

CASES = ("twins", "flat", "unattended")


class Planted(NamedTuple):
    """Prompts with the cases in them, and where: indices into all prompts."""

    trainable: dict[str, Any]
    places: dict[str, list[int]]


def plant(
    model: Any,
    backbone: Any,
    trainable: dict[str, Any],
    pictures: jax.Array,
    oracle: np.ndarray,
    *,
    steps: int = 20,
) -> Planted:
    """Plants all cases, in the middle, first and last of the layers with two prompts.

    Args:
      model: The model.
      backbone: Its parameters.
      trainable: `{'prompts', 'head'}`.
      pictures: Normalised pictures, from which the unattended prompt learns.
      oracle: How important every prompt is, `[prompts]`.
      steps: Of descent for the unattended prompt.
    """
    prompts = list(trainable["prompts"])
    num = counts(prompts)
    starts = np.cumsum((0, *num))
    layers = [i for i, n in enumerate(num) if n > 1]
    if len(layers) < len(CASES):
        raise ValueError(
            f"prompts have counts {num}; planting needs three layers with two prompts."
        )
    homes = (layers[len(layers) // 2], layers[0], layers[-1])
    where = dict(zip(CASES, homes, strict=True))
    order = {
        i: np.argsort(oracle[starts[i] : starts[i + 1]], kind="stable") for i in layers
    }
    i = where["twins"]
    best, worst = int(order[i][-1]), int(order[i][0])
    prompts[i] = prompts[i].at[worst].set(prompts[i][best])
    places = {"twins": [int(starts[i]) + best, int(starts[i]) + worst]}
    for case in ("flat", "unattended"):
        places[case] = [int(starts[where[case]] + order[where[case]][0])]
    i = where["flat"]
    prompts[i] = prompts[i].at[int(order[i][0])].set(1.0)
    i = where["unattended"]
    j = int(order[i][0])
    turned = turn_away(model, backbone, tuple(prompts), pictures, i, j, steps)
    prompts[i] = prompts[i].at[j].set(turned)
    return Planted({**trainable, "prompts": tuple(prompts)}, places)


def attention_mass(
    model: Any, backbone: Any, prompts: Any, pictures: jax.Array, i: int, j: int
) -> jax.Array:
    """The share of attention that prompt `j` of layer `i` has, `[b, h, q]`."""
    inputs = {"params": backbone}
    _, out = model.apply(inputs, pictures, prompts=prompts)
    return out["blocks"][i]["prompt_attention"][..., j]


def turn_away(
    model: Any,
    backbone: Any,
    prompts: Any,
    pictures: jax.Array,
    i: int,
    j: int,
    steps: int,
) -> jax.Array:
    """Prompt `j` of layer `i` after descent on the logarithm of its attention."""

    # Arguments, not constants of the function: XLA would compute with those for long.
    @jax.jit
    def slope(p: jax.Array, backbone: Any, pictures: jax.Array) -> jax.Array:
        def size(p: jax.Array) -> jax.Array:
            changed = list(prompts)
            changed[i] = changed[i].at[j].set(p)
            mass = attention_mass(model, backbone, tuple(changed), pictures, i, j)
            return jnp.log(mass.mean() + 1e-30)

        return jax.grad(size)(p)

    p = prompts[i][j]
    p = p / jnp.linalg.norm(p)
    for step in range(steps):
        g = slope(p, backbone, pictures)
        # Only the direction counts behind LayerNorm: steps on the sphere.
        g = g / jnp.maximum(jnp.linalg.norm(g), 1e-30)
        p = p - 0.3 * (1 - step / steps) * g
        p = p / jnp.linalg.norm(p)
    return p * jnp.linalg.norm(prompts[i][j])
