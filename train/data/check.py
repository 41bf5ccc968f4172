"""`efficientllm-data check`: report how training reads files of examples, before anything is trained.

Records, token ids and windows come from the functions that training uses, so the report cannot differ from a run.
"""

from __future__ import annotations

import heapq
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from ...runtime.base import flags
from ...runtime.base.errors import DataError
from ...runtime.base.extras import extra
from ...runtime.base.model_names import check_source
from ...runtime.base.progress import ProgressDisplay
from ...runtime.base.quantities import display_name, markdown_table
from ...runtime.chat_template import read_template_file
from .call_check import CallCheck, Tally, digest, lines_of, request_of
from .chat import Chat, Document, Encoder, check_jobs, set_chat_template
from .documents import DataSpec, open_documents
from .packing import is_kept_whole
from .records import BadLines, EmptyAnswerError

if TYPE_CHECKING:  # the help needs no transformers
    from transformers import PreTrainedTokenizerBase

SHOWN_EXAMPLES = 5
"""Rendered examples in a report."""

SHOWN_ERRORS = 5
"""Refused records of a file that a report names."""

MANY_CHATS = 6_000
"""Chats below which a report shows what fewer have taught."""
MEASURED = "0.36 from 50, 0.69 from 200 and 0.75 from 1,000 (docs/jobs.md)"
"""Shares of right requests of the home job, 40 MB and 114,688 tokens, see docs/jobs.md, From a few examples."""

Encoded = tuple[bytes, np.ndarray]
"""Hash of a record, and its token ids."""

REVERSE, NORMAL = "\x1b[7m", "\x1b[0m"
"""Codes of a terminal around learned text."""


@dataclass(frozen=True)
class CheckConfig:
    """Check."""

    source: str = "demo"
    """Model whose tokenizer and chat template are used, as in efficientllm-train."""
    chat_template: str = ""
    """File with the job's own chat template, as in efficientllm-train."""
    functions: Literal["described", "learned"] = "described"
    """learned: prompts do not describe the functions, as in efficientllm-train --preset job."""
    sequence_length: int = flags.count(512, at_least=8)
    """Tokens per training sequence."""
    test: tuple[str, ...] = ()
    """File of held-out examples, repeatable. Its requests should not occur in the training files."""
    text_field: str = "text"
    """JSON field or table column that holds the text."""

    def __post_init__(self) -> None:
        flags.check_fields(self)


class Refusals(BadLines):
    """Keeps the errors of all records that training refuses."""

    def __init__(self) -> None:
        super().__init__(0)
        self.errors: list[DataError] = []

    def add(self, error: DataError) -> None:
        """Keep an error and read on."""
        self.errors.append(error)


@dataclass
class FileReport:
    """Counts of one file, folder or hub dataset."""

    name: str
    refusals: Refusals = field(default_factory=Refusals)
    forms: Counter[str] = field(default_factory=Counter)
    """{name of a form of record: records}."""
    repeated: Tally = field(default_factory=Tally)
    """Records that occur before in the same file."""
    num_cut: int = 0
    """Chats that are longer than a sequence."""
    prompt_tokens: list[int] = field(default_factory=list)
    learned_tokens: list[int] = field(default_factory=list)
    requests: Counter[bytes] = field(default_factory=Counter)
    """{hash of a request: records}."""
    examples: list[Encoded] = field(default_factory=list)
    """SHOWN_EXAMPLES records, chosen by their hashes."""

    @property
    def whole_tokens(self) -> list[int]:
        """Return the number of tokens of each document."""
        pairs = zip(self.prompt_tokens, self.learned_tokens, strict=True)
        return [prompt + learned for prompt, learned in pairs]


def _encoded(report: FileReport, spec: DataSpec, encoder: Encoder) -> Iterator[tuple[Document, np.ndarray]]:
    """Yield the documents of a file with their token ids. A chat that the template rejects is a refusal."""
    for document in open_documents(spec, report.refusals):
        try:
            yield document, encoder.encode([document])[0]
        except DataError as error:
            report.refusals.add(error)


def check_file(spec: DataSpec, encoder: Encoder, sequence_length: int, calls: CallCheck | None = None) -> FileReport:
    """Read all records of a corpus as training does and return their counts. `calls` gets the chats.

    Raises UsageError or DataError for a file that cannot be read. Records that are refused are in the report.
    """
    report = FileReport(spec.path)
    known: set[bytes] = set()
    for document, ids in _encoded(report, spec, encoder):
        if isinstance(document, Chat):
            report.forms[document.form + (" with functions" if document.has_functions else "")] += 1
            report.num_cut += not is_kept_whole(ids, sequence_length)
            key, request = digest(document.to_json()), request_of(document)
            if calls is not None:
                calls.add(document, display_name(spec.path), spec.flag == "--test")
        else:
            report.forms["text"] += 1
            key, request = digest(document), document
        if key in known:
            report.repeated.add(document.place if isinstance(document, Chat) else repr(document[:60]))
        known.add(key)
        report.requests[digest(request)] += 1
        learned = int((ids >= 0).sum())
        report.learned_tokens.append(learned)
        report.prompt_tokens.append(len(ids) - learned)
        report.examples = _first_by_hash([*report.examples, (key, ids)])
    return report


def _first_by_hash(examples: Iterable[Encoded]) -> list[Encoded]:
    """Return different examples, the first by their digests."""
    return heapq.nsmallest(SHOWN_EXAMPLES, dict(examples).items(), key=lambda example: example[0])


