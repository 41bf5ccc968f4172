"""Restrict answers by a grammar of llguidance: JSON, a JSON schema, a regular expression, or a Lark grammar."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .base.errors import EfficientLLMError, UnanswerableError, UsageError
from .base.extras import extra

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from .engines.scheduler import EngineScheduler

T = TypeVar("T")

MAX_CHARACTERS = 1 << 17
"""Largest length of a grammar."""
CACHED_GRAMMARS, MAX_CACHED_CHARACTERS = 16, 1 << 15
"""Number and largest length of the grammars that stay compiled."""
CHECKED_GRAMMARS = 128
"""Number of grammars whose check is remembered. A request checks the schema of each of its functions."""
BASE_STACK_BYTES, STACK_BYTES_PER_CHARACTER = 8 << 20, 2048
"""Stack on which a grammar is parsed.

llguidance follows references and rules by recursion, and a stack overflow ends the process. The largest need that was
measured is 560 bytes for each character of the source.
"""
STACK_UNIT = 1 << 16
"""Unit of stack sizes, a multiple of the page size of every system."""
MAX_MESSAGE_CHARACTERS = 500
"""Largest length of a message of llguidance in an error."""

JSON: Any = {"whitespace_pattern": r"( |\n {0,16})?", "json_allow_general_unicode_escapes": True}
"""Format of JSON, with limited white space: a small model that may write any amount of space writes nothing else."""

CALL_JSON: Any = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False} | {
    "json_allow_general_unicode_escapes": True
}
"""Format of arguments of calls, with the white space of chat templates. Fewer choices leave more tokens forced."""

LENIENT_CALL_JSON: Any = {**CALL_JSON, "lenient": True}
"""The same, without keywords that llguidance does not enforce."""

TIMED_FORMATS = {"time": 24, "date-time": 35, "duration": 32}
"""Formats with numbers of any length, and the largest length of their texts: nine digits of a second."""

MAX_MULTIPLE = 20_000
"""Largest least common multiple of all `multipleOf` of a grammar, without trailing zeros.

llguidance has a state for each remainder, and its limits of fuel and states do not count them: 9,999,991 takes minutes.
"""

MAX_NAMING_SECONDS = 1.0
"""Longest time to compile the parts of a refused grammar, to find the part that is refused by itself."""


@dataclass(frozen=True)
class Grammar:
    """A grammar of a whole answer."""

    source: str
    """Source in one of llguidance's formats."""
    name: str
    """Name of the request field, for messages."""
    parts: tuple[Grammar, ...] = ()
    """Grammars that this one contains. If it is refused and one of them as well, the error names that one."""

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Grammar:
        """Return the grammar of a JSON `schema`.

        Raises UsageError if it is malformed or has keywords that llguidance does not enforce.
        """
        try:
            source = _matcher().grammar_from_json_schema(closed_schema(schema, closes=False), defaults=JSON)
        except (ValueError, RecursionError) as error:  # half of a surrogate pair, a number of hundreds of digits
            raise UsageError(f"json_schema: {_in_one_line(str(error))}") from error
        return cls(source, "json_schema").checked()

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Return the grammar of texts that a regular expression in Rust's syntax matches as a whole."""
        return cls(_matcher().grammar_from_regex(pattern), "regex").checked()

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Return the grammar of a text in Lark's syntax with llguidance's extensions, such as %json and %regex."""
        return cls(text, "lark").checked()

    def checked(self) -> Grammar:
        """Return this grammar. Raises UsageError if it is malformed or too long."""
        self.bounded()
        if message := _message_about(self):
            for part in self.parts:
                part.checked()
            raise self.refusal(message)
        return self

    def bounded(self) -> Grammar:
        """Return this grammar, which may be malformed. Raises UsageError if it is too long or takes too long.

        Parsing it is left to `GrammarConstraint`, because a large one takes as long to check as to compile.
        """
        if len(self.source) > MAX_CHARACTERS:
            raise UsageError(f"{self.name}: has {len(self.source):,} characters; the limit is {MAX_CHARACTERS:,}")
        if numbers := _too_large_multiples(self.source):
            for part in self.parts:
                part.bounded()
            raise self.refusal(f"`multipleOf` {numbers} takes too long to enforce; remove it")
        return self

    def allowed_start(self, text: str) -> str | None:
        """Return the longest start of `text` that an answer may have, or None if the whole text is an answer."""
        with extra("grammar"):
            from llguidance import LLTokenizer
        matcher, content = _matcher()(LLTokenizer("byte"), self.source), text.encode()
        if matcher.is_error():
            raise self.refusal(matcher.get_error())
        length = matcher.try_consume_tokens(list(content))
        return None if length == len(content) and matcher.is_accepting() else content[:length].decode(errors="ignore")

    def parse_on_large_stack(self, parse: Callable[[], T]) -> T:
        """Call `parse` in a thread with a stack for its recursion, and return its result."""
        outcome = Future[T]()

        def work() -> None:
            try:
                outcome.set_result(parse())
            except BaseException as error:
                outcome.set_exception(error)

        thread = threading.Thread(target=work, daemon=True)  # the process may end before a large grammar is parsed
        with _STACK_SIZE:
            before = threading.stack_size(
                BASE_STACK_BYTES + STACK_BYTES_PER_CHARACTER * len(self.source) // STACK_UNIT * STACK_UNIT
            )
            try:
                thread.start()
            finally:
                threading.stack_size(before)
        return outcome.result()

    def refusal(self, message: str) -> UsageError:
        """Return a UsageError with llguidance's message."""
        return UsageError(f"{self.name}: {_in_one_line(message)}")


