"""What is loaded is what was exported, or was tried in another process first."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from serving import free_port

from efficientllm.runtime import EfficientLLMError, EngineOptions, chat, load
from efficientllm.runtime.base import user_cache
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import ArtefactError
from efficientllm.runtime.engines import artefact as artefacts
from efficientllm.runtime.engines import file_cache, probe
from efficientllm.runtime.engines.artefact import Artefact
from efficientllm.runtime.engines.hf_tokenizer import HfTokenizer
from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.server import cli

OPTIONS = EngineOptions(threads=1, context=64)


def test_loader_refuses_wrong_files_before_loading(
    artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.pte").write_bytes(b"not a flat buffer")
    for arguments, message in (
        ([str(tmp_path / "model.pte"), "Hi"], f"{tmp_path / 'model.pte'} is not a file of ExecuTorch"),
        ([str(artefact), ""], "the prompt is empty"),
    ):
        with mock.patch("efficientllm.runtime.engines.engine._load", side_effect=AssertionError("loaded")):
            assert run_command(chat.body, arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {message}")


MUTATIONS = Path(__file__).with_name("tools") / "mutations.py"


@pytest.fixture
def copy(artefact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artefact, tmp_path / "copy"))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Files as they are hashed, with a cache of their own."""
    monkeypatch.setenv(user_cache.FOLDER_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(file_cache, "SETTLED_SECONDS", 0.3)
    files: list[Path] = []
    sha256_of = artefacts.sha256_of
    monkeypatch.setattr(artefacts, "sha256_of", lambda path: (files.append(path), sha256_of(path))[1])
    return files


def age(path: Path) -> None:
    """Let a file look settled: nobody has written to it for a while."""
    time.sleep(max(0.0, path.stat().st_ctime + file_cache.SETTLED_SECONDS + 0.1 - time.time()))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("place", [3, -5])
def test_flipped_byte_gives_one_line(copy: Path, place: int, capsys: pytest.CaptureFixture[str]) -> None:
    flip(copy / "model.gguf", place)
    for path in (copy, copy / "model.gguf"):  # the file alone, too: the manifest that lists it stands beside it
        assert run_command(chat.body, [str(path), "Hi"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {copy / 'model.gguf'} is damaged")
        assert "export it again" in error
        assert len(error.splitlines()) == 1
        with pytest.raises(ArtefactError, match="is damaged"):
            load(path, OPTIONS)
    assert run_command(cli.body, [str(copy), "--port", str(free_port())]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_a_changed_manifest_is_refused(copy: Path) -> None:
    path = copy / "manifest.json"
    text = path.read_text()
    for before, after in (('"f32"', '"f31"'), ("\n", "\n\n"), ('"sha256": "', '"sha257": "')):
        path.write_text(text.replace(before, after, 1))
        with pytest.raises(ArtefactError, match="was changed after the export; export the model again"):
            load(copy, OPTIONS)
    values = json.loads(text)
    values["files"] = {"../model.gguf": values["files"]["model.gguf"]}
    for damaged in (values, {"files": 5}, {}):
        text = json.dumps(damaged | {"format_version": 2, "sha256": "0" * 64})
        path.write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest()))
        with pytest.raises(ArtefactError, match=r"manifest.json is incomplete"):
            Artefact.open(copy)


def test_a_second_load_reads_nothing_again_until_the_file_changes(copy: Path, hashed: list[Path]) -> None:
    model = copy / "model.gguf"
    Artefact.open(copy).verify()
    Artefact.open(copy).verify()
    assert hashed == [model, model]  # written a moment ago: it could change again within a tick of the clock
    age(model)
    Artefact.open(copy).verify()
    assert len(hashed) == 3
    Artefact.open(copy).verify()
    Artefact.open(model).verify()
    assert len(hashed) == 3
    state = model.stat()
    flip(model, -5)
    os.utime(model, ns=(state.st_atime_ns, state.st_mtime_ns))  # as if nobody had touched it
    with pytest.raises(ArtefactError, match="is damaged"):
        Artefact.open(copy).verify()


@pytest.mark.parametrize("content", ["{", "[]", '{"x": 1}'])
def test_a_damaged_cache_only_costs_time(copy: Path, hashed: list[Path], content: str) -> None:
    age(copy / "model.gguf")
    user_cache.cache_folder().mkdir()
    (user_cache.cache_folder() / "file_cache.json").write_text(content)
    Artefact.open(copy).verify()
    Artefact.open(copy).verify()
    assert len(hashed) == 1


def test_a_cache_that_cannot_be_written_only_costs_time(
    copy: Path, hashed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(user_cache.FOLDER_VARIABLE, str(tmp_path / "file" / "cache"))
    age(copy / "model.gguf")
    Artefact.open(copy).verify()
    Artefact.open(copy).verify()
    assert len(hashed) == 2


def with_block_count(source: Path, target: Path, count: int) -> Path:
    """A GGUF whose metadata promises another number of layers: llama.cpp aborts on it."""
    from gguf import GGUFReader

    shutil.copy(source, target)
    reader = GGUFReader(target, "r+")
    (field,) = (field for name, field in reader.fields.items() if name.endswith(".block_count"))
    field.parts[field.data[0]][0] = count
    reader.data.flush()
    return target


def test_aborting_file_gives_one_line(artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = with_block_count(artefact / "model.gguf", tmp_path / "bad.gguf", 0)
    assert run_command(chat.body, [str(path), "Hi"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert f"{path} ends the process that loads it in llama.cpp (SIGABRT)" in error


def test_a_bare_file_is_tried_once(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(user_cache.FOLDER_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(file_cache, "SETTLED_SECONDS", 0.3)
    bare = Path(shutil.copy(artefact / "model.gguf", tmp_path))
    (tmp_path / "manifest.json").write_text('{"name": "anybody\'s"}')
    age(bare)
    load(bare, OPTIONS).close()
    monkeypatch.setattr(probe, "run_probe", lambda arguments: pytest.fail("it is known to work"))
    load(bare, OPTIONS).close()
    load(artefact, OPTIONS).close()


def test_a_file_that_computes_no_numbers_is_refused(artefact: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    path = Path(shutil.copy(artefact / "model.gguf", tmp_path / "nan.gguf"))
    (tensor,) = (one for one in GGUFReader(path, "r+").tensors if one.name == "output_norm.weight")
    tensor.data[:] = float("nan")
    with pytest.raises(ArtefactError, match=r"nan.gguf computes NaN or infinite logits"):
        load(path, OPTIONS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer_config.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"[1]"),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_a_damaged_tokenizer_is_one_error(source_folder: Path, tmp_path: Path, name: str, content: bytes) -> None:
    folder = Path(shutil.copytree(source_folder, tmp_path / "folder"))
    (folder / name).write_bytes(content)
    with pytest.raises(EfficientLLMError, match="its tokenizer is damaged"):
        HfTokenizer(folder)


@pytest.mark.slow
def test_no_mutation_ends_the_caller_or_passes_the_manifest(artefact: Path) -> None:
    """Damage a few dozen places; research/log has thousands."""
    for arguments, allowed in (([], {"refused"}), (["--bare"], {"refused", "loaded"})):
        command = [sys.executable, str(MUTATIONS), str(artefact), "--count", "30", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        outcomes = json.loads(done.stdout.splitlines()[-1])
        assert outcomes.keys() <= allowed, done.stderr
        assert sum(outcomes.values()) == 30


def test_manifest_names_the_file_of_the_model(artefact: Path) -> None:
    manifest = Manifest.read(artefact)
    assert Artefact.open(artefact).known_manifest == Artefact.open(artefact / "model.gguf").known_manifest == manifest