def _lengths(tokens: Sequence[int]) -> str:
    """Return median, 95th percentile and maximum."""
    if not tokens:
        return "-"
    middle, high = np.percentile(tokens, [50, 95])
    return f"{middle:,.0f} / {high:,.0f} / {max(tokens):,}"


def rows(files: Sequence[FileReport], tests: Sequence[FileReport], sequence_length: int) -> list[list[str]]:
    """Return a table with a column for each file, those of `tests` last."""
    everything = [*files, *tests]
    table = [["", *(display_name(each.name) for each in everything)]]

    def add(title: str, cell: Callable[[FileReport], str]) -> None:
        table.append([title, *map(cell, everything)])

    for name in dict.fromkeys(form for each in everything for form in each.forms):
        add(f"records, {name}", lambda each, name=name: f"{each.forms[name]:,}")
    add("refused", lambda each: f"{len(each.refusals.errors):,}")
    empty = [sum(isinstance(error, EmptyAnswerError) for error in each.refusals.errors) for each in everything]
    table.append(["refused for an empty answer", *(f"{count:,}" for count in empty)])
    add("repeated in the file", lambda each: f"{each.repeated.count:,}")
    if tests:
        held_out = {request for each in tests for request in each.requests}
        shared = [sum(each.requests[request] for request in held_out) for each in files]
        table.append(["requests that are also in --test", *(f"{count:,}" for count in shared), *("" for _ in tests)])
    add("tokens of one pass", lambda each: f"{sum(each.whole_tokens):,}")
    title = "tokens, median / 95 % / maximum"
    add(f"whole {title}", lambda each: _lengths(each.whole_tokens))
    add(f"prompt {title}", lambda each: _lengths(each.prompt_tokens))
    add(f"learned {title}", lambda each: _lengths(each.learned_tokens))
    add(f"chats over {sequence_length} tokens, which windows cut", lambda each: f"{each.num_cut:,}")
    return table


def rendered(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase, marks: tuple[str, str]) -> str:
    """Return the text of token ids with `marks` around the learned parts. Control characters are escaped."""
    parts = []
    for run in np.split(ids, np.flatnonzero(np.diff(ids >= 0)) + 1):
        is_learned = bool(run[0] >= 0)
        text = str(tokenizer.decode((run if is_learned else ~run).tolist()))
        # somebody's text must not control the terminal
        text = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
        parts.append(f"{marks[0]}{text}{marks[1]}" if is_learned else text)
    return "".join(parts)


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        CheckConfig,
        prog="efficientllm-data",
        examples=(
            "data check train.jsonl --test test.jsonl --functions learned --sequence-length 256",
            "data check notes/ --source runs/small",
        ),
        description="Show how training reads files of examples: forms, lengths, repetitions, and five examples with "
        "the learned text marked. Exit code 2 if a record is refused.",
    )
    parser.add_argument("action", choices=("check",), help="check: print the report")
    parser.add_argument("files", nargs="+", metavar="FILE", help="file, folder or hub dataset, as --data takes them")
    return parser


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    names = arguments.pop("files")
    del arguments["action"]
    config = flags.take(arguments, CheckConfig)
    check_source(config.source, f"--source {config.source}")
    template = read_template_file(config.chat_template) if config.chat_template else ""
    named = [*((name, "FILE") for name in names), *((name, "--test") for name in config.test)]
    specs = [DataSpec.parse(name, text_field=config.text_field, flag=flag) for name, flag in named]
    for spec in specs:  # before torch is imported
        refusals = Refusals()
        if next(open_documents(spec, refusals), None) is None and not refusals.errors:
            raise DataError(f"{spec.path} has no documents; give other text")
    with extra("train"):
        from ..model.source import load_tokenizer
    tokenizer = load_tokenizer(config.source)
    set_chat_template(tokenizer, template, config.functions == "learned")
    encoder = Encoder(tokenizer)
    check_jobs(encoder.chat_format, {spec.job for spec in specs})
    reports, calls = list[FileReport](), CallCheck()
    with ProgressDisplay() as display:
        for (name, _), spec in zip(named, specs, strict=True):
            display.say(f"reading {name}")
            reports.append(check_file(spec, encoder, config.sequence_length, calls))
    files, tests = reports[: len(names)], reports[len(names) :]
    print(markdown_table(rows(files, tests, config.sequence_length)))
    if table := calls.rows():
        print(f"\n{markdown_table(table)}")
    num_chats = sum(sum(each.forms.values()) - each.forms["text"] for each in files)
    if 0 < num_chats < MANY_CHATS:
        print(f"\nnote: {num_chats:,} chats; the home job's shares of right requests are {MEASURED}")
    repeated = {f"records are repeated in {display_name(each.name)}": each.repeated for each in reports}
    for line in [*lines_of(repeated), *calls.lines()]:
        print(f"\nwarning: {line}")
    marks, learned = ((REVERSE, NORMAL), "") if sys.stdout.isatty() else (("[[", "]]"), ", learned text in [[ ]]")
    chosen = _first_by_hash(example for report in files for example in report.examples)
    for number, (_, ids) in enumerate(chosen, 1):
        shown = rendered(ids[: config.sequence_length], encoder.tokenizer, marks)
        cut = "..." if len(ids) > config.sequence_length else ""
        print(f"\nexample {number} of {len(ids)} tokens{learned}:\n{shown}{cut}")
    errors = [error for report in reports for error in report.refusals.errors]
    for error in errors[:SHOWN_ERRORS]:
        print(f"\nrefused: {error}")
    if errors:
        raise DataError(f"training refuses {len(errors)} of the records; correct or remove them")
    return 0
