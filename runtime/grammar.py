"""Answers that follow a grammar of llguidance's: JSON, a schema's JSON, a regular expression, a Lark grammar."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .base.errors import EfficientLLMError, UnanswerableError, UsageError
from .base.extras import extra

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from .engines.scheduler import EngineScheduler

T = TypeVar("T")

MOST_CHARACTERS = 1 << 17
"""Of a grammar."""
STACK, STACK_PER_CHARACTER = 8 << 20, 2048
"""Bytes of stack that a grammar is read on. llguidance follows references and rules by recursion, and chains of them
that outgrow the stack end the process; 560 bytes for each character of the source is the most that one was seen to
take."""
PAGE = 1 << 16
"""What a stack is a multiple of, whatever the system's pages are."""
MESSAGE = 500
"""Characters of llguidance's messages that are passed on, at most."""

JSON: Any = {"whitespace_pattern": r"( |\n {0,16})?", "json_allow_general_unicode_escapes": True}
"""How JSON may be written: indented or not (a small model that may write any amount of space writes nothing else)."""

NAMING_SECONDS = 1.0
"""How long the parts of a refused grammar are compiled, at most, to name the one that is refused alone, too."""


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like, from its first character to its last."""

    source: str
    """In one of llguidance's forms."""
    name: str
    """What a client calls it, for messages."""
    parts: tuple[Grammar, ...] = ()
    """Grammars within it. Where it is refused and one of them is, too, the error names that one."""

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Grammar:
        """JSON that `schema` describes; UsageError where it is none, or uses what llguidance does not enforce."""
        with extra("grammar"):
            from llguidance import LLMatcher
        try:
            source = LLMatcher.grammar_from_json_schema(dict(schema), defaults=JSON)
        except (ValueError, RecursionError) as error:  # half of a surrogate pair, a number of hundreds of digits
            raise UsageError(f"json_schema: {_in_one_line(str(error))}") from error
        return cls(source, "json_schema").checked()

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that a regular expression (Rust's syntax) matches as a whole."""
        with extra("grammar"):
            from llguidance import LLMatcher
        return cls(LLMatcher.grammar_from_regex(pattern), "regex").checked()

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Lark's syntax, with llguidance's additions, such as %json and %regex."""
        return cls(text, "lark").checked()

    def checked(self) -> Grammar:
        """Itself; UsageError where it is malformed or too long."""
        with extra("grammar"):
            from llguidance import LLMatcher
        if len(self.source) > MOST_CHARACTERS:
            raise UsageError(f"{self.name}: has {len(self.source):,} characters, at most {MOST_CHARACTERS:,} are taken")
        is_wrong, messages = self.on_its_stack(lambda: LLMatcher.validate_grammar_with_warnings(self.source))
        if is_wrong:
            for part in self.parts:
                part.checked()
            raise self.refusal(messages[0])
        return self

    def on_its_stack(self, read: Callable[[], T]) -> T:
        """What `read` makes of the source, in a thread whose stack its recursion does not outgrow."""
        outcome = Future[T]()

        def work() -> None:
            try:
                outcome.set_result(read())
            except BaseException as error:
                outcome.set_exception(error)

        thread = threading.Thread(target=work, daemon=True)  # no end of the process waits for a large grammar
        with _STACK_SIZE:
            before = threading.stack_size(STACK + STACK_PER_CHARACTER * len(self.source) // PAGE * PAGE)
            try:
                thread.start()
            finally:
                threading.stack_size(before)
        return outcome.result()

    def refusal(self, message: str) -> UsageError:
        """What llguidance says of it."""
        return UsageError(f"{self.name}: {_in_one_line(message)}")


def _in_one_line(message: str) -> str:
    """llguidance's message without the lines that repeat the grammar, and without its state."""
    lines = re.split("<state>|<backtrace>", message)[0].splitlines()
    lines = [line for line in lines if not re.match(r"\s*(\d+ \||\^+\s*$)", line)]
    text = " ".join(" ".join(lines).split())
    text = _with_remedy(text)
    return text if len(text) <= MESSAGE else text[:MESSAGE] + " ..."


def _with_remedy(text: str) -> str:
    """Return llguidance 1.x's message; where it is about a keyword of a JSON schema, say what to do about it."""
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


def schema_part(schema: Mapping[str, Any], name: str) -> Grammar:
    """Return the grammar of `embedded_schema` alone, unchecked. Errors call it `name`."""
    content = {**schema, "x-guidance": JSON}
    return Grammar(json.dumps({"grammars": [{"json_schema": content}]}), name)


def embedded_schema(schema: Mapping[str, Any]) -> str:
    """A JSON schema as a part of a Lark rule."""
    return "%json " + json.dumps({**schema, "x-guidance": JSON})


class GrammarConstraint:
    """A `Constraint`: the tokens that keep one answer within a grammar."""

    def __init__(self, engine: EngineScheduler, grammar: Grammar, control_tokens: Iterable[int] = ()) -> None:
        """UsageError for a grammar that is wrong or too large; `control_tokens` are those it names by number.

        An engine's first constraint takes some tenths of a second, in which its vocabulary is read, unless
        `read_vocabulary` was there before.
        """
        from llguidance import LLMatcher

        self._size = engine.vocab_size
        self._name = grammar.name
        tokenizer = _tokenizer_of(engine, frozenset(control_tokens))
        self._matcher = grammar.on_its_stack(lambda: LLMatcher(tokenizer, grammar.source, log_level=0))
        if self._matcher.is_error():
            until = time.monotonic() + NAMING_SECONDS
            for part in itertools.takewhile(lambda _: time.monotonic() < until, grammar.parts):
                GrammarConstraint(engine, part, control_tokens)
        self._require(not self._matcher.is_error())
        self._bits = np.zeros((tokenizer.vocab_size + 31) // 32, dtype=np.int32)

    def copy(self) -> GrammarConstraint:
        """One for another answer, at the same place of the grammar, which is not compiled again."""
        other = copy.copy(self)
        other._matcher, other._bits = self._matcher.deep_copy(), self._bits.copy()
        return other

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped()

    @property
    def is_accepting(self) -> bool:
        """Whether the answer may end here."""
        return self._matcher.is_accepting()

    def mask(self, logits: np.ndarray) -> None:
        """Set tokens that may not come next to -inf in the fp32 `logits` [V], in place."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._require(not self._matcher.is_error())  # nothing fits, or it grew too large on the way
        allowed = np.unpackbits(self._bits.view(np.uint8), count=self._size, bitorder="little").view(bool)
        logits[~allowed] = -np.inf

    def push(self, token: int) -> None:
        """`token` was chosen."""
        self._require(self._matcher.consume_token(token))

    def _require(self, holds: bool) -> None:
        if not holds:
            reason = _in_one_line(self._matcher.get_error()).replace("NoExtensionBias", "nothing may come next")
            raise UnanswerableError(f"{self._name}: no answer can keep to it: {reason}")


class _Vocabulary:
    """An engine's vocabulary as llguidance's TokenizerWrapper wants it."""

    bos_token_id = None

    def __init__(self, engine: EngineScheduler, control_tokens: frozenset[int]) -> None:
        self._engine = weakref.ref(engine)
        ends = sorted(engine.end_ids)
        self.eos_token_id = ends[0] if ends else engine.vocab_size
        self.special_token_ids = sorted({*ends, *control_tokens})
        # what ends an answer is control, and control has no bytes; llguidance wants names
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
_LOCK = threading.Lock()
_STACK_SIZE = threading.Lock()
"""Threads that start meanwhile would get the same."""


def read_vocabulary(engine: EngineScheduler) -> None:
    """What an engine's first constraint does otherwise; nothing where llguidance is not installed."""
    with contextlib.suppress(EfficientLLMError):  # or the engine was closed meanwhile
        _tokenizer_of(engine, frozenset())


def _tokenizer_of(engine: EngineScheduler, control_tokens: frozenset[int]) -> LLTokenizer:
    with extra("grammar"):
        from llguidance import LLTokenizer, TokenizerWrapper
    with _LOCK:
        known = _TOKENIZERS.setdefault(engine, {})
        if control_tokens not in known:
            wrapper = TokenizerWrapper(_Vocabulary(engine, control_tokens))
            known[control_tokens] = LLTokenizer(wrapper, eos_token=sorted(engine.end_ids) or None)
        return known[control_tokens]
