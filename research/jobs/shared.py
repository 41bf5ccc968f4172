"""Write a public job as training and test chats: CLINC150, SGD calls, WikiSQL or E2E.

    python -m research.jobs.shared FOLDER NAME OUTPUT --train 3000 --test 1000

FOLDER holds NAME_train.jsonl.gz and NAME_test.jsonl.gz, and OUTPUT gets train.jsonl and test.jsonl. Each line is a
chat. Rows are shuffled, because some files are sorted by label. Training rows whose request is in the test are left
out. Answers of SGD that are calls as JSON text become `tool_calls`, the form of a served call, and only they are
learned: the earlier answers of a dialogue get a weight of 0.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from efficientllm.train.data.chat import Chat
from efficientllm.train.data.check import request_of

Row = dict[str, Any]
NAMES = ("clinc150", "sgd_calls", "wikisql", "e2e")


def read_rows(folder: Path, name: str, part: str) -> Iterator[Row]:
    """Yield the rows of a part of a job, with calls as `tool_calls`."""
    with gzip.open(folder / f"{name}_{part}.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield with_call(row) if row.get("tools") else row


def with_call(row: Row) -> Row:
    """Return a row whose last answer is a call in OpenAI's form, and whose earlier answers are not learned."""
    *earlier, last = row["messages"]
    call = json.loads(last["content"])
    function = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    calls = [{"id": "call_0", "type": "function", "function": function}]
    read = [{**each, "weight": 0} if each["role"] == "assistant" else each for each in earlier]
    return {**row, "messages": [*read, {"role": "assistant", "content": None, "tool_calls": calls}]}


def _request(row: Row) -> str:
    return request_of(Chat(tuple(row["messages"])))


def write_job(folder: Path, name: str, output: Path, train: int, test: int, seed: int) -> None:
    """Write at most `train` and `test` rows of a job (0: all)."""
    held_out = list(read_rows(folder, name, "test"))
    requests = {_request(row) for row in held_out}
    learned = [row for row in read_rows(folder, name, "train") if _request(row) not in requests]
    output.mkdir(parents=True, exist_ok=True)
    for part, rows, limit in (("train", learned, train), ("test", held_out, test)):
        random.Random(f"{name} {part} {seed}").shuffle(rows)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows[: limit or None])
        (output / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Write a job into a folder."""
    parser = argparse.ArgumentParser(description="Write a public job as training and test chats.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("output", type=Path)
    parser.add_argument("--train", type=int, default=0, help="rows to train on [0: all]")
    parser.add_argument("--test", type=int, default=0, help="rows of the test [0: all]")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    values = parser.parse_args()
    write_job(values.folder, values.name, values.output, values.train, values.test, values.seed)


if __name__ == "__main__":
    main()
