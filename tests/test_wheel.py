"""The wheel that a board gets from a computer where the package is installed and the source tree is not."""

from __future__ import annotations

import importlib.metadata
import sys
import zipfile
from pathlib import Path

import pytest

from efficientllm.devices import board_environment
from efficientllm.runtime.base.child import run

FILES = {
    "package/module.py": "VALUE = 1\n",
    "package/page.html": "<p>\n",
    "small-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n",
    "small-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "small-1.0.dist-info/entry_points.txt": "[console_scripts]\nsmall = package.module:main\n",
}
ADDED = {
    "small-1.0.dist-info/INSTALLER": "pip\n",
    "small-1.0.dist-info/direct_url.json": "{}",
    "package/__pycache__/module.cpython-311.pyc": "bytecode",
}


@pytest.fixture
def installed(tmp_path: Path) -> importlib.metadata.Distribution:
    """A distribution as pip leaves it."""
    site = tmp_path / "lib/site-packages"
    for name, text in (FILES | ADDED).items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    names = [*FILES, *ADDED, "small-1.0.dist-info/RECORD", "../../bin/small"]
    (site / "small-1.0.dist-info/RECORD").write_text("".join(f"{name},,\n" for name in names))
    return importlib.metadata.Distribution.at(site / "small-1.0.dist-info")


def test_an_installed_distribution_is_packed_as_pip_takes_it(
    installed: importlib.metadata.Distribution, tmp_path: Path
) -> None:
    packed = board_environment.pack_installed(installed, tmp_path)
    assert packed.name == "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(packed) as archive:
        assert set(archive.namelist()) == {*FILES, "small-1.0.dist-info/RECORD"}
    target = tmp_path / "target"
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check"]
    done = run([sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(packed)])
    assert done.code == 0, done.errors
    assert (target / "package/module.py").read_text() == "VALUE = 1\n"
    assert (target / "bin/small").is_file()


def test_board_gets_the_installed_package_without_a_source_tree(
    installed: importlib.metadata.Distribution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board_environment, "SOURCE_ROOT", tmp_path)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: installed)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, again = (board_environment.runtime_wheel("", tmp_path / name, print) for name in ("a", "b"))
    assert first.name == "small-1.0-py3-none-any.whl"
    assert first.read_bytes() == again.read_bytes()  # the board's environment is found again
