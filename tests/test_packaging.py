"""What is shipped, what it imports, and in which direction."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP_LEVEL = ("train", "export", "runtime", "server", "devices")

MAY_IMPORT = {
    "train": {"train", "runtime"},
    "export": {"export", "train", "runtime"},
    "runtime": {"runtime"},
    "server": {"server", "runtime"},
    "devices": {"devices", "runtime"},
}

WITHOUT_TORCH = """
import importlib, pkgutil, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Block())
for package in sys.argv[1:]:
    module = importlib.import_module(package)
    for entry in pkgutil.walk_packages(module.__path__, package + "."):
        importlib.import_module(entry.name)
"""


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_every_shipped_folder_is_listed() -> None:
    folders = {path.parent.relative_to(ROOT) for folder in TOP_LEVEL for path in modules(folder)}
    expected = {"efficientllm." + ".".join(folder.parts) for folder in folders}
    assert expected == set(PROJECT["tool"]["setuptools"]["packages"])


def test_runtime_and_devices_import_without_torch() -> None:
    packages = [
        name for name in PROJECT["tool"]["setuptools"]["packages"] if ".train" not in name and ".export" not in name
    ]
    assert {"efficientllm.runtime", "efficientllm.devices"} <= set(packages)
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *packages], check=True)


@pytest.mark.parametrize("command", PROJECT["project"]["scripts"])
def test_help_works_without_torch(command: str) -> None:
    module, _, _ = PROJECT["project"]["scripts"][command].partition(":")
    script = WITHOUT_TORCH + f"\nsys.argv[1:] = ['--help']\nfrom {module} import main\nmain()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {command}")


@pytest.mark.parametrize("folder", TOP_LEVEL)
def test_imports_point_one_way(folder: str) -> None:
    for path in modules(folder):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            depth = len(path.relative_to(ROOT).parts) - node.level
            package = [*path.relative_to(ROOT).parts[:depth], *(node.module or "").split(".")]
            target = package[0] if package[0] else None
            if target:
                assert target in MAY_IMPORT[folder], f"{path} imports {target}"


def test_version_and_changelog_agree() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{PROJECT['project']['version']}]" in changelog
