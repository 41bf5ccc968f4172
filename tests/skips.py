"""Which tests were skipped and why, at the end of a run; `--must-run FILE` fails it where one of those in FILE was.

A plugin that conftest.py loads. FILE holds a node id, or the beginning of several, a line.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--must-run", metavar="FILE", help="fail where a test is skipped that FILE names")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the process that prints
        config.pluginmanager.register(SkipReport(config.getoption("--must-run")))


class SkipReport:
    """Sees the reports of all workers where pytest-xdist runs several."""

    def __init__(self, must_run: str | None) -> None:
        lines = Path(must_run).read_text(encoding="utf-8").splitlines() if must_run else []
        self.must_run = [line for line in lines if line and not line.startswith("#")]
        self.skipped: dict[str, list[str]] = defaultdict(list)
        """{reason: node ids}; that of a file where it was skipped as a whole."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple) and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            if report.nodeid not in self.skipped[reason]:  # every worker collects, and reports, every file
                self.skipped[reason].append(report.nodeid)

    @property
    def missed(self) -> list[str]:
        """Skipped tests, or whole files, of which one had to run."""
        return [
            node
            for nodes in self.skipped.values()
            for node in nodes
            if any(node.startswith(entry) or entry.startswith(f"{node}::") for entry in self.must_run)
        ]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.missed and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.skipped:
            terminalreporter.section("skipped, by reason")
        for reason, nodes in sorted(self.skipped.items()):
            functions = sorted({node.partition("[")[0] for node in nodes})
            terminalreporter.line(f"{reason} ({len(nodes)}): {', '.join(functions)}")
        if self.missed:
            terminalreporter.section("must not skip, but did", red=True)
            for node in self.missed:
                terminalreporter.line(node)
