# SPDX-License-Identifier: Apache-2.0
"""What callers give by mistake: a sentence where Python and JAX would speak of others.

Types, shapes and dtypes are known under jit too; values are looked at outside only.
"""

import operator
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

TRAINABLE = {"prompts": "one [n_i, d] array per layer", "head": "kernel and bias"}
BATCH = {"image": "[b, s, s, 3], normalised", "label": "integers [b]"}
HEAD = {"kernel": "[d, k]", "bias": "[k]"}


def said(value: Any) -> str:
    """An argument in a few words, on one line."""
    if is_array(value):
        return f"an array {value.dtype} [{', '.join(map(str, value.shape))}]"
    if value is None or isinstance(value, bool | int | float | str | np.generic):
        text = ascii(value)
        return text if len(text) <= 80 else f"{text[:80]}..."
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return f"a {kind} of {', '.join(map(ascii, list(value)[:8])) or 'nothing'}"
    return f"a {kind}"


def is_array(value: Any) -> bool:
    """Of JAX or NumPy, or what stands for one in `jax.eval_shape`."""
    return isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def expect(right: Any, name: str, value: Any, expected: str) -> None:
    """Raises ValueError with what was got and what was expected, unless it is right."""
    if not right:
        raise ValueError(f"{name} is {said(value)}; expected {expected}.")


def check_integer(name: str, value: Any, least: int) -> int:
    """The integer, of Python or NumPy; raises ValueError if it is none or too small."""
    try:
        number = operator.index(value)
    except TypeError:  # that of a traced one too
        number = least - 1
    if isinstance(value, bool):
        number = least - 1
    expect(number >= least, name, value, f"an integer >= {least}")
    return number


def check_path(name: str, value: Any) -> None:
    """Raises ValueError unless it is a text or a path."""
    expect(isinstance(value, str | os.PathLike), name, value, "a text or a path")


def check_model(model: Any, *attributes: str) -> None:
    """Raises ValueError unless `model` has these attributes."""
    right = not isinstance(model, type) and all(hasattr(model, a) for a in attributes)
    one = f"one with {', '.join(attributes)}, as load_backbone returns it before the"
    expect(right, "model", model, f"{one} parameters")


def check_key(key: Any) -> None:
    """Raises ValueError unless `key` can be a JAX random key, of the old kind too."""
    wanted = "a JAX random key, such as jax.random.key(0)"
    expect(is_array(key), "key", key, wanted)


def check_backbone(backbone: Any) -> None:
    """Raises ValueError if parameters are still in a collection's dict."""
    wrapped = isinstance(backbone, Mapping) and list(backbone) == ["params"]
    wanted = "the parameters themselves, as load_backbone returns them"
    expect(not wrapped, "backbone", backbone, f"{wanted}: of {{'params': x}} pass x")


def check_keys(name: str, given: Any, expected: Mapping[str, str]) -> None:
    """Raises ValueError unless `given` is a dict that has the expected keys."""
    right = isinstance(given, Mapping) and expected.keys() <= given.keys()
    keys = ", ".join(f"{key!r} ({what})" for key, what in expected.items())
    expect(right, name, given, f"a dict with {keys}")


def check_layers(name: str, given: Any, *ranks: int, shape: str) -> None:
    """Raises ValueError unless `given` holds one array per layer, of one of the ranks.

    A list is as good as a tuple; a named tuple (one `KeyValue`, a `PromptFile`) is not.
    """
    wrong = [given]
    if isinstance(given, tuple | list) and not hasattr(given, "_fields"):
        wrong = [x for x in given if not is_array(x) or x.ndim not in ranks]
        name = f"a layer of {name}"
    if wrong:
        expect(False, name, wrong[0], f"a tuple with one array {shape} per layer")


def check_shallow(num: tuple[int, ...]) -> None:
    """Raises ValueError if counts are not those of shallow prompts."""
    if any(num[1:]):
        raise ValueError(
            f"prompts have counts {num} with deep=False; shallow prompts belong to the"
            " first layer only, later counts must be 0."
        )


def check_head(head: Any) -> None:
    """Raises ValueError unless `head` is `{'kernel': [d, k], 'bias': [k]}`."""
    check_keys("head", head, HEAD)
    kernel, bias = head["kernel"], head["bias"]
    fits = is_array(kernel) and is_array(bias) and kernel.ndim == 2
    if not fits or bias.shape != kernel.shape[1:]:
        raise ValueError(
            f"head has kernel {said(kernel)} and bias {said(bias)}; expected [d, k] and"
            " [k], as init_head makes."
        )


def check_labels(labels: Any, num_classes: int, size: Any, mask: Any = None) -> None:
    """Raises ValueError unless `labels` are `[size]` integers in `[0, num_classes)`.

    Their values are looked at where they are known, and where `mask` is not False.
    """
    integers = is_array(labels) and jnp.issubdtype(labels.dtype, jnp.integer)
    if not integers or labels.shape != (size,):
        raise ValueError(
            f"labels are {said(labels)}; expected an array of integers [{size}], one"
            " class per picture. Of one-hot labels pass argmax(-1)."
        )
    known, counted = values(labels), None if mask is None else values(mask)
    if known is None or (mask is not None and counted is None):
        return
    if counted is not None:
        known = known[counted != 0]
    wrong = known[(known < 0) | (known >= num_classes)]
    if len(wrong):
        raise ValueError(
            f"labels hold {wrong[0]}, but there are {num_classes} classes; expected 0"
            f" ... {num_classes - 1}. Examples that do not count have a mask of False."
        )


def check_mask(mask: Any, num: tuple[int, ...]) -> None:
    """Raises ValueError unless `mask` has one boolean for each of `num` prompts."""
    check_layers("mask", mask, 1, shape="[n_i]")
    got = tuple(m.shape for m in mask)
    if got != tuple((n,) for n in num):
        raise ValueError(
            f"mask has shapes {got} but the prompts have counts {num}; pass one boolean"
            " per prompt, layer by layer."
        )
    if any(m.dtype != bool for m in mask):
        raise ValueError("mask must be boolean (True = keep); see keep_mask.")


def check_batch(batch: Any, num_classes: int | None) -> None:
    """Raises ValueError unless a batch is a dict of pictures and, if asked, labels."""
    with_labels = num_classes is not None
    check_keys("a batch", batch, BATCH if with_labels else {"image": BATCH["image"]})
    image, mask = batch["image"], batch.get("mask")
    b = len(image) if is_array(image) and image.ndim else 0
    expect(b, "image", image, BATCH["image"])
    right = is_array(mask) and mask.shape == (b,) and mask.dtype == bool
    counted = f"booleans [{b}], False for examples that do not count"
    expect(mask is None or right, "mask", mask, counted)
    if with_labels:
        check_labels(batch["label"], num_classes, b, mask)


def values(array: Any) -> np.ndarray | None:
    """An array's numbers; None where they are traced, or lie on others' devices."""
    if isinstance(array, Tracer | jax.ShapeDtypeStruct):
        return None
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        return None
    return np.asarray(array)