@lru_cache(maxsize=CHECKED_GRAMMARS)
def _message_about(grammar: Grammar) -> str:
    """Return the reason why llguidance refuses a grammar, "" if it does not."""
    is_wrong, messages = grammar.parse_on_large_stack(lambda: _matcher().validate_grammar_with_warnings(grammar.source))
    return messages[0] if is_wrong else ""


def _in_one_line(message: str) -> str:
    """Return llguidance's message without the lines that repeat the grammar, and without its state."""
    lines = re.split("<state>|<backtrace>", message)[0].splitlines()
    lines = [line for line in lines if not re.match(r"\s*(\d+ \||\^+\s*$)", line)]
    text = " ".join(" ".join(lines).split())
    text = _with_remedy(text)
    return text if len(text) <= MAX_MESSAGE_CHARACTERS else text[:MAX_MESSAGE_CHARACTERS] + " ..."


def _too_large_multiples(source: str) -> str:
    """Return the `multipleOf` of a grammar if their least common multiple exceeds MAX_MULTIPLE, else ""."""
    # the source is JSON, in which a key may be written with escapes and still be the same key
    plain = re.sub(r"\\u00([0-7][0-9a-fA-F])", lambda found: chr(int(found[1], 16)), source)
    found = re.findall(r'"multipleOf"\s*:\s*(-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)', plain)
    numbers: list[str] = list(dict.fromkeys(found))
    multiple = 1
    for number in numbers:
        digits = Decimal(number).normalize().as_tuple().digits
        multiple = math.lcm(multiple, int("".join(map(str, digits))))
    return " and ".join(numbers) if multiple > MAX_MULTIPLE else ""


def _with_remedy(text: str) -> str:
    """Return a message of llguidance 1.x, with a remedy if it is about a keyword of a JSON schema."""
    if found := re.search(r"Unimplemented keys: \[(.*?)\]", text):
        keywords = re.findall(r'"(.*?)"', found[1])
        listed = " and ".join(f"`{keyword}`" for keyword in keywords)
        said = f"{listed} cannot be enforced; remove {'it' if len(keywords) == 1 else 'them'}"
    elif found := re.search(r"oneOf constraints are not supported", text):
        said = "`oneOf` whose schemas may overlap cannot be enforced; use `anyOf`"
    elif found := re.search(r"Unknown format: (.*)", text):
        said = f"`format` {found[1]!r} cannot be enforced; remove it"
    else:
        return text
    return text[: found.start()] + said


def _matcher() -> type[LLMatcher]:
    """Return llguidance's class. Raises MissingExtraError without llguidance."""
    with extra("grammar"):
        from llguidance import LLMatcher
    return LLMatcher


def lark_of(text: str) -> str:
    """Return a grammar in llama.cpp's GBNF as one in Lark's syntax, which itself is returned as it is.

    Raises UsageError if the grammar is malformed.
    """
    if "::=" not in text:
        return text
    with extra("grammar"):
        from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark
    try:
        return gbnf_to_lark(text[: MAX_CHARACTERS + 1])
    except (GbnfToLarkError, ValueError, RecursionError) as error:
        raise UsageError(f"grammar: {_in_one_line(str(error))}") from error


