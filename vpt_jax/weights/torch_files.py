# SPDX-License-Identifier: Apache-2.0
"""PyTorch's files as descriptions of tensors, without PyTorch and without pickle.

Loading a pickle runs whatever it says. `unpickle` decodes the opcodes instead, obeys
the few that state dicts need, and refuses all else by name. Every opcode costs at most
what it adds, and nothing walks a structure to its leaves, so shared or endless
structures do no harm.
"""

import io
import math
import pickletools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from vpt_jax.files.messages import printable, shown
from vpt_jax.weights.zips import MAX_HEADER, Refused

LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
MAX_PICKLE = MAX_HEADER  # of a ViT-L with its optimiser: 0.3 MB
MAX_OPCODES = 1_000_000
MAX_DIMS = 32
# Where training scripts put the state dict; the first that holds tensors counts.
_TOP = ""
WRAPPERS = ("model", "state_dict", "model_state", "teacher", "module", "net")

_DTYPES = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(jnp.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
# NumPy scalars, such as a best accuracy: recognised, never built.
_INERT = frozenset({
    "_codecs.encode",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
})  # fmt: skip
_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING"
    " SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES"
    " SHORT_BINBYTES BINBYTES8".split()
)
_IDLE = frozenset({"PROTO", "FRAME", "STOP"})
_STATE_DICT = "re-save it with torch.save(model.state_dict(), path)"
LITTLE = "it was not saved on a little-endian machine; re-save it"
_RESAVE = (
    "Only tensors are read, and nothing in the file is executed. If you trust it,"
    f" {_STATE_DICT}, or what torch.load(path, weights_only=False) gives."
)


class Storage(NamedTuple):
    """A run of numbers in the file, known by its key."""

    key: str
    dtype: np.dtype
    size: int

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class Tensor(NamedTuple):
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """How many elements lie between its first and its last, both included."""
        if 0 in self.shape:
            return 0
        pairs = zip(self.shape, self.strides, strict=True)
        return 1 + sum((n - 1) * stride for n, stride in pairs)


class Pickled(NamedTuple):
    """What a pickle describes, and every storage that it mentions."""

    value: Any
    storages: dict[str, Storage]


class _Global(NamedTuple):
    name: str


class _Inert:
    """Stands for a value that is not rebuilt."""


