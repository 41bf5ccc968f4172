"""Check that values read from a file have the types of a dataclass's fields."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any


def check_value(value: object, kind: Any, where: str, variables: Mapping[Any, Any] | None = None) -> None:
    """Raise ValueError unless `value` and everything in it has the type `kind`. Numbers must be finite.

    The message names the place, below `where`. `variables` maps type variables to types.
    """
    variables = variables or {}
    kind = variables.get(kind, kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in arguments:
            return
        (kind,) = (each for each in arguments if each is not types.NoneType)
        check_value(value, kind, where, variables)
    elif dataclasses.is_dataclass(kind):
        _require(isinstance(value, typing.cast(type, kind)), where)
        for name, annotation in typing.get_type_hints(kind).items():
            check_value(getattr(value, name), annotation, f"{where}.{name}", variables)
    elif origin is dict:
        _require(isinstance(value, dict), where)
        for key, each in typing.cast(dict[Any, Any], value).items():
            check_value(each, arguments[1], f"{where}[{key!r}]", variables)
    elif origin in (list, tuple):
        _require(isinstance(value, origin), where)
        items = typing.cast(list[Any], value)
        is_endless = origin is list or arguments[1] is ...
        _require(is_endless or len(items) == len(arguments), where)
        for index, each in enumerate(items):
            check_value(each, arguments[0 if is_endless else index], f"{where}[{index}]", variables)
    elif origin is typing.Literal:
        _require(value in arguments, where)
    elif kind is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        _require(is_number and math.isfinite(typing.cast(float, value)), where)
    else:
        is_stray_bool = isinstance(value, bool) and kind is not bool  # True is an int in Python
        _require(isinstance(value, kind) and not is_stray_bool, where)


def _require(holds: bool, where: str) -> None:
    if not holds:
        raise ValueError(f"{where} has another type")
