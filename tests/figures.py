"""Figures that tests measured on the way, at the end of a run: a test records them as the property "measured".

A plugin that conftest.py loads; what tests print themselves is not seen where pytest-xdist runs several.
"""

from __future__ import annotations

import pytest

PROPERTY = "measured"


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the process that prints
        config.pluginmanager.register(FigureReport())


class FigureReport:
    """Sees the reports of all workers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.lines += [str(value) for name, value in report.user_properties if name == PROPERTY]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.lines:
            terminalreporter.section("measured")
        for line in sorted(self.lines):
            terminalreporter.line(line)
