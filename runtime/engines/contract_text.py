"""Format the quality contract and the scores of jobs, which manifests and model folders contain.

`train/evaluation` measures both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..base.quantities import markdown_table

ALL_TEXTS = "all texts"
"""Name of the geometric mean over the kinds of text, each with the same weight."""


def contract_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the contract as a table, with a header and a row for each figure."""
    rows = [["quality", "source", "this model", "ratio"]]
    bits = found.get("bits_per_byte")  # of models with different vocabularies
    for kind, each in found["texts"].items():
        cells = _cells(each)
        if bits and kind == ALL_TEXTS:
            cells[:2] = with_bits(cells[:2], [bits["reference"], bits["bits_per_byte"]])
        rows.append([f"perplexity{' per token of the source' if bits else ''}, {kind}", *cells])
    if "chat_answers" in found:
        rows.append(["perplexity, chat answers", *_cells(found["chat_answers"])])
        end = found["end_of_turn"]
        change = f"{end['difference']:+.2f} ± {end['difference_stderr']:.2f} nats"
        rows.append(["end of the turn, nats", f"{end['reference']:.2f}", f"{end['nats']:.2f}", change])
    if "questions" in found:
        asked = found["questions"]
        kept = f"{asked['kept']} of the source's {asked['reference']}"
        others = f"and {asked['right'] - asked['kept']} others"
        rows.append([f"right of {asked['asked']} questions", str(asked["reference"]), kept, others])
    return rows


JOBS_START, JOBS_END = "<!-- scores of jobs -->", "<!-- end of the scores of jobs -->"
"""Lines of a model card around the scores of jobs, which a later evaluation replaces."""


def with_error(figure: str, error: float | None) -> str:
    """Return a figure with its standard error, if that is known."""
    return figure if error is None else f"{figure} ± {error:.3f}"


def job_rows(scores: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the scores of jobs (train.evaluation.job_score) as a table, with a header and a row for each."""
    rows = [["job", "metric", "examples", "score", "source", "ms an answer", "tokens an answer", "measured on"]]
    for each in scores:
        score = each["values"][each["score"]]
        source, limit = each["source"], each["constrain"]
        metric = each["metric"] + ("" if limit == "none" else f", {limit}")
        change = with_error(f"{source['difference']:+.3f}", source["difference_stderr"]) if source else ""
        rows.append(
            [
                f"{each['task']}{'@' if each.get('job') else ''}{each.get('job', '')} ({each['task_sha256'][:12]})",
                f"{metric}: {each['score']}",
                str(each["examples"]),
                with_error(f"{score['mean']:.3f}", score["stderr"]),
                f"{source['mean']:.3f} ({change})" if source else "unknown",
                f"{each['ms_per_answer']:.0f}",
                f"{each['tokens_per_answer']:.1f}",
                each["measured_on"],
            ]
        )
    return rows


JOBS_NOTE = (
    "Each job is named by its file of examples and the start of that file's SHA-256. ± is one standard error over "
    "examples. In brackets: the change from the source, paired."
)


def jobs_section(scores: Sequence[Mapping[str, Any]]) -> str:
    """Return the lines of a model card with the scores of jobs, between JOBS_START and JOBS_END."""
    text = f"## Jobs\n\n{markdown_table(job_rows(scores))}\n\n{JOBS_NOTE}\n\n" if scores else ""
    return f"{JOBS_START}\n{text}{JOBS_END}"


def with_jobs(card: str, scores: Sequence[Mapping[str, Any]]) -> str:
    """Return a model card with other scores of jobs. A card without JOBS_START is returned as it is."""
    before, start, rest = card.partition(JOBS_START)
    _, end, after = rest.partition(JOBS_END)
    return before + jobs_section(scores) + after if start and end else card


def with_bits(perplexities: Sequence[str], bits: Sequence[float]) -> list[str]:
    """Return perplexities with the bits per byte beside them, which compare models of different vocabularies."""
    return [f"{shown} ({each:.4f} bits per byte)" for shown, each in zip(perplexities, bits, strict=True)]


def _cells(each: Mapping[str, float]) -> list[str]:
    ratio = f"{each['ratio']:.3f} ± {each['ratio_stderr']:.3f}"
    return [f"{each['reference']:.2f}", f"{each['perplexity']:.2f}", ratio]


def one_line(found: Mapping[str, Any]) -> str:
    """Return the contract as a sentence."""
    every = found["texts"][ALL_TEXTS]
    parts = [f"perplexity x{every['ratio']:.2f} over {len(found['texts']) - 1} kinds of text"]
    if "chat_answers" in found:
        parts.append(f"x{found['chat_answers']['ratio']:.2f} on chat answers")
    if "questions" in found and found["questions"]["reference"]:
        parts.append(f"{found['questions']['kept']} of {found['questions']['reference']} questions still right")
    return ", ".join(parts)
