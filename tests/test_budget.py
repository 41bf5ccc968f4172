"""The size of the code stays within tests/budget.toml, whose numbers are only lowered."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path

import pytest
from import_graph import PACKAGES, ROOT
from measure_code import Module
from test_docs import PARSERS

BUDGET = tomllib.loads((Path(__file__).parent / "budget.toml").read_text(encoding="utf-8"))


@functools.cache
def modules_of(folder: str) -> list[Module]:
    """Return the modules of a folder, or of the five packages. Files that only mark a folder as one do not count."""
    folders = PACKAGES if folder == "packages" else [folder]
    paths = [path for each in folders for path in sorted((ROOT / each).rglob("*.py"))]
    return [Module.read(path) for path in paths if path.name != "__init__.py"]


@pytest.mark.parametrize("folder", BUDGET["lines"])
def test_code_keeps_its_budget_of_lines(folder: str) -> None:
    assert sum(module.num_lines for module in modules_of(folder)) <= BUDGET["lines"][folder]


def test_lines_stay_readable() -> None:
    modules = modules_of("packages")
    lines = sum(module.num_lines for module in modules)
    assert sum(module.num_tokens for module in modules) / lines <= BUDGET["names_operators_and_numbers_per_line"]


@pytest.mark.parametrize("command", BUDGET["flags"])
def test_command_keeps_its_budget_of_flags(command: str) -> None:
    flags = {flag for action in PARSERS[command]()._actions for flag in action.option_strings if flag.startswith("--")}
    assert len({flag.removeprefix("--no-").removeprefix("--") for flag in flags}) <= BUDGET["flags"][command]


def test_every_command_has_a_budget() -> None:
    assert set(BUDGET["flags"]) == set(PARSERS)
