"""Declare command-line flags as the fields of frozen dataclasses.

A field's name becomes its flag, its type the parser, the string literal under it the help text. The range of a number
is declared with its default. A dataclass whose fields are dataclasses is the whole configuration of a command; its
flags are those of its sections.
"""

# tyro 1.0.17 can read the same dataclasses. We keep our own parser because tyro would be a dependency of every install,
# takes 0.1 s to import (argparse: 0.01 s) and prints errors as boxes of several lines.

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import math
import operator
import sys
import textwrap
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NoReturn, TypedDict, TypeVar, Unpack

from .errors import OptionError, UsageError
from .quantities import did_you_mean, not_one_of, parse_bytes, parse_count

T = TypeVar("T")

VERSION = version("efficientllm")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError instead of printing its usage and exiting."""

    def __init__(self, *sections: type, examples: Sequence[str] = (), **options: Any) -> None:
        """Add the flags of the dataclasses `sections`, `--debug` and `--version`.

        The help ends with `examples`, which are arguments of `efficientllm`.

        `efficientllm VERB` puts its own name into sys.argv[0]; help and errors then show it instead of `prog`.
        """
        if sys.argv[0].startswith("efficientllm "):
            options["prog"] = sys.argv[0]
        super().__init__(formatter_class=_HelpFormatter, **options)
        self.examples = tuple(f"efficientllm {example}" for example in examples)
        self.add_argument("--debug", action="store_true", help="show tracebacks")  # run_command removes it from argv
        self.add_argument("--version", action="version", version=f"efficientllm {VERSION}")
        for section in sections:
            add_section(self, section)

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return all values by name. Positional arguments may stand between flags."""
        namespace, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            flag = next((each for each in unknown if each.startswith("--")), "").partition("=")[0]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(flag, self._option_string_actions)}")
        values = vars(namespace)
        del values["debug"]
        return values

    def format_help(self) -> str:
        """Return the help with the examples at the end."""
        examples = "".join(f"  {example}\n" for example in self.examples)
        return super().format_help() + (f"\nexamples:\n{examples}" if examples else "")

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with `message`."""
        raise UsageError(f"{message} (see {self.prog} --help)")


class _HelpFormatter(argparse.HelpFormatter):
    """Breaks lines at spaces only, so that names with hyphens can be copied."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


class Bounds(TypedDict, total=False):
    """The range of a number. A bound that is not given does not exist. `below=inf` requires a finite number."""

    at_least: float
    above: float
    at_most: float
    below: float


_COMPARISONS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def number(default: float | None, **bounds: Unpack[Bounds]) -> Any:
    """Return a dataclass field of a number within `bounds`."""
    return dataclasses.field(default=default, metadata={"bounds": bounds})


def count(default: int | None, **bounds: Unpack[Bounds]) -> Any:
    """Return a dataclass field of a number that may be typed as 100M or 30k."""
    return dataclasses.field(default=default, metadata={"parse": parse_count, "bounds": bounds})


def byte_count(default: int | None, **bounds: Unpack[Bounds]) -> Any:
    """Return a dataclass field of a size that may be typed as 60MB or 2GiB."""
    return dataclasses.field(default=default, metadata={"parse": parse_bytes, "bounds": bounds})


def type_name(default: str = "") -> Any:
    """Return a dataclass field of a name in lower case, which may be typed in either case, such as Q4_K_M."""
    return dataclasses.field(default=default, metadata={"parse": str.lower})


def whole_numbers(*default: int, **bounds: Unpack[Bounds]) -> Any:
    """Return a dataclass field of whole numbers, each within `bounds`, typed with commas between them."""
    return dataclasses.field(default=default, metadata={"parse": _parse_whole_numbers, "bounds": bounds})


def internal(default: Any) -> Any:
    """Return a dataclass field that a configuration file has and no flag sets."""
    return dataclasses.field(default=default, metadata={"internal": True})


def comma_separated(*default: str) -> Any:
    """Return a dataclass field of names typed with commas between them. Other flags of tuples are repeatable."""
    return dataclasses.field(default=default, metadata={"comma_separated": True})


