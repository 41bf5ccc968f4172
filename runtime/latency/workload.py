"""What a device is asked to do: a prompt and its answer, or one token at a depth."""

from __future__ import annotations

from dataclasses import dataclass

from ..base.errors import UsageError

EXAMPLE = "give prompt=256,answer=128 (tokens), or depth=512"
FIELDS = {"prompt": "prompt_tokens", "answer": "answer_tokens", "depth": "depth"}


@dataclass(frozen=True)
class Workload:
    """Tokens to evaluate, one sequence at a time."""

    prompt_tokens: int = 0
    """Evaluated at once, from an empty cache."""
    answer_tokens: int = 0
    """Decoded one by one after the prompt."""
    depth: int = 0
    """Tokens already in the cache before the answer, where there is no prompt."""

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.answer_tokens, self.depth) < 0:
            raise UsageError(f"workload {self}: tokens must not be negative; {EXAMPLE}")
        if not self.prompt_tokens and not self.answer_tokens:
            raise UsageError(f"workload {self}: there is nothing to evaluate; {EXAMPLE}")
        if self.prompt_tokens and self.depth:
            raise UsageError(f"workload {self}: a prompt begins with an empty cache; {EXAMPLE}")

    @classmethod
    def at_depth(cls, depth: int) -> Workload:
        """One decoded token after `depth` others: milliseconds per token."""
        return cls(answer_tokens=1, depth=depth)

    @classmethod
    def parse(cls, text: str) -> Workload:
        """ "prompt=256,answer=128" or "depth=512" (one token there); UsageError for anything else."""
        values: dict[str, int] = {}
        for part in text.split(","):
            name, _, number = (piece.strip() for piece in part.partition("="))
            if name not in FIELDS or FIELDS[name] in values or not number.isdecimal():
                raise UsageError(f"workload {text!r}: cannot read {part.strip()!r}; {EXAMPLE}")
            values[FIELDS[name]] = int(number)
        if "depth" in values:
            values.setdefault("answer_tokens", 1)
        return cls(**values)

    @property
    def first_depth(self) -> int:
        """Tokens in the cache when the first token of the answer is evaluated."""
        return self.prompt_tokens or self.depth

    def __str__(self) -> str:
        if self == Workload.at_depth(self.depth):
            return f"depth={self.depth}"
        named = {"prompt": self.prompt_tokens, "answer": self.answer_tokens, "depth": self.depth}
        return ",".join(f"{name}={value}" for name, value in named.items() if value)
