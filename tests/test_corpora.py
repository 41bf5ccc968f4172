"""Corpora as people have them: every format gives its texts, and whatever is none is one line that names it."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from training import command, run, without

from efficientllm.runtime.base.errors import DataError, UsageError
from efficientllm.train.data.documents import DataSpec, check_documents, open_documents

TEXTS = [f'text number {index}, "quoted",\nover two lines, \u00e9' for index in range(30)]
ROWS = [{"id": index, "body": text, "text": "other"} for index, text in enumerate(TEXTS)]


def json_lines() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd(content: bytes) -> bytes:
    """In two frames, as tools that write in blocks leave it."""
    half, whole = len(content) // 2, pyarrow.BufferOutputStream()
    for part in (content[:half], content[half:]):
        frame = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(frame, "zstd") as stream:
            stream.write(part)
        whole.write(frame.getvalue())
    return whole.getvalue().to_pybytes()


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as stream:  # as spreadsheets write it
        writer = csv.DictWriter(stream, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    columns = {"id": list(range(30)), "body": TEXTS, "text": ["other"] * 30}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


FORMATS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_bytes(json_lines()),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(json_lines())),
    "a.jsonl.zst": lambda path: path.write_bytes(zstd(json_lines())),  # Dolma
    "a.json": lambda path: path.write_text(json.dumps(ROWS)),
    "pretty.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(json_lines())),  # C4
    "a.json.zst": lambda path: path.write_bytes(zstd(json.dumps(ROWS).encode())),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + json_lines()),
    "a.csv": write_csv,
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_named_field(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path / name)
    for place in (tmp_path / name, tmp_path):
        spec = DataSpec.parse(f"{place}:0.5", text_field="body")
        check_documents(spec)
        assert list(open_documents(spec)) == TEXTS
        assert set(open_documents(DataSpec(str(place)))) == {"other"}


def test_one_object_is_one_document(tmp_path: Path) -> None:
    for indent in (None, 2):
        (tmp_path / f"{indent}.json").write_text(json.dumps({"text": TEXTS[0]}, indent=indent))
    assert list(open_documents(DataSpec(str(tmp_path)))) == [TEXTS[0]] * 2


def test_txt_is_decompressed_and_a_folder_mixes_formats(tmp_path: Path) -> None:
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"from gzip"))
    (tmp_path / "a.txt.zst").write_bytes(zstd(b"from zstd"))
    (tmp_path / "c.jsonl").write_text('{"text": "from JSON"}')
    (tmp_path / "notes.docx").write_text("not read")
    (tmp_path / "inner.json").mkdir()
    assert list(open_documents(DataSpec(str(tmp_path)))) == ["from zstd", "from gzip", "from JSON"]


def table(**columns: Any) -> Callable[[Path], None]:
    return lambda path: pyarrow.parquet.write_table(pyarrow.table(columns), path)


BAD: dict[str, tuple[str, bytes | Callable[[Path], None], str]] = {
    "huge int": ("a.jsonl", b'{"text": "x", "n": ' + b"1" * 5000 + b"}", "line 1 is not a JSON object that can be re"),
    "truncated line": ("a.jsonl", b'{"text": "a\n{"text": "b"}\n', "object that can be read: Unterminated string"),
    "deep nesting": ("a.jsonl", b"[" * 100_000, "line 1 is not a JSON object that can be read"),
    "deep file": ("a.json", b"[\n" * 100_000, "the file is not a JSON object that can be read"),
    "half a pair": ("a.jsonl", rb'{"text": "\ud800"}', 'the "text" of line 1 is not Unicode'),
    "other field": ("a.json", b'[{"body": "x", "id": 1}]', 'document 1 has no field "text"; it has body, id (--text-f'),
    "chat": ("a.json", b'[{"text": [{"role": "user"}]}]', 'the "text" of document 1 is not a string'),
    "truncated array": ("a.json", b'[{"text": "a"},\n {"te', "object that can be read: Unterminated string"),
    "utf-16": ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), "line 1 is not UTF-8 but UTF-16; convert it: iconv"),
    "utf-16 text": ("a.txt", "text\n".encode("utf-16"), "not UTF-8 but UTF-16; convert it: iconv -f utf-16 -t utf-8"),
    "utf-16 unmarked": ("a.txt", "some text\n".encode("utf-16-le"), "line 1 contains zero bytes; it is binary, or"),
    "latin-1": ("a.txt", b"caf\xe9\n", "not UTF-8 (invalid continuation byte); convert it, as with: icon"),
    "binary": ("a.txt", bytes(range(256)), "not UTF-8 but binary; give a text file"),
    "no gzip": ("a.json.gz", b"plain", "not a complete gzip file"),
    "torn gzip": ("a.json.gz", gzip.compress(json_lines())[:100], "not a complete gzip file"),
    "no zstd": ("a.jsonl.zst", b"plain", "not a complete zstd file"),
    "torn zstd": ("a.jsonl.zst", zstd(json_lines())[:-20], "not a complete zstd file: Truncated"),
    "csv column": ("a.csv", b"id,body\n1,x\n", 'no column "text"; it has id, body (--text-field NAME reads another)'),
    "csv semicolons": ("odd.csv", b"id;text\n1;x\n", "; commas must separate columns, not ';'"),
    "csv row": ("a.csv", b"id,text\n1,x\n2\n", 'the row that ends at line 3 has no "text"'),
    "csv quote": ("a.csv", b'text\n"x\n', "malformed CSV in the row that begins at line 2: unexpected end of data"),
    "csv empty": ("a.csv", b"", 'no column "text"; it has none'),
    "ints": ("a.parquet", table(text=[1]), 'column "text" has type int64, not text (--text-field NAME reads another)'),
    "bytes": ("a.parquet", table(text=[b"a"]), 'column "text" has type binary, not text'),
    "lists": ("a.parquet", table(text=[["a"]]), 'column "text" has type list<'),
    "column": ("a.parquet", table(x=["a"], n=[1]), 'no column "text"; it has x, n (--text-field NAME reads another)'),
    "no parquet": ("a.parquet", b"plain text, and not a table", "a.parquet: Parquet magic bytes not found"),
}


@pytest.mark.parametrize("case", BAD)
def test_records_without_text_give_one_line(case: str, tmp_path: Path) -> None:
    name, content, message = BAD[case]
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    with pytest.raises(DataError) as caught:
        list(open_documents(DataSpec(str(path))))
    assert str(caught.value).startswith(f"--data {path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value).strip()


def test_log_names_each_skipped_line_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1\n2,two\n3\n4,four\n")
    spec = DataSpec(str(path), skip_bad_lines=2)
    check_documents(spec)
    assert caplog.messages == []
    assert list(open_documents(spec)) == ["two", "four"]
    assert [message.split(": ")[2] for message in caplog.messages] == [
        f'the row that ends at line {line} has no "text"' for line in (2, 4)
    ]


def test_every_file_of_a_folder_is_looked_at_first(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines())
    (tmp_path / "b.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"b\.parquet: "):
        check_documents(DataSpec(str(tmp_path)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", ""], "--data: give a file, a folder or a hub dataset"),
        (["--text-field", ""], "--text-field: is empty; name a field"),
        (["--text-field", "txet"], 'line 1 has no field "txet"; it has text (--text-field NAME reads another); did '),
        (["--text-field", "body"], 'line 1 has no field "body"; it has text (--text-field NAME reads another)'),
    ],
)
def test_a_run_refuses_them_before_anything_is_loaded(
    more: list[str], message: str, source_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(source_folder, corpus, tmp_path / "run")
    arguments = without(arguments, "--data") if "--data" in more else arguments
    assert run([*arguments, *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class Hub:
    """Stands for `datasets.load_dataset` where there is no network."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __call__(self, path: str, config: str | None, split: str, streaming: bool) -> list[dict[str, Any]]:
        assert (path, config, split, streaming) == ("owner/name", "en", "train", True)
        return self.rows


