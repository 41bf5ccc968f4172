"""The plugin that reports skipped tests and fails where one had to run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONTENTS = {
    "test_whole.py": 'import pytest\npytest.importorskip("no_such_module", reason="it is not installed")\n',
    "test_parts.py": """
import pytest

def test_runs(): pass

@pytest.mark.parametrize("value", [1, 2])
@pytest.mark.skipif(True, reason="no program")
def test_skips(value): pass

@pytest.mark.xfail(strict=True)
def test_fails(): raise ValueError
""",
}


@pytest.mark.parametrize(
    ("must_run", "missed", "workers"),
    [
        ("# a comment\ntest_parts.py::test_runs\ntest_parts.py::test_fails", "", []),
        ("test_parts.py", "test_parts.py::test_skips[1]\ntest_parts.py::test_skips[2]\n", []),
        ("test_whole.py::test_anything", "test_whole.py\n", ["-p", "xdist", "-n", "2"]),
    ],
)
def test_skips_are_listed_and_required_tests_fail(
    must_run: str, missed: str, workers: list[str], tmp_path: Path
) -> None:
    for name, text in (CONTENTS | {"must_run.txt": must_run, "pytest.ini": "[pytest]\n"}).items():
        (tmp_path / name).write_text(text)
    options = ["-p", "skips", "-p", "no:cacheprovider", "-q", "--must-run", "must_run.txt", *workers]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (1 if missed else 0), done.stdout
    assert "no program (2): test_parts.py::test_skips\n" in done.stdout
    assert "it is not installed (1): test_whole.py\n" in done.stdout
    assert ("must not skip, but did" in done.stdout) == bool(missed)
    assert all(f"\n{node}\n" in done.stdout for node in missed.splitlines())


GROUPED = """
import os, pytest

@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("value", range(8))
def test_notes_its_worker(value):
    with open("workers.txt", "a") as stream:
        print(os.environ["PYTEST_XDIST_WORKER"], file=stream)
"""


def test_tests_of_a_group_run_in_one_worker(tmp_path: Path) -> None:
    hook, ours = "pytest_collection_modifyitems", str(Path(__file__).with_name("conftest.py"))
    (tmp_path / "conftest.py").write_text(f"import runpy\n{hook} = runpy.run_path({ours!r})[{hook!r}]\n")
    (tmp_path / "test_grouped.py").write_text(GROUPED)
    options = ["-p", "xdist", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider", "-q"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run([sys.executable, "-m", "pytest", *options], cwd=tmp_path, env=environment, check=True)
    workers = (tmp_path / "workers.txt").read_text().split()
    assert len(workers) == 8
    assert len(set(workers)) == 1


def test_every_file_that_must_run_exists() -> None:
    root = Path(__file__).parent.parent
    entries = (root / "tests" / "must_run.txt").read_text(encoding="utf-8").splitlines()
    files = {entry.partition("::")[0] for entry in entries if not entry.startswith("#")}
    assert files
    assert all((root / file).is_file() for file in files)
