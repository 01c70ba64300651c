# SPDX-License-Identifier: Apache-2.0
"""The door between `ml_collections` and typed values: everything checked, once.

A config is a `ConfigDict` with two flat levels. Its keys and their defaults stand in
the frozen dataclasses of `config.py` and nowhere else: `defaults` makes a `ConfigDict`
of them. `parse` turns it into the dataclasses and raises one clear error for anything
that cannot work, before any file is written. Past this door nothing sees a
`ConfigDict`.
"""

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from vpt_jax.files.messages import expect, shown, unknown_key
from vpt_jax.run.config import Config

GROUPS = {
    f.name: f.type
    for f in dataclasses.fields(Config)
    if dataclasses.is_dataclass(f.type)
}


def defaults() -> ConfigDict:
    """A run's config with every key: its default, or None where one must be given.

    Example:
      >>> c = defaults()
      >>> c.score.score
      'removal'
    """
    values = ConfigDict()
    complete(values)
    return values


def complete(values: ConfigDict, kind: Any = Config) -> None:
    """Adds the keys of a schema that are not there, so that each can be set.

    A key takes what its type says, not what its first value happened to be: 1 does not
    make a rate an integer.

    Args:
      values: Changed in place: it gets defaults, or None where there is none.
      kind: The dataclass.
    """
    here = dict(values.items(preserve_field_references=True))
    for field in dataclasses.fields(kind):
        name = field.name
        if dataclasses.is_dataclass(field.type):
            if name not in here:
                values[name] = ConfigDict()
            group = values[name]
            if isinstance(group, ConfigDict):  # else `parse` says what it is
                complete(group, field.type)
            continue
        value = here.get(name, _default(field))
        if isinstance(value, config_dict.FieldReference):  # its file made it so
            continue
        if field.type is float and type(value) is int:
            value = _as_float(value)
        if name in here:
            del values[name]
        if isinstance(field.type, types.UnionType):  # a number, or one per layer
            value = config_dict.FieldReference(value, field_type=object)
        elif value is None:
            given = field.type if isinstance(field.type, type) else tuple
            value = config_dict.placeholder(given)
        values[name] = value


def _default(field: dataclasses.Field) -> Any:
    """A key's default; None where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def plain_dict(values: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """A config as a plain dict.

    Raises:
      ValueError: If a group has keys that are not all names.
    """
    if not isinstance(values, ConfigDict):
        return dict(values)
    try:
        return values.to_dict()
    except TypeError as error:  # it sorts keys
        raise ValueError(
            f"config has a group whose keys are of several types ({error}); expected"
            " names. Set single keys, such as --config.tune.epochs=3."
        ) from error


def parse(values: ConfigDict | Mapping[str, Any]) -> Config:
    """Checks a nested mapping and makes a `Config` of it.

    Raises:
      ValueError: For an unknown or missing key (the known ones are listed), a value of
        the wrong type, or one out of its range.
    """
    plain = plain_dict(values)
    check_keys(Config, plain, "config.")
    built = {}
    for name, value in ({name: {} for name in GROUPS} | plain).items():
        group = GROUPS.get(name)
        built[name] = build(group, value, f"config.{name}.") if group else value
    return build(Config, built, "config.")


def build(kind: Any, values: Any, prefix: str) -> Any:
    """Checks flat values and makes the dataclass `kind` of them; errors as `parse`."""
    check_keys(kind, values, prefix)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    missing = [
        n for n, f in fields.items() if values.get(n) is None and _default(f) is None
    ]
    if missing:
        raise ValueError(f"config key {prefix}{missing[0]} is missing; set it.")
    converted = {n: _convert(fields[n].type, v, prefix + n) for n, v in values.items()}
    try:
        return kind(**converted)
    except ValueError as error:
        raise ValueError(f"{prefix.rstrip('.')}: {error}") from error


def check_keys(kind: Any, values: Any, prefix: str) -> None:
    """Raises ValueError unless `values` is a group with no keys but those of `kind`."""
    right = isinstance(values, Mapping)
    expect(right, prefix.rstrip("."), values, "a group of keys")
    fields = [f.name for f in dataclasses.fields(kind)]
    unknown = sorted(_key(name) for name in values if name not in fields)
    if unknown:
        raise ValueError(unknown_key(prefix, unknown[0], fields))


def _convert(kind: Any, value: Any, name: str) -> Any:
    """Lists become tuples and ints floats; any other mismatch is an error."""
    if isinstance(value, list):
        value = tuple(value)
    if kind is float and _is(value, int):
        value = _as_float(value)
    if str(kind) == "tuple[float, ...]" and _all(value, (int, float)):
        value = tuple(_as_float(v) for v in value)
    expected = {
        "tuple[int, ...]": lambda v: _all(v, int),
        "tuple[float, ...]": lambda v: _all(v, (int, float)),
        "tuple[str, ...]": lambda v: _all(v, str),
        "int | tuple[int, ...]": lambda v: _is(v, int) or _all(v, int),
    }.get(str(kind), lambda v: _is(v, kind))
    wanted = kind.__name__ if isinstance(kind, type) else str(kind)
    expect(expected(value), name, value, wanted)
    return value


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # the range of the key will say the rest
        return math.inf if value > 0 else -math.inf


def _key(name: Any) -> str:
    """A key as a message shows it."""
    return name if isinstance(name, str) and name.isidentifier() else shown(name)


def _is(value: Any, kind: Any) -> bool:
    # bool is an int to Python, but True is no number of epochs.
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _all(value: Any, kind: Any) -> bool:
    return isinstance(value, tuple) and all(_is(v, kind) for v in value)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain values for JSON."""
    return plain(dataclasses.asdict(config))


def plain(value: Any) -> Any:
    """Nested values for JSON: tuples as lists."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return list(map(plain, value)) if isinstance(value, tuple) else value


def differences(
    a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """`key: value in a -> value in b` for every key in which two configs differ."""
    found = []
    for name in sorted({*a, *b}):
        x, y = a.get(name), b.get(name)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            found += differences(x, y, f"{prefix}{name}.")
        elif x != y:
            found.append(f"{prefix}{name}: {x!r} -> {y!r}")
    return found
