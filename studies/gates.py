# SPDX-License-Identifier: Apache-2.0
r"""What gates on a prompt's keys tell of the prompt, with labels and without.

One forward pass with gates of 1, one backward pass per question. With `p` the
prediction, `f` the features that the head reads, `H` entropy and `L` cross entropy,
`D` an example's derivative, and removal the step from 1 to 0, its value is

    loss             -D L(p, label), the only one that reads labels
    entropy          -D H(p)
    pseudo_label     -D L(p, argmax p)
    distill          1/2 (D log p(y))^2, with y drawn from p
    feature_change   (D <r, f>)^2, with r drawn from N(0, I)
    attention        how much attention the prompt receives; no derivative

The divergence KL(p with the prompt || p without it) and its first derivative are 0 at
the gate's 1; the mean of `distill` is what is left, half the Fisher information of the
gate (the Gauss-Newton of the divergence). The mean of `feature_change` is the squared
length of `D f`, as `E[r r^T] = I`.

Every value but attention comes in the two forms that the library's scores of the loss
have (`condense.example_values`): `key_gate`, the derivative of one gate per prompt; and
`removal`, by head and query over one minus the prompt's attention, which is exact in
the softmax.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vpt_jax
from studies.removal import batches
from vpt_jax.models.attention import wide
from vpt_jax.models.scores import example_values

FORMS = ("removal", "key_gate")


def values(
    function: Callable[..., dict[str, jax.Array]],
    model: Any,
    backbone: Any,
    trainable: dict[str, Any],
    data: tuple[jax.Array, jax.Array],
    batch_size: int,
) -> dict[str, np.ndarray]:
    """Every example's values of every prompt, by name, each `[examples, prompts]`.

    Args:
      function: `derivatives` or `divergence`.
      model: The model.
      backbone: Its parameters.
      trainable: `{'prompts', 'head'}`.
      data: Normalised pictures `[n, s, s, 3]` and labels `[n]`.
      batch_size: Examples at a time.
    """
    parts = []
    for i, batch in enumerate(batches(data, batch_size)):
        key = jax.random.fold_in(jax.random.key(0), i * batch_size)
        found = function(backbone, trainable, batch, key, model=model)
        parts.append({name: np.asarray(x, np.float64) for name, x in found.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@functools.partial(jax.jit, static_argnames="model")
def derivatives(
    backbone: Any,
    trainable: dict[str, Any],
    batch: dict[str, jax.Array],
    key: jax.Array,
    *,
    model: Any,
) -> dict[str, jax.Array]:
    """One batch of the values above, `[b, prompts]`, named `"entropy, removal"` etc.

    Args:
      backbone: The model's parameters.
      trainable: `{'prompts', 'head'}`, deep prompts.
      batch: `image` `[b, s, s, 3]` and `label` `[b]`.
      key: Of the labels and directions that are drawn.
      model: Static.
    """
    prompts, b = trainable["prompts"], len(batch["label"])

    def forward(gates: Any) -> tuple[tuple[jax.Array, jax.Array], Any]:
        inputs = {"params": backbone}
        features, out = model.apply(
            inputs, batch["image"], prompts=prompts, prompt_gate=gates
        )
        return (features, vpt_jax.apply_head(trainable["head"], features)), out

    blocks = jax.eval_shape(lambda: forward(None)[1]["blocks"])
    # By head and query; one for all where prompts are more than keys (see `removal`).
    shapes = [
        (b, len(p)) if "prompts" in block else block["prompt_attention"].shape
        for p, block in zip(prompts, blocks, strict=True)
    ]
    gates = tuple(
        jnp.ones(s, wide(p.dtype)) for s, p in zip(shapes, prompts, strict=True)
    )
    (features, logits), pull, out = jax.vjp(forward, gates, has_aux=True)
    left = [
        jnp.ones(())
        if g.ndim == 2
        else jnp.maximum(1 - block["prompt_attention"], 1e-6)
        for g, block in zip(gates, out["blocks"], strict=True)
    ]

    def both(of_features: jax.Array, of_logits: jax.Array) -> dict[str, jax.Array]:
        """The forms of `-D` of what has these derivatives."""
        grads = pull((of_features, of_logits))[0]
        removal = [g / m for g, m in zip(grads, left, strict=True)]

        def joined(grads: Any) -> jax.Array:
            each = [g.reshape(b, -1, g.shape[-1]).sum(axis=1) for g in grads]
            return -jnp.concatenate(each, axis=1)

        return {"key_gate": joined(grads), "removal": joined(removal)}

    def of(function: Callable[[jax.Array], jax.Array]) -> dict[str, jax.Array]:
        slope = jax.grad(lambda x: function(x).sum())(logits)
        return both(jnp.zeros_like(features), slope)

    def loss(labels: jax.Array) -> dict[str, jax.Array]:
        return of(lambda x: vpt_jax.cross_entropy(x, {"label": labels}))

    label_key, direction_key = jax.random.split(key)
    drawn = loss(jax.random.categorical(label_key, logits))
    direction = jax.random.normal(direction_key, features.shape, features.dtype)
    moved = both(direction, jnp.zeros_like(logits))
    found = {
        "loss": loss(batch["label"]),
        "entropy": of(entropy),
        "pseudo_label": loss(logits.argmax(axis=1)),
        "distill": {form: 0.5 * x * x for form, x in drawn.items()},
        "feature_change": {form: x * x for form, x in moved.items()},
    }
    received = example_values("attention", lambda _: (logits, out), prompts)
    named = {f"{name}, {form}": x for name, y in found.items() for form, x in y.items()}
    return {**named, "attention": jnp.concatenate(received, axis=1)}


def entropy(logits: jax.Array) -> jax.Array:
    """Entropy `[b]` of the predictions of `logits [b, k]`, in nats."""
    return -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(axis=1)


@functools.partial(jax.jit, static_argnames="model")
def divergence(
    backbone: Any,
    trainable: dict[str, Any],
    batch: dict[str, jax.Array],
    key: jax.Array,
    *,
    model: Any,
) -> dict[str, jax.Array]:
    """The exact `divergence`, `[b, prompts]`: a forward pass without every prompt.

    It is KL(p with the prompt || p without it), what `distill` estimates. Nothing is
    drawn from `key`.
    """
    prompts = trainable["prompts"]

    def log_p(prompts: Any, **kwargs: Any) -> jax.Array:
        inputs = {"params": backbone}
        features, _ = model.apply(inputs, batch["image"], prompts=prompts, **kwargs)
        return jax.nn.log_softmax(vpt_jax.apply_head(trainable["head"], features))

    p = jnp.exp(log_p(prompts))

    def losses(prompts: Any, **kwargs: Any) -> tuple[jax.Array, dict[str, Any]]:
        # Cross entropy with the whole model; its change on removal is the divergence.
        return -(p * log_p(prompts, **kwargs)).sum(axis=1), {}

    change = example_values("leave_one_out", losses, prompts)
    return {"divergence": jnp.concatenate(change, axis=1)}
