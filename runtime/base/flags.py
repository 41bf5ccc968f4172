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
from importlib.metadata import version
from typing import Any, NoReturn, TypeVar

from .errors import OptionError, UsageError
from .quantities import did_you_mean, none_of, parse_bytes, parse_count

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError instead of printing usage and leaving.

    `sections` are dataclasses whose fields are flags of the command; `--debug` and `--version` every command has.
    """

    def __init__(self, *sections: type, **options: Any) -> None:
        super().__init__(formatter_class=_WholeNames, **options)
        self.add_argument("--debug", action="store_true", help="show tracebacks")  # run_command takes it out
        self.add_argument("--version", action="version", version=f"efficientllm {version('efficientllm')}")
        for section in sections:
            add_section(self, section)

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """All values by name; positional arguments may stand between flags."""
        namespace, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            flag = next((each for each in unknown if each.startswith("--")), "").partition("=")[0]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(flag, self._option_string_actions)}")
        values = vars(namespace)
        del values["debug"]
        return values

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class _WholeNames(argparse.HelpFormatter):
    """Help whose lines break at spaces alone, so that names with hyphens can be copied from it."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def require(options: object, name: str, holds: bool, rule: str, value: object = None) -> None:
    """OptionError unless `holds`: names the field as the flag the user typed, its value and the rule it breaks.

    `value` stands for a single bad item of a field that holds several.
    """
    if not holds:
        shown = getattr(options, name) if value is None else value
        shown = ",".join(map(str, shown)) if isinstance(shown, tuple) else "" if isinstance(shown, bool) else shown
        raise OptionError(f"{flag_name(name)} {shown}".rstrip() + f": {rule}")


def check_types(options: object) -> None:
    """OptionError where a field of a dataclass of options is not of its type: for those made in Python."""
    hints = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        value, annotation = getattr(options, field.name), _unwrap_optional(hints[field.name])
        if value is None and annotation is not hints[field.name]:
            continue
        kind, choices = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
        if kind is typing.Literal:
            require(options, field.name, value in choices, none_of(value, choices))
        elif kind in (tuple, bool, int, float, str):
            accepted = {float: (int, float), tuple: (tuple, list)}.get(kind, kind)
            holds = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
            require(options, field.name, holds, f"is no {kind.__name__}", value=repr(value))


def count(default: int | None) -> Any:
    """A dataclass field of a number that may be typed as 100M or 30k."""
    return dataclasses.field(default=default, metadata={"parse": parse_count})


def byte_count(default: int | None) -> Any:
    """A dataclass field of a size that may be typed as 60MB or 2GiB."""
    return dataclasses.field(default=default, metadata={"parse": parse_bytes})


def comma_separated(*default: str) -> Any:
    """A dataclass field of names typed with commas between them; without it, a tuple's flag is repeatable."""
    return dataclasses.field(default=default, metadata={"comma_separated": True})


def whole_numbers(*default: int) -> Any:
    """A dataclass field of whole numbers typed with commas between them."""
    return dataclasses.field(default=default, metadata={"parse": _parse_whole_numbers})


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The string literal that follows each field in the source of `cls` and its bases; {} where there is no source."""
    try:
        source = inspect.getsource(cls)
    except OSError:  # a frozen program
        return {}
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(source)).body[0]).body
    docs = {
        name: text
        for base in cls.__bases__
        if dataclasses.is_dataclass(base)
        for name, text in field_docs(base).items()
    }
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


def add_section(parser: argparse.ArgumentParser, cls: type) -> None:
    """The flags of dataclass `cls` under its docstring's first line as their heading."""
    is_configuration = all(dataclasses.is_dataclass(hint) for hint in typing.get_type_hints(cls).values())
    if is_configuration:
        add_flags(parser, cls)
    else:
        add_flags(parser.add_argument_group((inspect.getdoc(cls) or "").splitlines()[0]), cls)  # type: ignore[arg-type]


def add_flags(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add one flag per field of dataclass `cls` (sections are walked); absent flags leave no attribute."""
    hints = typing.get_type_hints(cls)
    docs = field_docs(cls)
    for field in dataclasses.fields(cls):
        annotation = _unwrap_optional(hints[field.name])
        if dataclasses.is_dataclass(annotation):
            add_section(parser, annotation)  # type: ignore[arg-type]
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
            names = typing.get_args(annotation)
            options |= {"type": functools.partial(one_of, names), "metavar": "{" + ",".join(names) + "}"}
        else:
            options |= {"type": _named(parse or annotation), "metavar": field.name.upper()}
        parser.add_argument(flag_name(field.name), **options)


def _split_commas(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _parse_whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _split_commas(text))
    except ValueError as error:
        raise ValueError(f"{text!r} is no comma-separated list of whole numbers") from error


def one_of(names: Sequence[str], text: str) -> str:
    """What argparse makes of a flag's `text`: itself where it is one of `names`."""
    if text not in names:
        raise argparse.ArgumentTypeError(f"{text!r} {none_of(text, names)}")
    return text


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
    if default is dataclasses.MISSING or default in (None, "", ()):
        return ""
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    return f" [{default}]"


def take(arguments: dict[str, Any], cls: type[T]) -> T:
    """`cls` with the values among `arguments` that belong to it (or to its sections), which are taken out."""
    return _merge(cls(), arguments)


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
            raise UsageError(f"{name}: {value!r} {none_of(value, typing.get_args(annotation))}")
        return value
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(annotation, type) and not isinstance(value, annotation):
        raise UsageError(f"{name}: {value!r} is not {'an' if annotation is int else 'a'} {annotation.__name__}")
    return value


def read_toml(text: str) -> dict[str, Any]:
    """Flat {field: value} of a TOML configuration; section names only group. ValueError where it is none."""
    values: dict[str, Any] = {}
    try:
        sections = tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error
    for name, section in sections.items():
        values |= section if isinstance(section, dict) else {name: section}
    return values


def flatten(config: Any) -> dict[str, dict[str, Any]]:
    """{section: {field: value}} of a configuration of sections, in declaration order."""
    return {section.name: dataclasses.asdict(getattr(config, section.name)) for section in dataclasses.fields(config)}
