# SPDX-License-Identifier: Apache-2.0
"""A classifier as one file that JAX alone runs, without this package.

The file is StableHLO with the parameters in it, written by `jax.export` for CPU, NVIDIA
GPUs and TPUs; see docs/serving.md.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as exports

from vpt_jax import train
from vpt_jax.files import durable, workdirs
from vpt_jax.serve.classifier import Classifier

PLATFORMS = ("cpu", "cuda", "tpu")


def export(
    classifier: Classifier,
    path: str | os.PathLike,
    *,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Writes a classifier as a program: uint8 squares in, probabilities out.

    Beside it `PATH.json` has the names of the classes, and the side and rule of the
    squares.

    Args:
      classifier: Of `load_classifier`.
      path: The file.
      platforms: For which it is lowered.

    Raises:
      ValueError: If `flatbuffers` is not installed.

    Example:
      >>> export(load_classifier("mine.safetensors"), "mine.stablehlo")
      >>> data = Path("mine.stablehlo").read_bytes()
      >>> program = jax.export.deserialize(bytearray(data))
      >>> program.call(jnp.zeros((5, 32, 32, 3), jnp.uint8)).shape  # any batch
      (5, 10)
    """
    side, answer = classifier.model.image_size, jax.jit(function_of(classifier))
    shape = (*exports.symbolic_shape("b"), side, side, 3)
    images = jax.ShapeDtypeStruct(shape, jnp.uint8)
    program = exports.export(answer, platforms=tuple(platforms))(images)
    try:
        data = program.serialize()
    except ImportError as error:
        raise ValueError(
            f"cannot write {path} ({error}); expected flatbuffers, in which jax.export"
            " writes: pip install flatbuffers. Who reads the file needs it too."
        ) from error
    with durable.atomic_path(path) as temporary:
        temporary.write_bytes(data)
    about = {
        "class_names": list(classifier.class_names),
        "image_size": side,
        "resize": classifier.resize,
    }
    workdirs.write_json(f"{Path(path)}.json", about)


def function_of(classifier: Classifier) -> Callable[[jax.Array], jax.Array]:
    """A classifier as a function: of uint8 squares `[b, s, s, 3]` to their `[b, k]`.

    Its parameters are constants of whatever is made of it, by `jax.export` or another
    compiler.
    """
    model, recipe = classifier.model, classifier.recipe
    # On the host, whichever device they came from.
    trainable, backbone = jax.tree.map(np.asarray, classifier.parameters)

    def answer(images: jax.Array) -> jax.Array:
        tuned, frozen = jax.tree.map(jnp.asarray, (trainable, backbone))
        logits = train.predict(tuned, frozen, images, model=model, recipe=recipe)
        return jax.nn.softmax(logits)

    return answer
