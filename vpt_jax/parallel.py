# SPDX-License-Identifier: Apache-2.0
"""One program on many devices: a mesh, what is split over it, and what is whole.

Pictures are split over the mesh's `batch` axis, parameters and results are whole on
every device, and the compiler adds the sums between them. `everywhere` makes the mesh
ambient; inside, `spread` and `whole` say which is which. Without one, or with explicit
axes, of which arrays carry their shardings, `spread` changes nothing.
"""

import contextlib
import contextvars
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

BATCH = "batch"
MODEL = "model"

# Which axis of a backbone's parameter is split over `model`: by its module's name, for
# kernel and bias. Attention splits by heads, the MLP by its hidden units, so that a
# block needs two sums over devices. What is not named here is small and whole.
_SPLIT = {
    "query": {"kernel": 1, "bias": 0},
    "key": {"kernel": 1, "bias": 0},
    "value": {"kernel": 1, "bias": 0},
    "out": {"kernel": 0},
    "Dense_0": {"kernel": 1, "bias": 0},
    "Dense_1": {"kernel": 0},
}


_SHARE = contextvars.ContextVar("share", default=1)


def share(model: int) -> Mesh | None:
    """Makes `all_devices(model)` the mesh of what runs from here on; returns it."""
    mesh = all_devices(model)
    _SHARE.set(model)
    return mesh


def all_devices(model: int = 0) -> Mesh | None:
    """The mesh of all devices of all processes, axes `batch` and, if asked, `model`.

    Args:
      model: Devices that share one copy of the backbone, see `backbone_shardings`; 0 is
        what `share` said last, else 1.

    Returns:
      None where there is one device: nothing is to be split.

    Raises:
      ValueError: If the number of devices is not a multiple of `model`.
    """
    return _mesh(model or _SHARE.get())


@functools.cache
def _mesh(model: int) -> Mesh | None:
    num = jax.device_count()
    if num % model:
        raise ValueError(
            f"backbone.share is {model}; expected a divisor of the {num} devices here."
        )
    if num == 1:
        return None
    axes = {BATCH: num // model} | ({MODEL: model} if model > 1 else {})
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


@contextlib.contextmanager
def everywhere(make_mesh: Callable[[], Mesh | None] = all_devices) -> Iterator[None]:
    """Makes a mesh ambient: what is computed inside runs on all of its devices.

    Also a decorator, `@everywhere()`. Only for what computes on batches: small steps
    outside of jit would be compiled for all devices.
    """
    mesh = make_mesh()
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield


def parts() -> int:
    """Of a batch: the size of the ambient mesh's `batch` axis, if that is automatic."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh.shape[BATCH] if kinds.get(BATCH) == AxisType.Auto else 1


def round_up(size: int) -> int:
    """The next multiple of the number of parts that a batch is split into."""
    return -(-size // parts()) * parts()


def spread(tree: Any) -> Any:
    """Splits axis 0 of every array over the devices; for use under jit."""
    if parts() == 1:
        return tree
    return jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(x, P(BATCH)) if x.size else x, tree
    )


def whole(tree: Any) -> Any:
    """Every array complete on every device; for use under jit."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return tree
    if AxisType.Explicit in mesh.axis_types:
        return jax.tree.map(lambda x: reshard(x, P()), tree)
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P()), tree)


def feed(batch: Any) -> Any:
    """A batch of NumPy arrays on the devices, a part on each; others as they are.

    Axis 0 is a multiple of the number of parts (`round_up`). A process reads its own
    parts alone.
    """
    if parts() == 1 or not isinstance(batch, np.ndarray):
        return batch
    return _put(batch, NamedSharding(jax.sharding.get_mesh(), P(BATCH)))


def held(tree: Any) -> Any:
    """Arrays complete on every device of the ambient mesh, as `whole` leaves them.

    What a step takes as it was returned by the step before compiles once.
    """
    return put_whole(tree, None if parts() == 1 else jax.sharding.get_mesh())


def put_whole(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays complete on every device of a mesh; None is the default device."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, P())), tree)


def _put(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process holds alike.

    Unlike `jax.device_put` it does not compare the processes' arrays, nor reads parts
    that belong to others.
    """
    x = np.asarray(array)
    return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])


def put_rows(array: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """An array split along axis 0 over `batch`, padded there with zeros to fit."""
    if mesh is None:
        return jnp.asarray(array)
    num = mesh.shape[BATCH]
    shape = (-(-len(array) // num) * num, *array.shape[1:])

    def part(at: Any) -> np.ndarray:
        rows = array[at]  # a slice ends where the array does
        missing = len(range(*at[0].indices(shape[0]))) - len(rows)
        return np.pad(rows, [(0, missing)] + [(0, 0)] * (array.ndim - 1))

    return jax.make_array_from_callback(shape, NamedSharding(mesh, P(BATCH)), part)


def agreed(value: int) -> int:
    """Process 0's answer, in all processes: when each looks at a file must not matter.

    A process that trains waits for ever for one that does not.
    """
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def backbone_shardings(mesh: Mesh, backbone: Any) -> Any:
    """How a backbone that is too large for one device lies on the `model` axis.

    Args:
      mesh: With an axis `model`, as `all_devices(model)` makes.
      backbone: Parameters of a model of this package, or their `jax.eval_shape`.

    Returns:
      A `NamedSharding` per parameter, for `jax.device_put` or `jit`.

    Raises:
      ValueError: If heads or MLP width are not multiples of the axis.
    """

    def one(path: Any, x: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return _sharding(mesh, name, x.shape)

    return jax.tree_util.tree_map_with_path(one, backbone)


def _sharding(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    num = mesh.shape[MODEL]
    *_, module, last = ("", *name.split("/"))
    axis = _SPLIT.get(module, {}).get(last)
    if axis is None:
        return NamedSharding(mesh, P())
    if shape[axis] % num:
        raise ValueError(
            f"{name} has shape {tuple(shape)}; its axis {axis} cannot be split over"
            f" {num} devices. Make the mesh's {MODEL!r} axis (config.backbone.share) a"
            f" divisor of {shape[axis]}."
        )
    return NamedSharding(mesh, P(*[None] * axis, MODEL))


def put_part(array: Any, name: str, mesh: Mesh | None) -> jax.Array:
    """A backbone's parameter as `backbone_shardings` has it; None: default device."""
    if mesh is None:
        return jnp.asarray(array)
    return _put(array, _sharding(mesh, name, array.shape))


def pad_batch(batch: dict[str, Any], size: int) -> dict[str, Any]:
    """Repeats the first example up to `size`; `mask` is False for those.

    On many devices, up to a size that can be split over them.
    """
    n = len(batch["image"])
    if n > size:
        raise ValueError(
            f"a batch has {n} examples after one of {size}; sizes must not grow."
        )
    size = round_up(size)
    batch = {"mask": jnp.ones(n, bool), **batch}
    if n == size:
        return batch
    index = np.pad(np.arange(n), (0, size - n))
    padded = jax.tree.map(lambda x: x[index], batch)
    padded["mask"] = padded["mask"] & (jnp.arange(size) < n)
    return padded


def one_late(results: Iterator[jax.Array]) -> Iterator[np.ndarray]:
    """Results on the host, each when the next has been started.

    The host prepares one batch while the device computes another; two are in memory.
    """
    before = None
    for result in itertools.chain(results, [None]):
        if before is not None:
            yield np.asarray(before)
        before = result
