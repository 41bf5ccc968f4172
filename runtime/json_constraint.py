"""Keeping generated text a JSON object: which bytes may come next (RFC 8259)."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

WHITESPACE = " \t\n\r"
MAX_WHITESPACE = 20
"""In a row; a model that cannot decide would go on for ever."""
ESCAPES = '"\\/bfnrt'
LITERALS = ("true", "false", "null")
MAX_DEPTH = 64
TRIED = 64
"""Tokens that are tried before less likely ones."""


@dataclass(frozen=True)
class _State:
    """Where in an object the text stands."""

    expects: str = "object"
    """object, key, key-or-end, colon, value, value-or-end, comma, string, literal, number or done."""
    stack: tuple[str, ...] = ()
    """Open containers, "{" or "["."""
    is_key: bool = False
    """Whether the open string is a key."""
    pending: str = ""
    """What has been read of an escape (from the backslash), a literal or a number."""
    spaces: int = 0


@dataclass
class JsonConstraint:
    """Accepts text as long as it is the beginning of one JSON object."""

    _state: _State = field(default_factory=_State, init=False)
    _decoder: codecs.IncrementalDecoder = field(default_factory=codecs.getincrementaldecoder("utf-8"), init=False)

    @property
    def is_complete(self) -> bool:
        """Whether the object has ended."""
        return self._state.expects == "done"

    def push(self, data: bytes) -> bool:
        """Go on with `data`, part of a UTF-8 character perhaps; False, and nothing changes, where JSON cannot."""
        if not data:
            return False
        before = self._decoder.getstate()
        try:
            state = self._state
            for character in self._decoder.decode(data):
                state = _step(state, character)
            pending = self._decoder.getstate()[0]
            # half a character is at home in a string only, and not after its backslash: nothing could follow it
            if pending and (state.expects != "string" or state.pending or not _begins_character(pending)):
                raise _RefusedError
        except (UnicodeDecodeError, _RefusedError):
            self._decoder.setstate(before)
            return False
        self._state = state
        return True


class JsonTokens:
    """JsonConstraint as a `Constraint`: of the most likely tokens, those that go on with the object."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes, self._json = token_bytes, JsonConstraint()

    @property
    def is_complete(self) -> bool:
        return self._json.is_complete

    def mask(self, logits: np.ndarray) -> None:
        order, accepted = np.argsort(-logits, kind="stable"), np.full_like(logits, -np.inf)
        for start in range(0, len(order), TRIED):
            fitting = [token for token in order[start : start + TRIED].tolist() if self._fits(token)]
            if fitting:
                accepted[fitting] = logits[fitting]
                break
        logits[:] = accepted

    def _fits(self, token: int) -> bool:
        before, decoder = self._json._state, self._json._decoder.getstate()
        fits = self._json.push(self._token_bytes(token))
        self._json._state = before
        self._json._decoder.setstate(decoder)
        return fits

    def push(self, token: int) -> None:
        self._json.push(self._token_bytes(token))


class _RefusedError(Exception):
    pass


def _begins_character(data: bytes) -> bool:
    """Whether `data` is part of a UTF-8 character; Python's decoder finds surrogates only at their end."""
    for second in (b"", b"\x80", b"\x90", b"\xa0"):
        for rest in (b"", b"\x80", b"\x80\x80"):
            try:
                (data + second + rest).decode("utf-8")
            except UnicodeDecodeError:
                continue
            return True
    return False


def _step(state: _State, character: str) -> _State:
    """The state after one more character; _RefusedError where there is none."""
    if state.expects == "string":
        return _in_string(state, character)
    if state.expects == "literal":
        return _in_literal(state, character)
    if state.expects == "number":
        return _in_number(state, character)
    if character in WHITESPACE:
        if state.spaces >= MAX_WHITESPACE or state.expects == "done":
            raise _RefusedError
        return replace(state, spaces=state.spaces + 1)
    state = replace(state, spaces=0)
    match state.expects, character:
        case ("object", "{"):
            return _open(state, "{")
        case ("key" | "key-or-end", '"'):
            return replace(state, expects="string", is_key=True)
        case ("colon", ":"):
            return replace(state, expects="value")
        case ("key-or-end" | "comma", "}") if state.stack[-1] == "{":
            return _close(state)
        case ("value-or-end" | "comma", "]") if state.stack[-1] == "[":
            return _close(state)
        case ("comma", ","):
            return replace(state, expects="key" if state.stack[-1] == "{" else "value")
        case ("value" | "value-or-end", _):
            return _begin_value(state, character)
    raise _RefusedError


def _open(state: _State, container: str) -> _State:
    if len(state.stack) == MAX_DEPTH:
        raise _RefusedError
    expects = "key-or-end" if container == "{" else "value-or-end"
    return replace(state, expects=expects, stack=(*state.stack, container))


def _close(state: _State) -> _State:
    stack = state.stack[:-1]
    return replace(state, expects="comma" if stack else "done", stack=stack)


def _begin_value(state: _State, character: str) -> _State:
    if character in "{[":
        return _open(state, character)
    if character == '"':
        return replace(state, expects="string", is_key=False)
    if character in "-0123456789":
        return replace(state, expects="number", pending=character)
    if any(literal.startswith(character) for literal in LITERALS):
        return replace(state, expects="literal", pending=character)
    raise _RefusedError


def _in_string(state: _State, character: str) -> _State:
    if state.pending:
        escape = state.pending + character
        if escape[1] == "u":
            if len(escape) > 2 and character not in "0123456789abcdefABCDEF":
                raise _RefusedError
            return replace(state, pending=escape if len(escape) < 6 else "")
        if character not in ESCAPES:
            raise _RefusedError
        return replace(state, pending="")
    if character == "\\":
        return replace(state, pending=character)
    if character == '"':
        return replace(state, expects="colon" if state.is_key else "comma")
    if character < " ":
        raise _RefusedError
    return state


def _in_literal(state: _State, character: str) -> _State:
    text = state.pending + character
    if text in LITERALS:
        return replace(state, expects="comma", pending="")
    if any(literal.startswith(text) for literal in LITERALS):
        return replace(state, pending=text)
    raise _RefusedError


def _in_number(state: _State, character: str) -> _State:
    text = state.pending + character
    if character in "0123456789.eE+-":
        if not _begins_number(text):
            raise _RefusedError
        return replace(state, pending=text)
    if not state.pending[-1].isdigit():
        raise _RefusedError
    return _step(replace(state, expects="comma", pending=""), character)


def _begins_number(text: str) -> bool:
    """Whether `text` is the beginning of a JSON number."""
    digits = text.removeprefix("-")
    mantissa, has_exponent, exponent = digits.replace("E", "e").partition("e")
    whole, has_point, fraction = mantissa.partition(".")
    if len(whole) > 1 and whole[0] == "0":
        return False
    if (whole and not whole.isdigit()) or (has_point and not whole) or (fraction and not fraction.isdigit()):
        return False
    if not has_exponent:
        return True
    if not whole or (has_point and not fraction):
        return False
    exponent = exponent[1:] if exponent[:1] in ("+", "-") else exponent
    return not exponent or exponent.isdigit()
