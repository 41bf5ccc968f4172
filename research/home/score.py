"""Score a model on held-out homes, by what its calls would change and by what it says.

    python -m research.home.score build/quickstart/home --conversations 500 --output build/quickstart/scores

The command serves the artefact and talks to the server as Home Assistant's Ollama integration does: it sends the system
message, the tools and the results, up to ten rounds a request. A request is right if its calls have exactly the effects
of the right calls and, where nothing shall change, if its answer is the right one. A call that fits no device fails, as
in Home Assistant.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from efficientllm.runtime.base.files import write_text_atomically
from efficientllm.runtime.base.quantities import markdown_table

from .chats import held_out_conversations
from .client import Client, served
from .homes import Home, script_tool
from .requests import DONE_RESULT, ERRORS, FAILED, SAFETY, Call, Turn

MAX_ROUNDS = 10
"""Answers with calls that Home Assistant accepts for one request."""

READING = ("GetLiveContext", "GetDateTime", "todo_get_items", "calendar_get_events")
"""Tools that change nothing."""

Effect = tuple[str, str, str]
"""Tool, device, and the other arguments as JSON."""


@dataclass
class Outcome:
    """Result of a request."""

    kind: str
    request: str
    expected: str
    answer: str
    effects: set[Effect]
    wanted: set[Effect]
    calls: list[Call] = field(default_factory=list)
    repeats: int = 0
    """Calls that failed and were made again."""
    is_answered: bool = False
    """True if the answer is the right one."""
    refusal: str = ""
    """Error of the server, for example that the conversation fills the context."""
    seconds: list[float] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        return self.effects == self.wanted and (bool(self.wanted) or self.is_answered)

    @property
    def is_wrong_act(self) -> bool:
        """Return True if something changes that nobody asked for."""
        return bool(self.effects - self.wanted)


def effects_of(call: Call, home: Home) -> set[Effect] | None:
    """Return what a call changes. None: it fits no device, or lacks what it needs."""
    name, arguments = call
    if name in [script_tool(each) for each in home.scripts]:
        return {(name, "", "")}
    values = {key: value for key, value in arguments.items() if key not in ("name", "area", "floor", "domain")}
    domains = arguments.get("domain") or []
    domains = [domains] if isinstance(domains, str) else domains
    wanted, area = str(arguments.get("name", "")).lower(), str(arguments.get("area", "")).lower()
    found = [
        entity
        for entity in home.entities
        if (not wanted or wanted in [each.lower() for each in (entity.name, *entity.aliases)])
        and (not area or area == entity.area.lower())
        and (not domains or entity.domain in domains)
    ]
    if not found or not (wanted or area or domains):
        return None
    text = json.dumps(values, sort_keys=True)
    return {(name, entity.name, text) for entity in found}


def converse(client: Client, home: Home, turns: Sequence[Turn]) -> Iterator[Outcome]:
    """Hold a conversation and yield the outcome of each request."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": home.prompt()}]
    tools = home.all_tools()
    for turn in turns:
        messages.append({"role": "user", "content": turn.request})
        wanted = [effects_of(call, home) or set() for call in turn.calls if call[0] not in READING]
        is_failing = turn.kind == "fails"
        outcome = Outcome(turn.kind, turn.request, turn.answer, "", set(), set().union(*wanted))
        failed: list[Call] = []
        for _ in range(MAX_ROUNDS):
            try:
                answer, seconds = client.answer(messages, tools)
            except RuntimeError as error:
                outcome.refusal = str(error)
                break
            outcome.seconds.append(seconds)
            calls = [
                (each["function"]["name"], each["function"]["arguments"]) for each in answer.get("tool_calls") or ()
            ]
            messages.append(
                {"role": "assistant", **{key: answer[key] for key in ("content", "tool_calls") if answer.get(key)}}
            )
            messages[-1].setdefault("content", "")
            if not calls:
                break
            for call in calls:
                outcome.repeats += call in failed
                outcome.calls.append(call)
                result = _result(call, home, turn, outcome, is_failing)
                if '"error"' in result:
                    failed.append(call)
                messages.append({"role": "tool", "content": result})
        outcome.answer = outcome.refusal or str(messages[-1]["content"])
        expected = FAILED if is_failing else turn.answer
        outcome.is_answered = _plain(outcome.answer) == _plain(expected)
        yield outcome


def _result(call: Call, home: Home, turn: Turn, outcome: Outcome, is_failing: bool) -> str:
    """Return what Home Assistant would answer to a call, and note what the call changes."""
    name = call[0]
    if name == "GetLiveContext":
        return home.live_context()
    if name in READING:
        right = [result for each, result in zip(turn.calls, turn.results, strict=True) if each[0] == name]
        return right[0] if right else ERRORS[0]
    effects = effects_of(call, home)
    if effects is None:
        return ERRORS[0]
    outcome.effects |= effects
    return ERRORS[0] if is_failing else DONE_RESULT


def _plain(text: str) -> str:
    return " ".join(text.lower().replace(".", " ").replace(",", " ").split())


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a row for each kind of request, and one for all."""
    kinds: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        kinds[outcome.kind].append(outcome)
    rows = [["requests", "number", "right", "right answer", "wrong acts"]]
    for kind, found in [*sorted(kinds.items()), ("all", list(outcomes))]:
        right = sum(each.is_right for each in found) / len(found)
        error = (right * (1 - right) / len(found)) ** 0.5
        answered = sum(each.is_answered for each in found) / len(found)
        wrong = sum(each.is_wrong_act for each in found)
        rows.append([kind, str(len(found)), f"{right:.3f} ± {error:.3f}", f"{answered:.3f}", str(wrong)])
    return markdown_table(rows)


def main() -> None:
    """Print the table, the repeated failures, the time of an answer and the memory of the server."""
    parser = argparse.ArgumentParser(description="Score a model on held-out homes.")
    parser.add_argument("artefact", type=Path)
    parser.add_argument("--conversations", type=int, default=500, help="[500]")
    parser.add_argument("--safety", type=int, default=0, help="requests after which nothing may change [0]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the test [0]")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="more flags of efficientllm-serve")
    parser.add_argument("--output", type=Path, help="folder for NAME.json, with every wrong request")
    options = parser.parse_args()
    drawn = [*held_out_conversations(options.conversations, options.seed)]
    drawn += held_out_conversations(options.safety, options.seed, SAFETY)
    with served(options.artefact, options.serve) as client:
        outcomes = [outcome for home, turns in drawn for outcome in converse(client, home, turns)]
        peak = client.peak_bytes()
    right = sum(each.is_right for each in outcomes) / len(outcomes)
    seconds = statistics.median([second for each in outcomes for second in each.seconds] or [0.0])
    repeats = sum(each.repeats for each in outcomes)
    print(table(outcomes))
    print(f"failed calls that were repeated: {repeats}")
    refused = [each.refusal for each in outcomes if each.refusal]
    print(f"requests that the server refused: {len(refused)}", *refused[:1], sep="\n")
    print(f"an answer of the server: {1e3 * seconds:.0f} ms (median); its memory: at most {peak / 1e6:.0f} MB")
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        misses = [asdict(each) for each in outcomes if not each.is_right]
        values = {"right": right, "requests": len(outcomes), "ms": 1e3 * seconds, "peak_bytes": peak, "misses": misses}
        text = json.dumps(values, indent=1, default=sorted, ensure_ascii=False)
        write_text_atomically(options.output / f"{options.artefact.name}.json", text + "\n")


if __name__ == "__main__":
    main()
