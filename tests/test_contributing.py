"""The contributor's door: what workflows, hooks, Makefile and CI script say of each other is so."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def scripts(workflow: Path) -> Iterator[str]:
    """What the jobs of a workflow run."""
    for job in yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values():
        yield from (step["run"] for step in job["steps"] if "run" in step)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_existing_targets(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow.keys() >= {"name", True, "permissions", "jobs"}  # YAML reads the key `on` as true
    for job in workflow["jobs"].values():
        assert "runs-on" in job
        assert all(("run" in step) != ("uses" in step) for step in job["steps"])
    for script in scripts(path):
        assert set(re.findall(r"\bmake ([a-z-]+)", script)) <= TARGETS
        assert all((ROOT / file).is_file() for file in re.findall(r"\b(?:tests/[\w.]+|\.ci/\w+)", script))


def test_every_supported_python_is_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    supported = {line.rpartition(" ")[2] for line in project["classifiers"] if " :: Python :: " in line}
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert set(workflow["jobs"]["unit"]["strategy"]["matrix"]["python"]) == supported


def test_hooks_and_templates_are_whole() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} == {"ruff", "ruff-format", "codespell", "end-of-file", "pyright"}
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert form.keys() >= {"name", "description", "body"}
        assert all(field["attributes"]["label"] for field in form["body"])


def test_documents_name_targets_that_exist() -> None:
    for name in ("CONTRIBUTING.md", "README.md", "docs/architecture.md", ".ci/run"):
        named = re.findall(r"(?:^|`)make ([a-z][a-z0-9 -]*)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        assert {target for names in named for target in names.split()} <= TARGETS, name


@pytest.mark.parametrize("target", ["install", "quickstart", "lint"])
def test_make_upgrades_the_pip_of_an_environment_that_the_user_made(target: str, tmp_path: Path) -> None:
    """The README's first block makes .venv with the machine's pip, which may not know dependency groups."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    done = subprocess.run(
        ["make", "--dry-run", target], cwd=tmp_path, env={"PATH": os.environ["PATH"]}, text=True, capture_output=True
    )
    assert done.returncode == 0  # nothing was run: this python is none
    commands = done.stdout
    assert 0 < commands.index("--upgrade 'pip>=25.1'") < commands.index("--group")


def test_ci_runs_the_first_blocks_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert script.index("README.md") < script.index("make install") < script.index("make test ")
    blocks = re.findall(
        r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert "python3 -m venv .venv" in blocks[0]
    assert "make quickstart" in blocks[1]
