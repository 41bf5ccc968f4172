"""Measure how docstrings, README and documents read.

`python tests/tools/prose.py` prints one row per kind of text. `tests/test_prose.py` holds the limits.
"""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("train", "export", "runtime", "server", "devices")
FRAGMENTS = frozenset(["of", "what", "as", "whether", "where", "how", "by", "why", "who", "when"])
"""First words that make a docstring a fragment."""
LONG_SENTENCE = 45
"""Words."""
VERBS = """
accept accumulate add adjust align allocate allow answer append apply ask assemble assert assign attach average base
begin bind block bound build cache calculate calibrate call cancel cap capture cast change check choose clamp clean
clear clip close collect combine compact compare compile complete compress compute concatenate configure connect
consume continue convert copy correct count cover create cut decide declare decode decrease deduplicate delay delete
deliver derive describe detect determine disable discard display distil distribute divide download draw drop dump
emit empty enable encode end enforce ensure enter enumerate escape estimate evaluate evict exclude execute exit
expand export express extend extract fail fetch fill filter find finish fit fix flatten flush fold follow force
format forward free fuse gather generate get give group guard handle hash hide hold identify ignore import include
increase index infer inform initialise insert inspect install interleave interpolate interrupt invert iterate join
keep label launch lay leave let limit link list listen load locate lock log look lower make map mark mask match mean
measure merge mirror mix monitor move multiply name normalise note notify number offer omit open order pack pad
parse pass patch pause permute pick pin place plan plot point prefer prefix prepare price print probe process
produce profile project propagate protect prove provide prune publish pull push put quantise query queue quote raise
rank reach read rebuild recompute record recover redirect reduce refer refit refresh refuse register reject release
reload remap remember remove rename render renumber reorder repeat replace reply report represent request require
reserve reset reshape resize resolve respond restore restrict resume retry return reuse reverse revert rewrite
rotate round route run sample save scale scan schedule score search see select send separate serialise serve set
share shift shorten show shrink shuffle shut sign simulate skip slice smooth solve sort split start state stay stop
store stream stretch strip study subtract sum summarise support swap switch synchronise take tell test tie time
tokenise total trace track train transfer transform translate transpose trim truncate try tune turn undo unescape
unload unlock unpack untie unwrap update upload use validate verify visit wait walk warn weigh widen withhold wrap
write yield zero
"""
"""First words that count as imperative verbs, separated by spaces."""


@dataclass(frozen=True)
class Prose:
    """The figures of one kind of text."""

    words: int
    words_per_sentence: float
    whats: float
    """Per 1,000 words."""
    semicolons: float
    """Per 1,000 words."""
    long_sentences: tuple[str, ...]

    @classmethod
    def of(cls, texts: Sequence[str]) -> Prose:
        """Measure texts together; code, tables and pictures of Markdown do not count."""
        plain = [_without_code(text) for text in texts]
        sentences = [sentence for text in plain for sentence in _sentences(text)]
        lengths = [len(sentence.split()) for sentence in sentences]
        num_words = max(1, sum(len(text.split()) for text in plain))
        return cls(
            words=num_words,
            words_per_sentence=statistics.fmean(lengths or [0]),
            whats=1000 * sum(len(re.findall(r"\bwhat\b", text, re.IGNORECASE)) for text in plain) / num_words,
            semicolons=1000 * sum(text.count(";") for text in plain) / num_words,
            long_sentences=tuple(s for s in sentences if len(s.split()) > LONG_SENTENCE),
        )


NOT_PROSE = ("|", "<", "![", ">>>", "#", "├", "│", "└")
"""First characters of lines of tables, pictures, examples, headings and trees."""


def _without_code(text: str) -> str:
    """Drop fenced code, comments, tables, trees, pictures and quoted code."""
    text = re.sub(r"```.*?```|<!--.*?-->", " ", text, flags=re.DOTALL)
    kept = [line for line in text.splitlines() if not line.lstrip().startswith(NOT_PROSE)]
    return re.sub(r"`[^`]*`", "X", "\n".join(kept))


def _sentences(text: str) -> list[str]:
    """Split at full stops, blank lines and list items; headings of two words or fewer do not count."""
    parts = re.split(r"(?<=[.!?])\s+|\n\s*\n|\n\s*(?:[-*]|\d+\.)\s", text)
    return [part.strip() for part in parts if len(part.split()) > 2]


def docstrings(root: Path) -> Iterator[tuple[str, bool]]:
    """Yield every docstring of the five packages, attributes' included, and whether it is a function's."""
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            body = getattr(node, "body", None)
            for index, statement in enumerate(body if isinstance(body, list) else ()):
                match statement:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        yield text, index == 0 and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def documents(root: Path) -> list[Path]:
    """Return README.md, SECURITY.md and the pages of docs/."""
    return [root / "README.md", root / "SECURITY.md", *sorted((root / "docs").rglob("*.md"))]


def first_word(docstring: str) -> str:
    """Return the first word in lower case, or an empty string."""
    return (re.findall(r"[a-z]+", docstring.lower()) or [""])[0]


def shares(root: Path) -> tuple[float, float]:
    """Return the shares of function docstrings that start with a verb and with a fragment."""
    functions = [text for text, is_function in docstrings(root) if is_function]
    first, verbs = [first_word(text) for text in functions], set(VERBS.split())
    return sum(word in verbs for word in first) / len(first), sum(word in FRAGMENTS for word in first) / len(first)


def main() -> None:
    verbs, fragments = shares(ROOT)
    print(f"function docstrings: {verbs:.0%} start with a verb, {fragments:.1%} with a fragment")
    pages = [page.read_text(encoding="utf-8") for page in documents(ROOT)]
    for name, texts in {
        "docstrings": [text for text, _ in docstrings(ROOT)],
        "README.md": pages[:1],
        "docs": pages[1:],
    }.items():
        found = Prose.of(texts)
        print(
            f"{name}: {found.words:,} words, {found.words_per_sentence:.1f} a sentence, per 1,000 words "
            f"{found.whats:.1f} what and {found.semicolons:.1f} semicolons, {len(found.long_sentences)} long sentences"
        )


if __name__ == "__main__":
    main()