def unpickle(stream: io.BytesIO) -> Pickled:
    """Follows one pickle of at most `MAX_PICKLE` bytes up to its end.

    Raises Refused for anything but tensors and plain values, and exceptions of many
    kinds if it is no well-formed pickle.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    storages: dict[str, Storage] = {}

    def taken(count: int | None) -> list[Any]:
        """The last `count` values, or those since the mark."""
        start = marks.pop() if count is None else len(stack) - count
        items = stack[start:]
        if count is not None and start < 0:
            raise ValueError("its pickle takes more values than it has")
        del stack[start:]
        return items

    for number, (opcode, arg, _) in enumerate(_opcodes(stream)):
        if number >= MAX_OPCODES:
            raise Refused(
                f"its pickle has more than {MAX_OPCODES} opcodes; a state dict needs"
                f" far fewer. {_RESAVE}"
            )
        name = opcode.name
        if name in _LITERALS:
            stack.append(arg)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            if not 0 <= arg < 2**32:  # other numbers could be made to collide
                raise ValueError("its pickle has a memo index beyond 32 bits")
            memo[arg] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[arg])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in _MADE:
            count, make = _MADE[name]
            stack.append(make(taken(count)))
        elif name in _ADDED:
            count, add = _ADDED[name]
            items = taken(count)
            add(stack[-1], items)
        elif name in ("GLOBAL", "INST"):
            stack.append(_known(arg.replace(" ", ".", 1)))
            if name == "INST":
                raise Refused(f"its pickle makes objects (INST). {_RESAVE}")
        elif name not in _IDLE:
            raise Refused(f"its pickle uses the opcode {name}, unknown here. {_RESAVE}")
        if name == "BINPERSID":
            storage = stack[-1]
            if storages.setdefault(storage.key, storage) != storage:
                raise ValueError("two types or sizes are given for the same storage")
    return Pickled(stack.pop(), storages)


def state_dict(value: Any) -> tuple[dict[str, Tensor], str]:
    """The tensors of a state dict, or of a checkpoint that holds one; else Refused.

    And of several networks (some are averages), which it takes. What is no tensor, such
    as epochs and the optimiser's state, is left out.
    """
    if not isinstance(value, dict):
        raise Refused(f"it holds {_kind(value)}; expected a state dict; {_STATE_DICT}")
    held = {
        key: {name: leaf for name, leaf in tree.items() if isinstance(leaf, Tensor)}
        for key, tree in {**value, _TOP: value}.items()
        if isinstance(tree, dict)
    }
    taken = next((key for key in (*WRAPPERS, _TOP) if held.get(key)), None)
    if taken is None:
        keys = [key[:40] for key in list(value)[:12]]
        raise Refused(
            f"it holds no state dict: its top-level keys are {keys}, expected tensors"
            f" there or under one of {list(WRAPPERS)}; {_STATE_DICT}"
        )
    tensors = held.pop(taken)
    held.pop(_TOP, None)
    others = sorted(ascii(k) for k, tree in held.items() if tree.keys() & tensors)
    if taken == _TOP or not others:
        return tensors, ""
    return tensors, f"{taken!a}, not {', '.join(others)}"


def as_array(tensor: Tensor, values: np.ndarray) -> np.ndarray:
    """The tensor as a contiguous array; `values` are the `span` elements it covers."""
    strides = [stride * values.itemsize for stride in tensor.strides]
    raw = values.view(np.uint8)  # this way NumPy checks the strides
    array = np.ndarray(tensor.shape, values.dtype, raw, 0, strides)
    return array if array.flags.c_contiguous else array.copy()


def legacy_storages(stream: io.BytesIO) -> tuple[Pickled, list[Storage]]:
    """What a file of PyTorch before 1.6 describes, and its storages in their order."""
    for expected in ("magic number", "protocol"):
        if type(unpickle(stream).value) is not int:
            raise ValueError(f"its {expected} is not a number")
    system = unpickle(stream).value
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused(LITTLE)
    pickled = unpickle(stream)
    keys = _expect(unpickle(stream).value, list)
    if not all(isinstance(key, str) for key in keys):
        raise ValueError("its list of storages holds other things than names")
    if sorted(keys) != sorted(pickled.storages):
        raise ValueError("its list of storages is not that of its tensors")
    return pickled, [pickled.storages[key] for key in keys]


def _opcodes(stream: io.BytesIO) -> Any:
    with warnings.catch_warnings(action="ignore"):  # of odd escapes in strings
        yield from pickletools.genops(stream)


def _known(name: str) -> _Global:
    if name in _DTYPES or name in _INERT or name in _BUILDERS:
        return _Global(name)
    raise Refused(
        f"it holds {printable(name[:100])}, which this reader does not build. {_RESAVE}"
    )


def _build(called: list[Any]) -> Any:
    function, args = called
    name, args = _expect(function, _Global).name, _expect(args, tuple)
    if name in _INERT:
        return _Inert()
    if name not in _BUILDERS:
        raise Refused(f"its pickle calls {name}. {_RESAVE}")
    return _BUILDERS[name](*args)


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(
            f"its pickle has {_kind(value)} where {kind.__name__} is needed"
        )
    return value


def _kind(value: Any) -> str:
    return f"a value of type {type(value).__name__.strip('_')}"


def _set_items(target: Any, items: list[Any]) -> dict[str, Any]:
    """Keys that are no strings are left out: hashing them could be made slow."""
    _expect(target, dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, str):
            target[key] = value
    return target


def _set_state(target: Any, _: list[Any]) -> None:
    """Attributes of an OrderedDict (`_metadata`), or of what is not rebuilt: left."""
    if not isinstance(target, dict | _Inert):
        raise Refused(f"its pickle sets attributes of {_kind(target)}. {_RESAVE}")


def _counts(values: Any, what: str) -> tuple[int, ...]:
    values = tuple(values) if isinstance(values, tuple | list) else (values,)
    if len(values) > MAX_DIMS:
        raise ValueError(f"a tensor's {what} has {len(values)} entries")
    if not all(type(v) is int and 0 <= v < 2**48 for v in values):
        raise ValueError(f"a tensor's {what} is not made of counts")
    return values


def _storage(taken: list[Any]) -> Storage:
    (pid,) = taken
    if not isinstance(pid, tuple) or not pid or pid[0] != "storage":
        said = pid[0] if isinstance(pid, tuple) and pid else pid
        what = shown(said, 40) if isinstance(said, str) else _kind(said)
        raise Refused(
            f"its pickle refers to {what} outside of it; expected 'storage'. {_RESAVE}"
        )
    _, kind, key, _, size, *view = pid
    if view and view != [None]:
        raise Refused("it has views of storages; re-save it with a later PyTorch")
    kind, key = _expect(kind, _Global).name, _expect(key, str)
    if kind not in _DTYPES:
        raise Refused(f"it stores values as {kind}; expected {sorted(_DTYPES)}")
    (size,) = _counts((size,), "storage size")
    return Storage(key, _DTYPES[kind], size)


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *_: Any
) -> Tensor:
    """What follows the strides (requires_grad, hooks, metadata) does not matter."""
    (offset,) = _counts((offset,), "offset")
    shape, strides = _counts(shape, "shape"), _counts(strides, "strides")
    if len(shape) != len(strides):
        raise ValueError(f"a tensor has {len(shape)} sizes but {len(strides)} strides")
    tensor = Tensor(_expect(storage, Storage), offset, shape, strides)
    if tensor.span and offset + tensor.span > storage.size:
        raise ValueError(
            f"a tensor of shape {shape} with strides {strides} at {offset} exceeds its"
            f" storage of {storage.size} values"
        )
    if math.prod(shape) > storage.size:
        raise Refused(
            f"a tensor of shape {shape} repeats the {storage.size} values of its"
            " storage; re-save it after .contiguous()"
        )
    return tensor


_BUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda: {},
    "torch.Size": lambda sizes: _expect(sizes, tuple),
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: _expect(data, Tensor),
}
# Opcodes that put a value in the place of as many others, or (None) of those since the
# mark; and opcodes that add such values to the one below them.
_MADE: dict[str, tuple[int | None, Callable[[list[Any]], Any]]] = {
    "NONE": (0, lambda _: None),
    "NEWTRUE": (0, lambda _: True),
    "NEWFALSE": (0, lambda _: False),
    "EMPTY_TUPLE": (0, tuple),
    "EMPTY_LIST": (0, list),
    "EMPTY_DICT": (0, lambda _: {}),
    "TUPLE": (None, tuple),
    "TUPLE1": (1, tuple),
    "TUPLE2": (2, tuple),
    "TUPLE3": (3, tuple),
    "LIST": (None, list),
    "DICT": (None, lambda items: _set_items({}, items)),
    "STACK_GLOBAL": (2, lambda names: _known(".".join(names))),
    "BINPERSID": (1, _storage),
    "REDUCE": (2, _build),
}
_ADDED: dict[str, tuple[int | None, Callable[[Any, list[Any]], Any]]] = {
    "SETITEM": (2, _set_items),
    "SETITEMS": (None, _set_items),
    "APPEND": (1, lambda target, items: _expect(target, list).extend(items)),
    "APPENDS": (None, lambda target, items: _expect(target, list).extend(items)),
    "BUILD": (1, _set_state),
}
