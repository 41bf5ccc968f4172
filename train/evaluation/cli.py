"""`efficientllm-eval`: measure one model, or several side by side with paired differences."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...runtime.base import flags
from ...runtime.base.errors import UsageError
from ...runtime.base.files import write_json_atomically, write_text_atomically
from ...runtime.base.model_names import may_be_hub_id, source_path
from ...runtime.base.output import check_place, locked_output
from ...runtime.base.progress import ProgressDisplay
from ...runtime.base.quantities import markdown_table, print_rows
from ...runtime.engines.artefact import Artefact
from ...runtime.engines.contract_text import ALL_TEXTS, with_bits
from ..data.documents import split_job
from . import confidence
from .evaluate import ANSWERS, DIGITS, ComputeConfig, Evaluation, MeasureConfig, check, evaluate
from .job_score import check_target, job_score, write_score
from .jobs import JobResult, misses_page
from .perplexity import Perplexity
from .quality.contract import contract
from .scoring import is_checkpoint, mean_and_error
from .tasks import TaskResult

MOST_FUNCTIONS = 40
"""Functions of a job with a row in the table, the most frequent ones."""


@dataclass(frozen=True)
class EvalConfig:
    """Options of `efficientllm-eval`."""

    measures: MeasureConfig = field(default_factory=MeasureConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)


def paired_difference(first: TaskResult, other: TaskResult) -> tuple[float, float, int]:
    """Return the mean of other - first over the n documents that both have, its standard error, and n."""
    before = dict(zip(first.documents, first.values[first.metric], strict=True))
    after = dict(zip(other.documents, other.values[other.metric], strict=True))
    differences = [after[document] - before[document] for document in after if document in before]
    if not differences:
        return math.nan, math.nan, 0
    return *mean_and_error(differences), len(differences)


def rows(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    """Return a header and a row for each measure. Columns after the first model also show the change from it."""
    first = evaluations[0]
    table = [["measure", "size", *[_name(evaluation) for evaluation in evaluations]]]
    table += _quality_rows(evaluations)
    for name, value in first.perplexity.items():
        cells = [_perplexity(evaluation.perplexity[name]) for evaluation in evaluations]
        table.append([f"perplexity, {name}", f"{value.tokens} tokens of {value.documents}{value.behind}", *cells])
    for name, result in first.tasks.items():
        cells = [_score(result.mean(), result.stderr())]
        for evaluation in evaluations[1:]:
            other = evaluation.tasks[name]
            difference, error, _ = paired_difference(result, other)
            cells.append(f"{_score(other.mean(), other.stderr())} ({difference:+.3f} ± {error:.3f})")
        table.append([f"{name} ({result.metric})", f"{len(result.documents)} documents", *cells])
    table += _job_rows(evaluations)
    if len(first.tasks) > 1:
        averages = [statistics.fmean(r.mean() for r in evaluation.tasks.values()) for evaluation in evaluations]
        table.append(["average of tasks", "", *[f"{average:.3f}" for average in averages]])
    return table


def _quality_rows(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    """Return rows of the first model's quality and that of the others with their ratio to it."""
    reference = evaluations[0].quality
    if reference is None:
        return []
    qualities = [each.quality for each in evaluations if each.quality is not None]
    columns = [contract(each, reference, _name(evaluations[0])) for each in qualities]
    table: list[list[str]] = []
    bits = [each.bits_per_byte for each in qualities]
    is_single = len(bits) == 1 and math.isfinite(bits[0])
    # with other tokens than the first model's, perplexities are per token of the first
    shows_bits = is_single or any("bits_per_byte" in column for column in columns)
    for kind in columns[0]["texts"]:
        size = f"{len(reference.texts[kind])} documents" if kind in reference.texts else ""
        cells = [_with_ratio(column["texts"][kind]) for column in columns]
        cells = with_bits(cells, bits) if shows_bits and kind == ALL_TEXTS else cells
        table.append([f"perplexity, {kind}", size, *cells])
    if all("chat_answers" in column for column in columns):
        size = f"{len(reference.chat_answers)} answers"
        table.append(["perplexity, chat answers", size, *[_with_ratio(column["chat_answers"]) for column in columns]])
        first, *others = [column["end_of_turn"] for column in columns]
        cells = [f"{first['nats']:.2f}"]
        cells += [f"{end['nats']:.2f} ({end['difference']:+.2f} ± {end['difference_stderr']:.2f})" for end in others]
        table.append(["end of the turn, nats", size, *cells])
    if all("questions" in column for column in columns):
        first, *others = [column["questions"] for column in columns]
        cells = [str(first["right"])]
        name = _name(evaluations[0])
        cells += [f"{each['kept']} of {name}'s {each['reference']}, {each['right']} in all" for each in others]
        table.append(["questions answered right", f"{first['asked']} questions", *cells])
    return table