@pytest.mark.parametrize(
    ("name", "is_asked_for"),
    [
        *(("wikimedia/wikipedia@20231101.en", True), ("owner/name-v1.5", True), ("ow.ner/na_me", True)),
        *(("texts/corpus.jsonl", False), ("texts/corpus.txt.gz", False), ("texts/other", False), ("./name", False)),
        *(("a/b/c", False), ("name", False), ("~/name", False), ("owner/", False)),
    ],
)
def test_names_of_hub_datasets_differ_from_mistyped_paths(
    name: str, is_asked_for: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking a hub for what lies nowhere takes half a minute; dots in its names are common."""
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr("datasets.load_dataset", lambda path, *rest, **more: asked.append(path) or [{"text": "a"}])
    if is_asked_for:
        assert list(open_documents(DataSpec.parse(name))) == ["a"]
        assert asked == [name.partition("@")[0]]
    else:
        with pytest.raises(UsageError, match="no such file or folder, and not a hub dataset id"):
            list(open_documents(DataSpec.parse(name)))


def test_hub_datasets_have_a_text_field_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", Hub([{"body": "a"}, {"body": None}, {"body": "b", "n": 1}]))
    assert list(open_documents(DataSpec("owner/name@en", text_field="body"))) == ["a", "b"]
    with pytest.raises(DataError, match='row 1 has no field "text"; it has body'):
        list(open_documents(DataSpec("owner/name@en")))
    monkeypatch.setattr("datasets.load_dataset", Hub([{"text": ["a"]}]))
    with pytest.raises(DataError, match='the "text" of row 1 is not a string'):
        list(open_documents(DataSpec("owner/name@en")))
