from __future__ import annotations

import functools
import gzip
import itertools
import json
import re
import threading
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from efficientllm.runtime.base.errors import DataError, UsageError
from efficientllm.runtime.base.quantities import format_count
from efficientllm.train.checkpoint.state import as_arrays, as_tensors
from efficientllm.train.config.sections import SourceConfig
from efficientllm.train.data import packing
from efficientllm.train.data.chat import Encoder, tokenize
from efficientllm.train.data.documents import DataSpec, check_held_out, is_held_out, open_documents, open_texts, text_of
from efficientllm.train.data.packing import LANES, ORDER, PackedStream, PrefetchedStream, held_out_windows
from efficientllm.train.loop.run_text import RunText

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


def test_txt_is_cut_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    paragraph = "word " * 200
    path.write_text(f"{paragraph}\n\n" * 20)
    documents = list(open_texts(DataSpec(str(path))))
    assert len(documents) > 1
    assert "".join(documents) == path.read_text()
    assert all(document.endswith("\n\n") for document in documents)


@pytest.mark.parametrize(("name", "message"), [("nowhere", "no such file"), ("a.docx", "unknown file type")])
def test_unknown_paths(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("text\n")
    with pytest.raises(UsageError, match=message):
        open_documents(DataSpec(str(tmp_path / name)))


def test_weights_are_parsed() -> None:
    assert DataSpec.parse("a.jsonl.gz:0.7") == DataSpec("a.jsonl.gz", 0.7)
    assert DataSpec.parse("owner/name@config") == DataSpec("owner/name@config", 1.0)
    with pytest.raises(UsageError, match="the weight must be positive"):
        DataSpec.parse("a.txt:0")


STREAMS = (PackedStream, PrefetchedStream, PrefetchedStream)


def stream(corpus: Path, tokenizer: Any, seed: int = 0, specs: list[DataSpec] | None = None) -> PackedStream:
    return PackedStream(specs or [DataSpec(str(corpus))], tokenizer, 16, 0.2, seed)


def test_windows_of_a_lane_are_its_documents_end_to_end(corpus: Path, tokenizer: Any) -> None:
    packed = stream(corpus, tokenizer)
    windows = packed.next_windows(40 * LANES)
    assert windows.shape == (40 * LANES, 17)
    known = {text for text in open_documents(DataSpec(str(corpus))) if not is_held_out(text, 0.2)}
    count = len(packed.corpora[0].buffers)
    assert count == LANES
    # a window begins with the token that another one ends with: follow one lane from its first window
    rng_order = [packed.corpora[0]._random(ORDER, visit).permutation(count) for visit in range(40)]
    lane = [windows[visit * count + int(np.flatnonzero(rng_order[visit] == 5)[0])] for visit in range(40)]
    assert all(one[-1] == other[0] for one, other in itertools.pairwise(lane))
    texts = tokenizer.decode(np.concatenate([lane[0], *[window[1:] for window in lane[1:]]])).split("<|endoftext|>")
    assert len(texts) > 5
    assert all(text in known for text in texts[2:-1])  # the first one is begun in its middle


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
    state = as_arrays(as_tensors(whole.state()))
    whole.next_windows(3)
    whole.load_state(state)
    resumed = stream(corpus, tokenizer)
    resumed.load_state(state)
    assert np.array_equal(resumed.next_windows(60), whole.next_windows(60))


@pytest.mark.parametrize("taken", [1, 37, 400])
def test_windows_that_are_read_ahead_equal_those_of_the_stream(
    taken: int, corpus: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for other numbers of windows, where a run resumes, and with another tokenizer."""
    monkeypatch.setattr(packing, "SHUFFLE_BLOCK", 50)
    plain, ahead, resumed = (kind([DataSpec(str(corpus))], tokenizer, 16, 0.2, 0) for kind in STREAMS)
    for count in (3, taken, taken):
        assert np.array_equal(ahead.next_windows(count), plain.next_windows(count))
    resumed.next_windows(2)
    resumed.load_state(as_arrays(as_tensors(ahead.state())))
    following = plain.next_windows(9)
    assert np.array_equal(resumed.next_windows(9), following)
    assert np.array_equal(ahead.next_windows(9), following)
    for each in (plain, ahead):
        each.switch_tokenizer(tokenizer)
    assert np.array_equal(ahead.next_windows(60), plain.next_windows(60))


def test_an_error_of_text_that_is_read_ahead_comes_with_its_windows(
    corpus: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, ahead, _ = (kind([DataSpec(str(corpus))], tokenizer, 16, 0.2, 0) for kind in STREAMS)
    next_corpus, threads = PackedStream._next_corpus, list[int]()

    def refuse_the_sixth(self: PackedStream) -> Any:
        threads.append(threading.get_ident())
        if len(threads) == 6:
            raise DataError("line 7 cannot be read")
        return next_corpus(self)

    with monkeypatch.context() as patch:
        patch.setattr(PackedStream, "_next_corpus", refuse_the_sixth)
        ahead.next_windows(3)
        position = ahead.state()
        with pytest.raises(DataError, match="line 7"):
            ahead.next_windows(3)
    assert len(set(threads)) == 2
    ahead.load_state(position)
    plain.next_windows(3)
    assert np.array_equal(ahead.next_windows(3), plain.next_windows(3))


def test_epochs_are_shuffled_differently_and_complete(corpus: Path, tokenizer: Any) -> None:
    source = stream(corpus, tokenizer).corpora[0].documents
    count = sum(not is_held_out(text, 0.2) for text in open_documents(source.spec))
    epochs = []
    for _ in range(2):
        texts: list[str] = []
        while len(texts) < count:
            texts += map(text_of, source.next_documents(7))
        epochs.append(texts)
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


def test_every_stretch_of_windows_has_the_shares_of_its_sources(
    corpus: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = (5.0, 3.0, 2.0)
    paths = [corpus, *(write(tmp_path / name) for name in ("b.jsonl", "c.jsonl"))]
    mixed = stream(corpus, tokenizer, specs=[DataSpec(str(path), w) for path, w in zip(paths, weights, strict=True)])
    order = []
    for _ in range(400):
        source = mixed._next_corpus()
        source.next_window()
        order.append(mixed.corpora.index(source))
    for start in range(0, 400 - 64):
        for index, weight in enumerate(weights):
            assert abs(order[start : start + 64].count(index) - 64 * weight / 10) <= 2


def long_documents(path: Path, count: int, words: int) -> Path:
    rows = [{"text": " ".join(f"word{index}of{number}" for index in range(words))} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_neighbouring_windows_come_from_as_many_documents_as_there_are_lanes(tokenizer: Any, tmp_path: Path) -> None:
    """However long the documents are."""
    path = long_documents(tmp_path / "long.jsonl", 200, 400)
    packed = PackedStream([DataSpec(str(path))], tokenizer, 64, 0.05, 0)
    texts: list[str] = []
    for _ in range(3):
        texts = [tokenizer.decode(window) for window in packed.next_windows(LANES)]
        documents = [set(re.findall(r"of(\d+) ", text)) for text in texts]
        assert len(set.union(*documents)) >= LANES
    assert not all(re.match(r"word0of", text) for text in texts)


def test_a_small_corpus_is_read_through_before_anything_comes_again(corpus: Path, tokenizer: Any) -> None:
    packed = stream(corpus, tokenizer)
    trained = [text for text in open_texts(DataSpec(str(corpus))) if not is_held_out(text, 0.2)]
    total = sum(len(ids) + 1 for ids in tokenize(tokenizer, trained))
    packed.next_windows(total // 16 // 2)
    assert packed.corpora[0].documents.state.epoch == 0


DATA = Path(__file__).parents[2] / "shared" / "data" / "text"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="no shared/data beside the project")
def test_the_first_thirty_thousand_tokens_of_real_corpora_are_stirred(tokenizer: Any) -> None:
    """The setting of the study: three corpora, documents of up to tens of thousands of tokens."""
    names = {"wikipedia_featured_good": 0.5, "openstax_ccby": 0.3, "web_c4": 0.2}
    specs = [DataSpec(str(DATA / f"{name}.jsonl.gz"), weight) for name, weight in names.items()]
    packed = PackedStream(specs, tokenizer, 256, 0.05, 0)
    packed.next_windows(120)
    shares = [source.drawn for source in packed.corpora]
    assert shares == [60, 36, 24]
    begun = [len([each for each in source.buffers if len(each)]) for source in packed.corpora]
    assert sum(begun) >= 110


def test_held_out_windows_share_nothing_with_training(corpus: Path, tokenizer: Any) -> None:
    windows = held_out_windows([DataSpec(str(corpus))], tokenizer, 16, 0.2, 160)
    assert windows.shape == (10, 17)
    assert len({tuple(window) for window in windows}) == 10
    held = tokenizer.decode(windows.flatten())
    trained = [text for text in open_documents(DataSpec(str(corpus))) if not is_held_out(text, 0.2)]
    assert not any(text in held for text in trained)


def test_short_data_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="less than one sequence of 4096"):
        PackedStream([DataSpec(str(path))], tokenizer, 4096, 0.2, 0).check()
    with pytest.raises(DataError, match="holds back no text; give more documents"):
        held_out_windows([DataSpec(str(path))], tokenizer, 4096, 1e-9, 100)


def test_few_documents_without_held_out_text_are_refused_before_loading(tmp_path: Path) -> None:
    spec = DataSpec(str(write(tmp_path / "a.jsonl")))
    check_held_out(spec, 0.999)
    with pytest.raises(
        DataError, match=r"--data .*a\.jsonl: holds back no text; give more documents or a larger --held-out-fr"
    ):
        check_held_out(spec, 1e-9)


def test_a_held_out_part_that_fills_no_window_ends_in_tokens_that_are_not_predicted(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = write(tmp_path / "a.jsonl")
    (window,) = held_out_windows([DataSpec(str(path))], tokenizer, 4096, 0.2, 100)
    held = "".join(str(text) for text in open_documents(DataSpec(str(path))) if is_held_out(text, 0.2))
    assert len(window) == 4097
    assert set(window[window < 0]) == {~tokenizer.convert_tokens_to_ids("<|endoftext|>")}
    assert tokenizer.decode(window[window >= 0]).replace("<|endoftext|>", "") == held


def test_a_hub_dataset_is_continued_without_the_files_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The place is in the last of four files. Nobody can read the second one any more."""
    files = [str(write(tmp_path / f"{number}.parquet")) for number in range(4)]
    load = datasets.load_dataset
    opened = functools.partial(load, "parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.load_dataset", lambda path, config, **options: opened(**options))
    monkeypatch.setattr(packing, "SHUFFLE_BLOCK", 8)
    first, second = (packing.ShuffledDocuments(DataSpec("owner/name"), 0.2, 5, 0) for _ in range(2))
    while first.state.hub.get("rows", 0) <= 90:
        first.next_documents(3)
    state = as_arrays(as_tensors(vars(first.state).copy()))
    Path(files[1]).write_bytes(b"")
    second.seek(packing.CorpusPosition(**state))
    for _ in range(3):
        assert second.next_documents(3) == first.next_documents(3)


def test_run_counts_the_documents_that_it_reads(corpus: Path, tokenizer: Any) -> None:
    settings = SourceConfig(sequence_length=32, held_out_fraction=0.2, eval_tokens=256)
    text = RunText([DataSpec(str(corpus)), DataSpec(str(corpus), 3.0)], tokenizer, settings, 0, 1)
    documents = list(open_documents(DataSpec(str(corpus))))
    tokens = sum(map(len, Encoder(tokenizer).encode(documents)))
    part, whole = text.reading_lines(2 * tokens)
    assert text.reading_lines(396 * tokens)[0].endswith(" 99 passes")
    needed = format_count(4 * tokens)
    assert part == f"{corpus.name}: about 100 of 200 documents are read, 0.5 passes; --tokens {needed} is one pass"
    assert whole == f"{corpus.name}: 200 documents are read, 1.5 passes"
