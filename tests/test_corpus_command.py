"""`efficientllm-corpus`: what it takes, what it leaves out, and that the file is whole or absent."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.output import locked_output
from efficientllm.train.data import corpus as corpus_cli
from efficientllm.train.data.chat import Encoder
from efficientllm.train.data.documents import DataSpec, open_documents
from efficientllm.train.data.tokens import open_tokens
from efficientllm.train.model.source import load_tokenizer


def corpus(*arguments: str | Path) -> int:
    return run_command(corpus_cli.body, [str(each) for each in arguments])


def records(path: Path) -> list[dict[str, object]]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in content.splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two readable files in folders of it, one too short, one twice, one hidden, one that is no text."""
    place = tmp_path / "notes"
    (place / "deep" / "er").mkdir(parents=True)
    (place / ".git").mkdir()
    (place / "one.md").write_text("# One\n" + "word " * 60)
    (place / "deep" / "er" / "two.txt").write_text("ünï " * 70)
    (place / "deep" / "again.txt").write_text("ünï " * 70)
    (place / "short.md").write_text("no more")
    (place / ".git" / "three.txt").write_text("hidden " * 60)
    (place / "picture.png").write_bytes(b"\x89PNG" * 100)
    return place


def test_a_folder_becomes_a_file_that_training_reads(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "corpus.jsonl.gz"
    assert corpus(output, "--data", folder) == 0
    texts = [str(record["text"]) for record in records(output)]
    assert [text[:5] for text in texts] == ["ünï ü", "# One"]
    assert list(open_documents(DataSpec(str(output)))) == texts
    row = next(line for line in capsys.readouterr().out.splitlines() if str(folder) in line)
    taken = sum(len(text.encode()) for text in texts)
    assert row == f"| {folder} (all of it) | 2 | {taken} B | 1 | 1 |"


def test_tokens_are_stored_beside_the_corpus(
    folder: Path, source_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "corpus.jsonl"
    assert corpus(output, "--data", folder, "--tokenizer", source_folder) == 0
    encoder = Encoder(load_tokenizer(str(source_folder)))
    stored = open_tokens(DataSpec(str(output)), encoder, 0.0)
    assert stored is not None
    documents = list(open_documents(DataSpec(str(output))))
    assert [stored[int(number)].tolist() for number in stored.documents] == [
        each.tolist() for each in encoder.encode(documents)
    ]
    assert "tokens: " in capsys.readouterr().err


def test_same_documents_give_the_same_file_without_replacing_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first.jsonl.gz", tmp_path / "second.jsonl.gz"
    assert corpus(first, "--data", folder) == corpus(second, "--data", folder) == 0
    assert first.read_bytes() == second.read_bytes()
    assert corpus(first, "--data", folder) == 2
    assert "already exists" in capsys.readouterr().err
    assert corpus(first, "--data", folder, "--overwrite", "--min-characters", "1") == 0
    assert len(records(first)) == 3


def test_a_corpus_within_its_folder_does_not_read_itself(folder: Path) -> None:
    output = folder / "all.jsonl"
    assert corpus(output, "--data", folder) == 0
    first = records(output)
    (folder / "three.md").write_text("third " * 50)
    assert corpus(output, "--data", folder, "--overwrite") == 0
    assert records(output) == [*first, {"text": "third " * 50}]


def test_shares_of_bytes_and_the_end(tmp_path: Path) -> None:
    for name, size in (("a", 300), ("b", 900)):
        lines = [json.dumps({"text": f"{name}{number:04} " + "x" * size}) for number in range(400)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    output = tmp_path / "mix.jsonl"
    sources = ("--data", f"{tmp_path / 'a.jsonl'}:3", "--data", f"{tmp_path / 'b.jsonl'}:1")
    assert corpus(output, *sources, "--max-bytes", "100kB") == 0
    texts = [str(record["text"]) for record in records(output)]
    sizes = {name: sum(len(text) for text in texts if text.startswith(name)) for name in "ab"}
    assert 100_000 <= sum(sizes.values()) < 101_000
    assert sizes["a"] / sizes["b"] == pytest.approx(3, rel=0.05)


def test_ended_source_leaves_its_share_to_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "few.jsonl").write_text(json.dumps({"text": "few " * 100}))
    (tmp_path / "many.jsonl").write_text("\n".join(json.dumps({"text": f"{n} " + "many " * 100}) for n in range(50)))
    sources = ("--data", f"{tmp_path / 'few.jsonl'}:9", "--data", tmp_path / "many.jsonl")
    assert corpus(tmp_path / "mix.jsonl", *sources, "--max-bytes", "10kB") == 0
    assert len(records(tmp_path / "mix.jsonl")) == 21
    assert "few.jsonl (all of it) | 1 |" in capsys.readouterr().out


def test_chats_stay_chats(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q" * 150}, {"role": "assistant", "content": "a" * 150}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}))
    assert corpus(tmp_path / "out.jsonl", "--data", tmp_path / "chats.jsonl") == 0
    assert records(tmp_path / "out.jsonl") == [{"messages": messages}]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("out.txt", "--data", "notes"), "must be called NAME.jsonl.gz or NAME.jsonl"),
        (("out.jsonl",), "--data is missing: name a file, a folder or a hub dataset"),
        (("out.jsonl", "--data", "nowhere"), "no such file or folder"),
        (("out.jsonl", "--data", "notes", "--max-bytes", "0"), "--max-bytes 0: must be positive"),
        (("out.jsonl", "--data", "empty"), "the folder and its folders hold no .txt, .md"),
        (("in.jsonl", "--data", "in.jsonl", "--overwrite"), "is also read by --data in.jsonl"),
        (("out.jsonl", "--data", "bad.jsonl"), "line 2 is not a JSON object"),
        (
            ("out.jsonl", "--data", "in.jsonl", "--min-characters", "999"),
            "no document was taken: all 1 have fewer than 999 characters; lower --min-characters",
        ),
        (("out.jsonl", "--data", "nothing.jsonl"), "--data nothing.jsonl: it has no documents"),
        (("out.jsonl", "--data", ""), "--data '' has no path"),
        (("out.jsonl", "--data", ":0.5"), "--data ':0.5' has no path"),
        (("out.jsonl", "--data", "in.jsonl", "--data", "mistyped/name"), "no such file or folder, and no hub"),
    ],
)
def test_impossible_requests_give_one_line_and_leave_no_file(
    arguments: tuple[str, ...],
    said: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "t" * 300}))
    (tmp_path / "nothing.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": "t" * 300}) + "\nno json\n")
    before = {path.name for path in tmp_path.iterdir()}
    assert corpus(*arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert [line for line in error.splitlines() if "of text" not in line] == [error.splitlines()[-1]]
    assert {path.name for path in tmp_path.iterdir()} == before


def test_bad_lines_are_counted_over_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "in"
    place.mkdir()
    for name in "ab":
        (place / f"{name}.jsonl").write_text("no json\n" + json.dumps({"text": name * 300}) + "\n")
    assert corpus(tmp_path / "out.jsonl", "--data", place, "--skip-bad-lines", "1") == 2
    assert "b.jsonl: line 1" in capsys.readouterr().err
    assert corpus(tmp_path / "out.jsonl", "--data", place, "--skip-bad-lines", "2") == 0
    assert len(records(tmp_path / "out.jsonl")) == 2


def test_linked_folders_are_read_once_and_a_linked_file_is_written(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "more.txt").write_text("more " * 60)
    (folder / "linked").symlink_to(outside)
    (outside / "circle").symlink_to(folder)
    (tmp_path / "real.jsonl").write_text("")
    (tmp_path / "out.jsonl").symlink_to(tmp_path / "real.jsonl")
    assert corpus(tmp_path / "out.jsonl", "--data", folder, "--overwrite") == 0
    assert (tmp_path / "out.jsonl").is_symlink()
    texts = [str(record["text"])[:4] for record in records(tmp_path / "real.jsonl")]
    assert sorted(texts) == ["# On", "more", "ünï "]


def test_second_command_is_refused_and_a_killed_one_is_cleaned_up(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    with locked_output(output):
        assert corpus(output, "--data", folder) == 2
    assert "is being written by process" in capsys.readouterr().err
    (tmp_path / ".out.jsonl.4711.tmp").write_text("half of a corpus")
    assert corpus(output, "--data", folder) == 0
    assert not list(tmp_path.glob(".out*"))


def test_command_keeps_files_that_only_resemble_its_temporaries(folder: Path, tmp_path: Path) -> None:
    others = [tmp_path / name for name in (".out.jsonl.gz.4711.tmp", ".out.jsonl.notes.tmp")]
    for other in others:
        other.write_text("another command's")
    (tmp_path / ".out.jsonl.12.tmp").mkdir()
    assert corpus(tmp_path / "out.jsonl", "--data", folder) == 0
    assert all(other.exists() for other in others)


def test_unusable_output_gives_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "circle.jsonl").symlink_to("circle.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    for name, said in (
        ("circle.jsonl", "is not a usable path"),
        ("folder.jsonl", "is a folder; name a file"),
        ("\udcff.jsonl", "is not UTF-8"),
    ):
        assert corpus(tmp_path / name, "--data", folder, "--overwrite") == 2
        assert said in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="this system has no /proc")
def test_unwritable_place_differs_from_a_full_disk(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert corpus("/proc/x.jsonl", "--data", folder) == 2
    assert "full" not in capsys.readouterr().err