def _job_rows(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    """Return a row per value of a job's metric, with paired differences from the first model, and answer lengths."""
    jobs = [each.job for each in evaluations if each.job is not None]
    if not jobs:
        return []
    first, *others = jobs
    table = []
    for name, values in first.values.items():
        if all(map(math.isnan, values)):  # such as refusals in a job without any
            continue
        size = f"{sum(not math.isnan(value) for value in values)} examples"
        cells = [_score(first.mean(name), first.stderr(name))]
        for other in others:
            difference, error = first.difference(other, name)
            cells.append(f"{_score(other.mean(name), other.stderr(name))} ({difference:+.3f} ± {error:.3f})")
        table.append([f"job, {name}", size, *cells])
    table += [[f"job, {name}", "", *[f"{job.whole[name]:.3f}" for job in jobs]] for name in first.whole]
    counts = Counter(first.functions).most_common(MOST_FUNCTIONS)
    for function, count in counts if len(counts) > 1 else ():
        cells = [f"{_mean_of(job, function):.3f}" for job in jobs]
        table.append([f"job, {first.score_name} of {function}", f"{count} examples", *cells])
    table += confidence.rows(jobs)
    table.append(["tokens per answer", "", *[f"{job.tokens_per_answer:.1f}" for job in jobs]])
    table.append(["ms per answer", "", *[f"{job.ms_per_answer:.0f}" for job in jobs]])
    return table


def _mean_of(job: JobResult, function: str) -> float:
    """Return the mean score of the examples that expect `function`."""
    scores = zip(job.functions, job.values[job.score_name], strict=True)
    return statistics.fmean(score for each, score in scores if each == function)


def _name(evaluation: Evaluation) -> str:
    path = Path(evaluation.model)
    if path.name == "model":  # of a run, whose own name tells it from others
        path = path.parent
    return path.name or evaluation.model


def _score(mean: float, stderr: float) -> str:
    return f"{mean:.3f} ± {stderr:.3f}" if math.isfinite(stderr) else f"{mean:.3f}"


def _perplexity(found: Perplexity) -> str:
    error = f" ± {found.stderr:.2f}" if math.isfinite(found.stderr) else ""
    return f"{found.perplexity:.2f}{error} ({found.bits_per_byte:.4f} bits/byte)"


def _with_ratio(found: Mapping[str, float]) -> str:
    ratio = "" if found["ratio"] == 1.0 else f" (x{found['ratio']:.3f} ± {found['ratio_stderr']:.3f})"
    return f"{found['perplexity']:.2f}{ratio}"


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """Return the table in Markdown with a line that explains ± and brackets."""
    note = "± is one standard error"
    if len(evaluations) > 1:
        note += f"; in brackets the change from {_name(evaluations[0])}, paired document by document"
    return f"{markdown_table(rows(evaluations))}\n\n{note}.\n"


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        EvalConfig,
        prog="efficientllm-eval",
        examples=("eval small-gguf --compare runs/small", "eval job --task test.jsonl --metric call"),
        description="Measure perplexity, zero-shot accuracy or a job of a model folder or an exported artefact.",
    )
    parser.add_argument(
        "model", help="Hugging Face folder, folder written by efficientllm-export, a .gguf file, or demo"
    )
    parser.add_argument("--compare", nargs="+", default=[], metavar="MODEL", help="models to compare with the first")
    parser.add_argument(
        "--output",
        default="build/eval",
        metavar="FOLDER",
        help="folder for results.json, results.md and the cache of an interrupted evaluation [build/eval]",
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="store the score of --task in the model's folder: in its card, and in the manifest of an artefact. With "
        "--compare, the first model is the source, and the others store their scores beside its",
    )
    return parser


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    models = [arguments.pop("model"), *arguments.pop("compare")]
    output = Path(arguments.pop("output"))
    config = flags.take(arguments, EvalConfig)
    store = arguments.pop("write")
    if store and not config.measures.task:
        raise UsageError("--write stores the score of a job; give --task")
    twice = next((model for model in models if models.count(model) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} is given twice; name each model once")
    check_place(output, is_renamed=False)
    check(config.measures)
    paths = {model: source_path(model) for model in models}
    for model, path in paths.items():
        if not path.exists():
            remedy = f"; download it first: hf download {model} --local-dir {path.name}" if may_be_hub_id(model) else ""
            raise UsageError(f"{model}: no such folder or file, and not demo, the built-in model{remedy}")
        if not is_checkpoint(path):
            names = Artefact.open(path).job_names  # ArtefactError now, and not after the models before it
            job = split_job(config.measures.task, "--task")[1]
            if names and job not in ("", *names):
                raise UsageError(f"--task: {model} has no job {job}; its jobs are {', '.join(names)}")
    # with --compare the first model is the source, whose folder gets no score
    first_written = 1 if len(paths) > 1 else 0
    written = list(paths.values())[first_written:] if store else []
    for path in written:  # before the hours of an evaluation
        check_target(path)
    with locked_output(output):
        output.mkdir(parents=True, exist_ok=True)
        evaluations: list[Evaluation] = []
        with ProgressDisplay() as display:
            for model, path in paths.items():
                prefix = f"{Path(model).name}: " if len(models) > 1 else ""

                def report(name: str, done: int, total: int, prefix: str = prefix) -> None:
                    display.update(f"{prefix}{name}", done, total)

                evaluations.append(evaluate(path, config.measures, config.compute, output, report))
                results = {"schema_version": 1, "evaluations": [each.to_dict() for each in evaluations]}
                write_json_atomically(output / "results.json", results)  # after each model: a later one may fail
        write_text_atomically(output / "results.md", markdown(evaluations))
        pages: list[Path] = []
        for number, each in enumerate(evaluations, 1):
            if each.job is not None:
                pages.append(output / f"misses-{number}-{_name(each)}.md")
                write_text_atomically(pages[-1], misses_page(_name(each), config.measures.examples, each.job))
        for each in evaluations:  # a later evaluation measures times anew
            for answers in output.glob(f"{each.fingerprint[:DIGITS]}-*{ANSWERS}"):
                answers.unlink()
        for path, each in zip(written, evaluations[first_written:], strict=store):
            source = evaluations[0] if each is not evaluations[0] else None
            write_score(path, job_score(each, source, config.measures, config.compute))
    print_rows(rows(evaluations), narrow_width=140)
    print(f"\nresults: {output / 'results.json'}")
    for page in pages:
        print(f"misses: {page}")
    return 0
