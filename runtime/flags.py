"""Command-line flags declared once, as fields of frozen dataclasses.

A field's name becomes its flag, its type the parser, the string literal under it the help text. A dataclass whose
fields are dataclasses is a command's whole configuration; its flags are those of its sections.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from .errors import UsageError

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError instead of printing usage and leaving."""

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """All values by name; positional arguments may stand between flags."""
        return vars(self.parse_intermixed_args(argv))

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The string literal that follows each field in the source of `cls`."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    docs: dict[str, str] = {}
    for statement, following in itertools.pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            docs[statement.target.id] = " ".join(following.value.value.split())
    return docs


def _unwrap_optional(annotation: Any) -> Any:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        options = [option for option in typing.get_args(annotation) if option is not type(None)]
        if len(options) == 1:
            return options[0]
    return annotation


def add_flags(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add one flag per field of dataclass `cls` (sections are walked); absent flags leave no attribute."""
    hints = typing.get_type_hints(cls)
    docs = field_docs(cls)
    for field in dataclasses.fields(cls):
        annotation = _unwrap_optional(hints[field.name])
        if dataclasses.is_dataclass(annotation):
            title = (inspect.getdoc(annotation) or "").splitlines()[0]
            add_flags(parser.add_argument_group(title), annotation)  # type: ignore[arg-type]
            continue
        options: dict[str, Any] = {
            "dest": field.name,
            "default": argparse.SUPPRESS,
            "help": (docs.get(field.name, "") + _default_note(field)).replace("%", "%%"),
        }
        parse = field.metadata.get("parse")
        if annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(annotation) is tuple:
            if parse is not None:
                options["type"] = _named(parse)
            else:
                separated = field.metadata.get("comma_separated")
                options |= {"type": _split_commas} if separated else {"action": "append"}
            options["metavar"] = field.name.upper()
        elif typing.get_origin(annotation) is typing.Literal:
            options |= {"choices": typing.get_args(annotation)}
        else:
            options |= {"type": _named(parse or annotation), "metavar": field.name.upper()}
        parser.add_argument(flag_name(field.name), **options)


def _split_commas(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def whole_numbers(text: str) -> tuple[int, ...]:
    """The `parse` of a field that holds comma-separated whole numbers."""
    try:
        return tuple(int(part) for part in _split_commas(text))
    except ValueError as error:
        raise ValueError(f"{text!r} is no comma-separated list of whole numbers") from error


def _named(parse: Any) -> Any:
    """argparse drops a ValueError's text; ArgumentTypeError keeps it."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            message = f"{text!r} is not a whole number" if parse is int else str(error)
            raise argparse.ArgumentTypeError(message) from error

    return convert


def _default_note(field: dataclasses.Field[Any]) -> str:
    default = field.default
    if default is dataclasses.MISSING or default is None or default == ():
        return ""
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    return f" [{default}]"


def merge(config: T, values: Mapping[str, Any], origin: str) -> T:
    """A copy of `config` (sections included) with flat field `values` replaced; unknown names are a UsageError.

    Values may be typed (from argparse) or raw TOML scalars and lists.
    """
    remaining = dict(values)
    merged = _merge(config, remaining)
    if remaining:
        raise UsageError(f"{origin}: unknown setting {sorted(remaining)[0]!r}")
    return merged


def _merge(config: Any, remaining: dict[str, Any]) -> Any:
    changes: dict[str, Any] = {}
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        annotation = _unwrap_optional(hints[field.name])
        if dataclasses.is_dataclass(annotation):
            changes[field.name] = _merge(getattr(config, field.name), remaining)
        elif field.name in remaining:
            changes[field.name] = _coerce(remaining.pop(field.name), annotation, field)
    try:
        return dataclasses.replace(config, **changes)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _coerce(value: Any, annotation: Any, field: dataclasses.Field[Any]) -> Any:
    name = flag_name(field.name)
    if value is None:
        return None
    parse = field.metadata.get("parse")
    if parse is not None and isinstance(value, str):
        try:
            return parse(value)
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from error
    if typing.get_origin(annotation) is tuple:
        return tuple(value) if isinstance(value, list | tuple) else tuple(_split_commas(str(value)))
    if typing.get_origin(annotation) is typing.Literal:
        if value not in typing.get_args(annotation):
            raise UsageError(f"{name}: {value!r} is none of {', '.join(map(str, typing.get_args(annotation)))}")
        return value
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(annotation, type) and not isinstance(value, annotation):
        raise UsageError(f"{name}: {value!r} is not {'an' if annotation is int else 'a'} {annotation.__name__}")
    return value


def read_toml(text: str) -> dict[str, Any]:
    """Flat {field: value} of a TOML configuration; section names only group."""
    values: dict[str, Any] = {}
    for name, section in tomllib.loads(text).items():
        values |= section if isinstance(section, dict) else {name: section}
    return values


def flatten(config: Any) -> dict[str, dict[str, Any]]:
    """{section: {field: value}} of a configuration of sections, in declaration order."""
    return {section.name: dataclasses.asdict(getattr(config, section.name)) for section in dataclasses.fields(config)}
