"""The size of the code stays within tests/budget.toml. A change that exceeds a limit raises it and says why."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path

import pytest
from import_graph import ROOT
from measure_code import Module
from test_docs import PARSERS

BUDGET = tomllib.loads((Path(__file__).parent / "budget.toml").read_text(encoding="utf-8"))


@functools.cache
def modules_of(package: str) -> list[Module]:
    """Return the modules of a package. Files that only mark a folder as a package do not count."""
    paths = [path for path in sorted((ROOT / package).rglob("*.py")) if path.name != "__init__.py"]
    return [Module.read(path) for path in paths]


@pytest.mark.parametrize("package", BUDGET["packages"])
def test_a_package_keeps_its_budget(package: str) -> None:
    limits, modules = BUDGET["packages"][package], modules_of(package)
    assert sum(module.num_lines for module in modules) <= limits["lines"]
    assert len(modules) <= limits["modules"]
    assert max(module.num_lines for module in modules) <= BUDGET["longest_module"]


def test_lines_stay_readable() -> None:
    modules = [module for package in BUDGET["packages"] for module in modules_of(package)]
    lines = sum(module.num_lines for module in modules)
    assert sum(module.num_tokens for module in modules) / lines <= BUDGET["names_operators_and_numbers_per_line"]


@pytest.mark.parametrize("command", BUDGET["flags"])
def test_a_command_keeps_its_budget_of_flags(command: str) -> None:
    flags = {flag for action in PARSERS[command]()._actions for flag in action.option_strings if flag.startswith("--")}
    assert len({flag.removeprefix("--no-").removeprefix("--") for flag in flags}) <= BUDGET["flags"][command]


def test_every_command_has_a_budget() -> None:
    assert set(BUDGET["flags"]) == set(PARSERS)