def flag_name(field_name: str) -> str:
    """Return the flag of a field, such as --batch-size. A field named like a keyword of Python ends in "_"."""
    return "--" + field_name.rstrip("_").replace("_", "-")


def require(options: object, name: str, holds: bool, rule: str, value: object = None) -> None:
    """Raise OptionError unless `holds`. The message names the field's flag, its value and the `rule`.

    `value` replaces the value of the field in the message, for one bad item of a field that has several.
    """
    if not holds:
        shown = getattr(options, name) if value is None else value
        if isinstance(shown, tuple):
            shown = ",".join(map(str, shown))
        elif isinstance(shown, bool):  # a switch is typed without a value
            shown = ""
        raise OptionError(f"{flag_name(name)} {shown}".rstrip() + f": {rule}")


def check_fields(options: object) -> None:
    """Raise OptionError if a field of a dataclass has the wrong type or is outside its declared range."""
    # types as well, which the parser has checked: options made in Python are only checked here
    hints = _hints(type(options))
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        value, annotation = getattr(options, field.name), _unwrap_optional(hints[field.name])
        is_optional = annotation is not hints[field.name]
        if value is None and is_optional:
            continue
        kind, choices = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
        if kind is typing.Literal:
            require(options, field.name, value in choices, not_one_of(value, choices))
        elif kind in (tuple, bool, int, float, str):
            accepted = {float: (int, float), tuple: (tuple, list)}.get(kind, kind)
            is_stray_bool = isinstance(value, bool) and kind is not bool  # True is an int in Python
            holds = isinstance(value, accepted) and not is_stray_bool
            require(options, field.name, holds, f"must be of type {kind.__name__}", value=repr(value))
            if isinstance(value, tuple | list):
                holds = all(isinstance(each, (int, float) if choices[0] is float else choices[0]) for each in value)
                require(options, field.name, holds, f"must be a list of {choices[0].__name__}", value=repr(value))
        if bounds := field.metadata.get("bounds"):
            numbers: Sequence[float] = value if isinstance(value, tuple | list) else (value,)  # type: ignore[assignment]
            # NaN fails every comparison, so it is within no range
            holds = all(_COMPARISONS[name](each, bound) for each in numbers for name, bound in bounds.items())
            require(options, field.name, holds, f"must {_describe(bounds)}")


@functools.cache
def _hints(options: type) -> dict[str, Any]:
    """Return the resolved annotations of a dataclass, which take longer to resolve than its fields to check."""
    return typing.get_type_hints(options)


def _describe(bounds: Bounds) -> str:
    """Return a range as a rule, such as "be above 0 and at most 1"."""
    if bounds == {"at_least": 0}:
        return "not be negative"
    if bounds in ({"above": 0}, {"at_least": 1}):
        return "be positive"
    if bounds.keys() == {"at_least", "at_most"}:
        return f"be between {bounds['at_least']} and {bounds['at_most']}"  # type: ignore[typeddict-item]
    parts = ("finite" if bound == math.inf else f"{name.replace('_', ' ')} {bound}" for name, bound in bounds.items())
    return f"be {' and '.join(parts)}"


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Return the string literal after each field in the source of `cls` and its bases, {} without a source."""
    try:
        source = inspect.getsource(cls)
    except OSError:  # a frozen program
        return {}
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(source)).body[0]).body
    docs: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, cls.__bases__):
        docs |= field_docs(base)
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
    """Return T for an annotation `T | None`, and other annotations unchanged."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        options = [option for option in typing.get_args(annotation) if option is not type(None)]
        if len(options) == 1:
            return options[0]
    return annotation