def closed_schema(schema: Any, closes: bool = True) -> Any:
    """Return a JSON schema whose objects have only the properties that they list, unless `additionalProperties` is set.

    JSON Schema allows others, and small models then write names such as "city: " after all properties. Times are
    limited to `TIMED_FORMATS`, because small models write digits without end. Without `closes`, they are all that
    changes.
    """
    if not isinstance(schema, Mapping):
        return schema
    found, properties, required = dict(schema), schema.get("properties"), schema.get("required", [])
    is_listed = (
        isinstance(properties, Mapping) and isinstance(required, list) and {*map(str, required)} <= {*properties}
    )
    for name in ("properties", "$defs", "definitions"):
        if isinstance(parts := schema.get(name), Mapping):
            # the properties of definitions may be joined with others
            closes_parts = closes and (name == "properties" or "allOf" not in str(schema))
            found[name] = {key: closed_schema(each, closes_parts) for key, each in parts.items()}
    for name in ("anyOf", "oneOf"):
        if isinstance(parts := schema.get(name), list):
            found[name] = [closed_schema(each, closes and "properties" not in schema) for each in parts]
    if "items" in schema:
        found["items"] = closed_schema(schema["items"], closes)
    if closes and is_listed and not _OPEN & schema.keys():
        found["additionalProperties"] = False
    if schema.get("format") in [*TIMED_FORMATS]:
        found.setdefault("maxLength", TIMED_FORMATS[schema["format"]])
    return found


_OPEN = {"additionalProperties", "patternProperties", "unevaluatedProperties", "allOf", "anyOf", "oneOf", "$ref", "if"}
"""Keywords that say more about the properties of an object."""


def answer_schema(schema: Mapping[str, Any], strict: bool = False) -> dict[str, Any]:
    """Return the schema that a `response_format` restricts answers to.

    Unless it is `strict`, it is a `closed_schema` whose keywords that llguidance does not enforce, such as an unknown
    format, are ignored. Raises UsageError if it is nested too deeply.
    """
    if strict:
        return dict(schema)
    try:
        return {**closed_schema(schema), "x-guidance": {**JSON, "lenient": True}}
    except RecursionError as error:
        raise UsageError("json_schema: is nested too deeply") from error


def schema_part(schema: Mapping[str, Any], name: str, format: Any = None) -> Grammar:
    """Return the grammar of a JSON schema alone, unchecked. Errors call it `name`."""
    return Grammar(json.dumps({"grammars": [{"json_schema": _formatted(schema, format)}]}), name)


def embedded_schema(schema: Mapping[str, Any], format: Any = None) -> str:
    """Return a JSON schema as a part of a Lark rule. The text has a `format` of llguidance, by default the schema's."""
    return "%json " + json.dumps(_formatted(schema, format))


def _formatted(schema: Mapping[str, Any], format: Any) -> dict[str, Any]:
    return {**schema, "x-guidance": format or schema.get("x-guidance", JSON)}


