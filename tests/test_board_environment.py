"""Which wheel a board is sent, and which board is refused it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from efficientllm.devices import board_environment
from efficientllm.devices.board_environment import engine_wheel, make_environment
from efficientllm.runtime.base.child import ProcessResult
from efficientllm.runtime.base.errors import DeviceError, UsageError

PI = {"machine": "aarch64", "system": "Linux 6.6", "features": "fp asimd crc32"}


class RecordingBoard:
    """A board that records its commands and copies."""

    name = "pi"

    def __init__(self, features: str) -> None:
        self.facts = PI | {"features": features}
        self.lines: list[str] = []
        self.copied: list[str] = []

    def run(self, line: str) -> ProcessResult:
        self.lines.append(line)
        return ProcessResult(0, "", "")

    def require(self, line: str) -> None:
        self.run(line)

    def copy(self, file: Path, target: PurePosixPath) -> None:
        self.copied.append(file.name)


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    (tmp_path / "llama_cpp_python-0.3.36-py3-none-linux_aarch64.whl").write_bytes(b"wheel")
    (tmp_path / "needs").write_text("asimddp\n")
    return tmp_path


@pytest.mark.parametrize(
    ("extra", "facts", "is_sent"),
    [
        ("gguf", PI, True),
        ("onnx", PI, False),  # PyPI has its wheel
        ("gguf", PI | {"machine": "x86_64"}, False),
        ("gguf", PI | {"machine": "arm64", "system": "Darwin 24.1"}, False),
    ],
)
def test_board_gets_only_wheels_that_the_index_lacks(
    extra: str, facts: dict[str, str], is_sent: bool, wheels: Path
) -> None:
    sent = engine_wheel(extra, facts, str(wheels))
    assert (sent is not None) == is_sent
    assert sent is None or (sent.path.parent, sent.required_features) == (wheels, ("asimddp",))


def test_folder_without_a_wheel_gives_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="make board-wheel"):
        engine_wheel("gguf", PI, str(tmp_path))
    monkeypatch.setattr(board_environment, "DEFAULT_WHEELS", tmp_path)
    assert engine_wheel("gguf", PI, "") is None


@pytest.mark.parametrize(("features", "installs"), [("fp asimd", False), ("fp asimd asimddp", True)])
def test_refusal_names_instructions_that_the_processor_lacks(features: str, installs: bool, wheels: Path) -> None:
    board = RecordingBoard(features)
    sent = engine_wheel("gguf", board.facts, str(wheels))
    arguments = ("gguf", wheels / "ours.whl", sent, "python3", "folder")
    if installs:
        make_environment(board, *arguments)
        assert board.copied == ["ours.whl", "llama_cpp_python-0.3.36-py3-none-linux_aarch64.whl"]
        assert "ours.whl[gguf]" in board.lines[-2]
        assert board.copied[1] in board.lines[-2]
        return
    with pytest.raises(DeviceError, match=r"pi: its processor lacks asimddp.*BOARD_CPU=cortex_a72"):
        make_environment(board, *arguments)
    assert not board.lines
    assert not board.copied
