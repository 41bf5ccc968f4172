"""Values of --output that a careless or unlucky hand types: one line each, and nothing on the disk changes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import exporting
import pytest
import training

from efficientllm.runtime.base.errors import UsageError
from efficientllm.runtime.base.output import check_output

INSIDE = {
    "the current folder": ".",
    "the same, in full": "{home}/work",
    "the same, by its parent": "../work",
    "the same, by what is in it": "photos/..",
    "the parent": "..",
    "the home": "{home}",
    "what is read": "source",
    "what is read, with a dot": "source/.",
    "what is read, by a detour": "photos/../source",
    "what is read, by a link": "link-to-source",
    "the text": "text.jsonl",
    "below the text": "text.jsonl/run",
    "photographs": "photos",
    "photographs, by a link": "link-to-photos",
    "somebody's model, where a run has its own": "mine",
    "a circle of links": "circle",
    "below a circle": "circle/run",
    "nothing": "",
    "a zero byte": "a\0b",
    "no UTF-8": "run-\udcff",
    "a name too long": "x" * 300,
}


@pytest.fixture
def home(tmp_path: Path, source_folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose folder `work`, the current one, holds a source, a text and what is dear to somebody."""
    work = tmp_path / "home" / "work"
    shutil.copytree(source_folder, work / "source")
    shutil.copy(corpus, work / "text.jsonl")
    (work / "photos").mkdir()
    (work / "photos" / "a.jpg").write_bytes(b"x")
    shutil.copytree(source_folder, work / "mine" / "model")
    (work / "mine" / "config.toml").write_text("")
    for name, target in {"link-to-source": "source", "link-to-photos": "photos", "circle": "circle"}.items():
        (work / name).symlink_to(target)
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def everything(folder: Path) -> dict[str, object]:
    """{path: content, target of a link, or None of a folder} below a folder."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        is_link = path.is_symlink()
        found[str(path)] = os.readlink(path) if is_link else path.read_bytes() if path.is_file() else None
    return found


@pytest.mark.parametrize("command", ["train", "export"])
@pytest.mark.parametrize("what", INSIDE)
def test_hostile_values_change_nothing(what: str, command: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = INSIDE[what].format(home=home)
    before = everything(home.parent)
    if command == "train":
        arguments = ["--source", "source", "--data", "text.jsonl", *training.SETTINGS, "--overwrite"]
        assert training.run([*arguments, f"--output={output}"]) == 2
    else:
        assert exporting.export(Path("source"), "gguf", output, "--quantize", "f32", "--overwrite") == 2
    errors = capsys.readouterr().err.splitlines()
    assert [error[:7] for error in errors] == ["error: "]
    assert everything(home.parent) == before


@pytest.mark.parametrize("output", ["/", "//", "/etc", "/proc/self", "/dev/null", "/dev"])
def test_the_systems_own_folders_are_refused(output: str) -> None:
    """Not by a whole command: it would have to be wrong only once."""
    with pytest.raises(UsageError):
        check_output(Path(output), True, lambda folder: sorted(os.listdir(folder)), [], "")
