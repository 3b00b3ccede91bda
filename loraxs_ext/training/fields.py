"""From nested dictionaries, as YAML gives them, to checked dataclasses; every complaint names the field."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")


def setting(default: Any, doc: str) -> Any:
    """A dataclass field with a default and the sentence that explains it to users."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"doc": doc})
    return dataclasses.field(default=default, metadata={"doc": doc})


def build(kind: type[T], values: Any, path: str = "") -> T:
    """An instance of the dataclass `kind`.

    Args:
        kind: a dataclass of plain types: str, int, float, bool, None, Literal, list, dict and dataclasses.
        values: its fields by name.
        path: where in the configuration this stands, for messages.

    Raises:
        ValueError: a key is unknown (the message names the nearest), or a value does not fit its field.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{path or 'configuration'}: expected fields and values, got {values!r}")
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(typing.cast(Any, kind))]
    prefix = f"{path}." if path else ""
    check_names(values, names, path)
    return kind(**{name: convert(value, hints[name], f"{prefix}{name}") for name, value in values.items()})


def check_names(given: Iterable[Any], known: Iterable[str], path: str) -> None:
    """Raise ValueError at the first given name that is not known."""
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"{path + '.' if path else ''}{name}: unknown field; {hint}")


def convert(value: Any, kind: Any, path: str) -> Any:
    """`value` as the type `kind`; ValueError where it does not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        # Narrow types first: a float also takes an int.
        for option in sorted((a for a in arguments if a is not type(None)), key=_width):
            try:
                return convert(value, option, path)
            except ValueError as error:
                reason = error
        raise reason
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, path)
    if origin is Literal:
        if value in arguments and not isinstance(value, bool):
            return value
        raise ValueError(f"{path}: expected {' or '.join(map(repr, arguments))}, got {value!r}")
    if origin is list and isinstance(value, list):
        return [convert(item, arguments[0], f"{path}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    if kind is float and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        # YAML takes 1e-3, without a point, for a string.
        try:
            return float(value)
        except ValueError:
            pass
    elif kind in (int, bool, str) and type(value) is kind:
        return value
    raise ValueError(f"{path}: expected {_describe(kind)}, got {value!r}")


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries laid over each other; what is in `above` counts."""
    merged = dict(below)
    for name, value in above.items():
        under = merged.get(name)
        merged[name] = merge(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return merged


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}.

    Raises:
        ValueError: a name is a value and a section at once.
    """
    nested: dict[str, Any] = {}
    for path, value in values.items():
        *sections, name = path.split(".")
        here = nested
        for section in sections:
            here = here.setdefault(section, {})
            if not isinstance(here, dict):
                raise ValueError(f"{path}: {section!r} has a value already, got another below it")
        here[name] = value
    return nested


def flatten(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = flatten(value, f"{path}{name}.") if isinstance(value, Mapping) and value else {f"{path}{name}": value}
        flat |= inner
    return flat


def _width(kind: Any) -> int:
    order: list[Any] = [bool, int, float, str]
    return order.index(kind) if kind in order else -1


def _describe(kind: Any) -> str:
    names: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(kind, "a list" if typing.get_origin(kind) is list else "fields and values")
