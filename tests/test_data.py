from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from efficientllm.runtime.base.errors import DataError, UsageError
from efficientllm.train.data import packing
from efficientllm.train.data.documents import DataSpec, is_held_out, open_documents
from efficientllm.train.data.packing import PackedStream, held_out_windows

TEXTS = [f"text number {index}, with a few words" for index in range(30)]


def write(path: Path) -> Path:
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(rows.encode()))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"id": list(range(30)), "text": TEXTS}), path)
    else:
        path.write_text(rows)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_formats_give_the_same_documents(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name)
    assert list(open_documents(DataSpec(str(path)))) == TEXTS
    assert list(open_documents(DataSpec(str(tmp_path)))) == TEXTS


def test_txt_is_cut_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    paragraph = "word " * 200
    path.write_text(f"{paragraph}\n\n" * 20)
    documents = list(open_documents(DataSpec(str(path))))
    assert len(documents) > 1
    assert "".join(documents) == path.read_text()
    assert all(document.endswith("\n\n") for document in documents)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("not json\n", "a.jsonl", "line 1 is not a JSON object"),
        ('{"body": "x"}\n', "a.jsonl", 'line 1 is not a JSON object with a "text" field'),
        ('{"text": 3}\n', "a.jsonl", 'the "text" of line 1 is not a string'),
        ("plain", "a.jsonl.gz", "not a whole gzip file"),
        ("plain", "a.parquet", "a.parquet"),
    ],
)
def test_malformed_files_name_the_place(content: str, name: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        list(open_documents(DataSpec(str(path))))


@pytest.mark.parametrize(("name", "message"), [("nowhere", "no such file"), ("a.csv", "unknown file type")])
def test_unknown_paths(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(UsageError, match=message):
        open_documents(DataSpec(str(tmp_path / name)))


def test_weights_are_parsed() -> None:
    assert DataSpec.parse("a.jsonl.gz:0.7") == DataSpec("a.jsonl.gz", 0.7)
    assert DataSpec.parse("owner/name@config") == DataSpec("owner/name@config", 1.0)
    with pytest.raises(UsageError, match="the weight must be positive"):
        DataSpec.parse("a.txt:0")


def stream(corpus: Path, tokenizer: Any, seed: int = 0, specs: list[DataSpec] | None = None) -> PackedStream:
    return PackedStream(specs or [DataSpec(str(corpus))], tokenizer, 16, 0.2, seed)


def test_windows_are_the_packed_documents(corpus: Path, tokenizer: Any) -> None:
    windows = stream(corpus, tokenizer).next_windows(40)
    assert windows.shape == (40, 17)
    assert np.array_equal(windows[1:, 0], windows[:-1, -1])
    flat = np.concatenate([windows[0], *[window[1:] for window in windows[1:]]])
    texts = tokenizer.decode(flat).split("<|endoftext|>")
    known = set(open_documents(DataSpec(str(corpus))))
    assert len(texts) > 5
    assert all(text in known for text in texts[:-1])
    assert not any(is_held_out(text, 0.2) for text in texts[:-1])


def test_order_depends_on_the_seed_alone(corpus: Path, tokenizer: Any) -> None:
    first = stream(corpus, tokenizer, seed=1).next_windows(30)
    assert np.array_equal(first, stream(corpus, tokenizer, seed=1).next_windows(30))
    assert not np.array_equal(first, stream(corpus, tokenizer, seed=2).next_windows(30))


@pytest.mark.parametrize("taken", [1, 37, 400, 2000])
def test_resumes_exactly(taken: int, corpus: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also across blocks and epochs: 400 windows are more than the corpus holds."""
    monkeypatch.setattr(packing, "SHUFFLE_BLOCK", 50)
    whole = stream(corpus, tokenizer)
    whole.next_windows(taken)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = stream(corpus, tokenizer)
    resumed.load_state_dict(state)
    assert np.array_equal(resumed.next_windows(60), whole.next_windows(60))


def test_epochs_are_shuffled_differently_and_complete(corpus: Path, tokenizer: Any) -> None:
    source = stream(corpus, tokenizer).sources[0]
    count = sum(not is_held_out(text, 0.2) for text in open_documents(source.spec))
    epochs = []
    for _ in range(2):
        texts: list[str] = []
        while len(texts) < count:
            texts += source.next_documents(7)
        epochs.append(texts)
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


def test_sources_are_mixed_by_tokens(corpus: Path, tokenizer: Any, tmp_path: Path) -> None:
    specs = [DataSpec(str(corpus), 3.0), DataSpec(str(write(tmp_path / "b.jsonl")), 1.0)]
    mixed = stream(corpus, tokenizer, specs=specs)
    mixed.next_windows(3000)
    first, second = (source.state.tokens for source in mixed.sources)
    assert first / second == pytest.approx(3.0, rel=0.05)


def test_held_out_windows_share_nothing_with_training(corpus: Path, tokenizer: Any) -> None:
    windows = held_out_windows([DataSpec(str(corpus))], tokenizer, 16, 0.2, 160)
    assert windows.shape == (10, 17)
    held = tokenizer.decode(windows.flatten())
    trained = [text for text in open_documents(DataSpec(str(corpus))) if not is_held_out(text, 0.2)]
    assert not any(text in held for text in trained)


def test_short_data_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="less than one sequence of 4096"):
        PackedStream([DataSpec(str(path))], tokenizer, 4096, 0.2, 0).check()
    with pytest.raises(DataError, match="held-out part has"):
        held_out_windows([DataSpec(str(path))], tokenizer, 4096, 0.2, 100)