class GrammarConstraint:
    """A `Constraint` that keeps one answer within a grammar."""

    def __init__(self, engine: EngineScheduler, grammar: Grammar, control_tokens: Iterable[int] = ()) -> None:
        """Compile `grammar`, which refers to `control_tokens` by number.

        Raises UsageError for a grammar that is wrong or too large. The first constraint of an engine reads its
        vocabulary in some tenths of a second, unless `read_vocabulary` was called before.
        """
        self._size = engine.vocab_size
        self._name = grammar.name
        tokenizer = _tokenizer_of(engine, frozenset(control_tokens))
        self._matcher = _compiled(engine, frozenset(control_tokens), grammar)
        if self._matcher.is_error():
            grammar.checked()
            until = time.monotonic() + MAX_NAMING_SECONDS
            for part in grammar.parts:
                if time.monotonic() >= until:
                    break
                GrammarConstraint(engine, part, control_tokens)  # raises if this part is refused by itself
        self._require(not self._matcher.is_error())
        self._bits = np.zeros((tokenizer.vocab_size + 31) // 32, dtype=np.int32)

    def copy(self) -> GrammarConstraint:
        """Return a constraint for another answer in the same state, without compiling again."""
        other = copy.copy(self)
        other._matcher, other._bits = self._matcher.deep_copy(), self._bits.copy()
        return other

    @property
    def is_complete(self) -> bool:
        """Return True if no token can follow."""
        return self._matcher.is_stopped()

    @property
    def is_accepting(self) -> bool:
        """Return True if the answer may end here."""
        return self._matcher.is_accepting()

    def mask(self, logits: np.ndarray) -> None:
        """Set forbidden tokens to -inf in the fp32 `logits` [V], in place."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._require(not self._matcher.is_error())  # no token is allowed, or the state grew too large
        # `count` leaves out the added end token of a model without one, and the rest of the last 32 bits
        allowed = np.unpackbits(self._bits.view(np.uint8), count=self._size, bitorder="little").view(bool)
        logits[~allowed] = -np.inf

    def forced_tokens(self) -> list[int]:
        """Return the tokens that must follow, in the tokenization of their text.

        llguidance leaves out last tokens whose text a longer token may contain, see its docs/fast_forward.md.
        """
        tokens = self._matcher.compute_ff_tokens()
        return tokens if self._matcher.validate_tokens(tokens) == len(tokens) else []

    def push(self, token: int) -> None:
        """Add the chosen `token`."""
        self._require(self._matcher.consume_token(token))

    def _require(self, holds: bool) -> None:
        if not holds:
            reason = _in_one_line(self._matcher.get_error()).replace("NoExtensionBias", "nothing may come next")
            raise UnanswerableError(f"{self._name}: no output can satisfy this grammar: {reason}")


class _Vocabulary:
    """The vocabulary of an engine in the form of llguidance's TokenizerWrapper."""

    bos_token_id = None

    def __init__(self, engine: EngineScheduler, control_tokens: frozenset[int]) -> None:
        # weak: llguidance keeps this object, and _TOKENIZERS must not keep its own key alive
        self._engine = weakref.ref(engine)
        ends = sorted(engine.end_ids)
        self.eos_token_id = ends[0] if ends else engine.vocab_size
        self.special_token_ids = sorted({*ends, *control_tokens})
        # control tokens, such as end tokens, have no bytes, but llguidance needs a name for each
        names = {token: f"<|{token}|>".encode() for token in self.special_token_ids}
        self.tokens = [names.get(token) or text for token, text in enumerate(engine.vocabulary())]
        if not ends:
            self.tokens.append(b"<|none|>")
            self.special_token_ids.append(engine.vocab_size)

    def __call__(self, text: bytes | str) -> list[int]:
        engine = self._engine()
        if engine is None:
            return []
        return engine.tokenize(text if isinstance(text, str) else text.decode("utf-8", "replace"), special=False)


_TOKENIZERS: weakref.WeakKeyDictionary[EngineScheduler, dict[frozenset[int], LLTokenizer]] = weakref.WeakKeyDictionary()
_COMPILED: weakref.WeakKeyDictionary[EngineScheduler, OrderedDict[tuple[str, frozenset[int]], LLMatcher]] = (
    weakref.WeakKeyDictionary()
)
"""Matchers of the last grammars of each engine, in the order of their use."""
_LOCK = threading.Lock()
_STACK_SIZE = threading.Lock()
"""Held while the default stack size is changed, which affects every thread that starts."""


def read_vocabulary(engine: EngineScheduler) -> None:
    """Prepare the vocabulary of an engine for its first constraint. Do nothing without llguidance."""
    with contextlib.suppress(EfficientLLMError):  # llguidance is missing, or the engine was closed
        _tokenizer_of(engine, frozenset())


def _compiled(engine: EngineScheduler, control_tokens: frozenset[int], grammar: Grammar) -> LLMatcher:
    """Return a matcher at the start of `grammar`. Requests with the same functions share its compilation."""
    tokenizer, key = _tokenizer_of(engine, control_tokens), (grammar.source, control_tokens)
    with _LOCK:
        known = _COMPILED.setdefault(engine, OrderedDict())
        if key in known:  # a copy, because a matcher changes with the tokens of its answer
            known.move_to_end(key)
            return known[key].deep_copy()
    # the lock is free meanwhile: a large grammar compiles for seconds, in which other requests need theirs
    matcher = grammar.parse_on_large_stack(lambda: _matcher()(tokenizer, grammar.source, log_level=0))
    if not matcher.is_error() and len(grammar.source) <= MAX_CACHED_CHARACTERS:
        with _LOCK:
            known[key] = matcher.deep_copy()
            while len(known) > CACHED_GRAMMARS:
                known.popitem(last=False)
    return matcher


def _tokenizer_of(engine: EngineScheduler, control_tokens: frozenset[int]) -> LLTokenizer:
    with extra("grammar"):
        from llguidance import LLTokenizer, TokenizerWrapper
    with _LOCK:  # also while the vocabulary is read, so that two requests do not read it twice
        known = _TOKENIZERS.setdefault(engine, {})
        if control_tokens not in known:
            wrapper = TokenizerWrapper(_Vocabulary(engine, control_tokens))
            known[control_tokens] = LLTokenizer(wrapper, eos_token=sorted(engine.end_ids) or None)
        return known[control_tokens]