def add_section(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add the flags of dataclass `cls` with the first line of its docstring, without the period, as their heading."""
    is_configuration = all(dataclasses.is_dataclass(hint) for hint in typing.get_type_hints(cls).values())
    if is_configuration:
        _add_flags(parser, cls)
    else:
        title = (inspect.getdoc(cls) or "").splitlines()[0].removesuffix(".")
        _add_flags(parser.add_argument_group(title), cls)


def _add_flags(parser: argparse._ActionsContainer, cls: type) -> None:
    """Add one flag per field of dataclass `cls`, or those of its sections. Absent flags leave no attribute."""
    hints = typing.get_type_hints(cls)
    docs = field_docs(cls)
    for field in dataclasses.fields(cls):
        if field.metadata.get("internal"):
            continue
        annotation = _unwrap_optional(hints[field.name])
        if dataclasses.is_dataclass(annotation):
            add_section(typing.cast(argparse.ArgumentParser, parser), typing.cast(type, annotation))
            continue
        options: dict[str, Any] = {
            "dest": field.name,
            "default": argparse.SUPPRESS,  # a flag that is not given must not override a configuration file
            "help": (docs.get(field.name, "") + _default_note(field)).replace("%", "%%"),
        }
        parse = field.metadata.get("parse")
        if annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(annotation) is tuple:
            if parse is not None:
                options["type"] = _converter(parse)
            else:
                separated = field.metadata.get("comma_separated")
                options |= {"type": _split_commas} if separated else {"action": "append"}
            options["metavar"] = field.name.rstrip("_").upper()
        elif typing.get_origin(annotation) is typing.Literal:
            names = typing.get_args(annotation)
            options |= {"type": functools.partial(_one_of, names), "metavar": "{" + ",".join(names) + "}"}
        else:
            options |= {"type": _converter(parse or annotation), "metavar": field.name.upper()}
        parser.add_argument(flag_name(field.name), **options)


def _split_commas(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _parse_whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _split_commas(text))
    except ValueError as error:
        raise ValueError(f"{text!r} is not a comma-separated list of whole numbers") from error


def _one_of(names: Sequence[str], text: str) -> str:
    """Return the one of `names` that is `text` in either case, and raise ArgumentTypeError if there is none."""
    found = next((name for name in names if name.lower() == text.lower()), None)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} {not_one_of(text, names)}")
    return found


def _converter(parse: Any) -> Any:
    """Return `parse` with its ValueError as an ArgumentTypeError, the only error whose text argparse prints."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            message = f"{text!r} is not a whole number" if parse is int else str(error)
            raise argparse.ArgumentTypeError(message) from error

    return convert


def _default_note(field: dataclasses.Field[Any]) -> str:
    """Return " [DEFAULT]" for the help text, or "" if the field has no default to show."""
    default = field.default
    if default is dataclasses.MISSING or default in (None, "", ()):
        return ""
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    return f" [{default}]"


def take(arguments: dict[str, Any], cls: type[T]) -> T:
    """Return `cls` with its values of `arguments`, those of its sections included, and remove them from there."""
    return _merge(cls(), arguments)


def merge(config: T, values: Mapping[str, Any], origin: str) -> T:
    """Return a copy of `config` with flat field `values` replaced, those of its sections included.

    Values may be typed (from argparse) or raw TOML scalars and lists. Raises UsageError for unknown names. The
    message starts with `origin`.
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
    """Return `value` as the type of its field, and raise UsageError if it cannot be converted."""
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
            raise UsageError(f"{name}: {value!r} {not_one_of(value, typing.get_args(annotation))}")
        return value
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(annotation, type) and not isinstance(value, annotation):
        raise UsageError(f"{name}: {value!r} is not {'an' if annotation is int else 'a'} {annotation.__name__}")
    return value


def read_toml(text: str) -> dict[str, Any]:
    """Return the flat {field: value} of a TOML configuration. Raises ValueError if `text` is not TOML.

    Section names only group the fields.
    """
    values: dict[str, Any] = {}
    try:
        sections = tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error
    for name, section in sections.items():
        values |= section if isinstance(section, dict) else {name: section}
    return values


def flatten(config: Any) -> dict[str, dict[str, Any]]:
    """Return {section: {field: value}} of a configuration of sections, in declaration order."""
    return {section.name: dataclasses.asdict(getattr(config, section.name)) for section in dataclasses.fields(config)}
