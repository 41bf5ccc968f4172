"""Docstrings, names of tests and documents stay in plain English; `python tests/tools/prose.py` prints the figures."""

from __future__ import annotations

import re
from pathlib import Path

import prose

BAD = '''
def losses(x):
    """What is left of the losses; what goes is zero."""

def total(x):
    """Return the total."""
'''


DIALECT = re.compile(
    r"_(s|t|what|who|whose|somebody|nobody|anew|said|told|goes_on|go_on|(is|are)_(no|none|one_line)|are_those|is_that_of"
    r"|of_(its|their)_own|of_ours|as_ever|as_it_is)(?=_|$)"
)
"""Parts of names that are no subject, verb and object."""


def check(found: prose.Prose) -> None:
    """Fail where a text is over the limits of the house style."""
    assert found.whats <= 3
    assert found.semicolons <= 5
    assert 8 <= found.words_per_sentence <= 20
    assert not found.long_sentences


def test_function_docstrings_start_with_a_verb() -> None:
    verbs, fragments = prose.shares(prose.ROOT)
    assert verbs >= 0.6
    assert fragments <= 0.02


def test_docstrings_read_plainly() -> None:
    check(prose.Prose.of([text for text, _ in prose.docstrings(prose.ROOT)]))


def test_names_of_tests_read_plainly() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (prose.ROOT / "tests").rglob("test_*.py")]
    names = [name for text in texts for name in re.findall(r"^\s*(?:async )?def (test_\w+)", text, re.MULTILINE)]
    assert len(names) > 1000
    assert not [name for name in names if DIALECT.search(name)]
    assert DIALECT.search("test_model_s_run_is_stored")


def test_documents_read_plainly() -> None:
    check(prose.Prose.of([page.read_text(encoding="utf-8") for page in prose.documents(prose.ROOT)]))


def test_the_check_finds_fragments_and_long_sentences(tmp_path: Path) -> None:
    package = tmp_path / "train"
    package.mkdir()
    (package / "bad.py").write_text(BAD, encoding="utf-8")
    assert prose.shares(tmp_path) == (0.5, 0.5)
    found = prose.Prose.of([text for text, _ in prose.docstrings(tmp_path)])
    assert found.semicolons > 5
    assert found.whats > 3
    assert prose.Prose.of([" ".join(["word"] * 46) + "."]).long_sentences
    assert not prose.Prose.of(["```bash\n" + " ".join(["word"] * 46) + "\n```\n"]).long_sentences


def test_the_glossary_has_each_term_once() -> None:
    page = (prose.ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = [row.split("|")[1].strip() for row in page.splitlines() if re.match(r"\| (?!term|---)", row)]
    assert len(terms) >= 40
    assert len(set(terms)) == len(terms)
