"""What the engines share: artefacts, the description of a genai folder, the capture of native messages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from efficientllm.runtime.base.errors import ArtefactError
from efficientllm.runtime.base.files import sha256_of
from efficientllm.runtime.engines import artefact as artefacts
from efficientllm.runtime.engines.artefact import Artefact
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.genai_config import GENAI_CONFIG, GenaiConfig
from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.runtime.engines.native_log import captured_native_log


def test_opening_an_artefact_reads_no_weights(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []

    def count(path: Path) -> str:
        hashed.append(path)
        return sha256_of(path)

    monkeypatch.setattr(artefacts, "sha256_of", count)
    bare = Artefact.open(artefact / "model.gguf")
    assert hashed == []
    assert bare.sha256 == bare.sha256 == Manifest.read(artefact).files["model.gguf"]["sha256"]
    assert hashed == [artefact / "model.gguf"]
    assert Artefact.open(artefact).sha256 != bare.sha256
    assert Artefact.open(artefact / "manifest.json") == Artefact.open(artefact)
    assert hashed == [artefact / "model.gguf"]  # the manifest holds the hashes


def test_an_opened_artefact_is_loaded_as_it_is(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Artefact.open(artefact)
    monkeypatch.setattr(Artefact, "open", lambda path: pytest.fail("it is open already"))
    engine = load_engine(opened, EngineOptions(threads=1, context=256))  # llama.cpp rounds up to this
    assert engine.kv_cache_bytes == opened.cache_bytes(engine.context_length, 2) > 0
    engine.close()


@pytest.mark.parametrize("text", ["{", "[]", '{"model": []}', '{"model": {"context_length": "x"}}'])
def test_a_malformed_genai_config_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / GENAI_CONFIG).write_text(text)
    with pytest.raises(ArtefactError, match=r"genai_config.json is malformed: "):
        GenaiConfig.read(tmp_path)
    with pytest.raises(ArtefactError, match=r"genai_config.json is malformed: "):
        Artefact.open(tmp_path)


def test_a_genai_config_may_be_short_or_absent(tmp_path: Path) -> None:
    assert GenaiConfig.read(tmp_path) == GenaiConfig()
    (tmp_path / GENAI_CONFIG).write_text('{"model": {"eos_token_id": 2}}')
    assert GenaiConfig.read(tmp_path).end_ids == {2}
    with pytest.raises(ArtefactError, match=r"genai_config.json names no decoder"):
        Artefact.open(tmp_path)


def test_only_the_librarys_own_messages_are_kept_from_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with captured_native_log(r"\[\w+\.cpp:\d+\]") as log:
        os.write(2, b"[program.cpp:12] no such operator\nanother thread's error\n")
        assert log() == "[program.cpp:12] no such operator\n"
    assert capfd.readouterr().err == "another thread's error\n"
