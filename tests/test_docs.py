"""README and docs: their commands parse, their links and pictures exist, and no machine of ours is named."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from efficientllm.devices.cli import build_parser as bench_parser
from efficientllm.export.cli import build_parser as export_parser
from efficientllm.export.targets import load_exporter
from efficientllm.runtime.chat import build_parser as chat_parser
from efficientllm.runtime.engines.engine import EngineOptions
from efficientllm.server.app import AppOptions
from efficientllm.server.cli import ServeOptions
from efficientllm.server.cli import build_parser as serve_parser
from efficientllm.train.cli import build_parser as train_parser
from efficientllm.train.cli import configuration
from efficientllm.train.evaluation.cli import build_parser as eval_parser

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {
    "efficientllm-train": train_parser,
    "efficientllm-export": export_parser,
    "efficientllm-chat": chat_parser,
    "efficientllm-serve": lambda: serve_parser((ServeOptions, AppOptions, EngineOptions)),
    "efficientllm-eval": eval_parser,
    "efficientllm-bench": bench_parser,
}


def commands(document: Path) -> Iterator[list[str]]:
    """Our own commands in code blocks, comments and continuation lines resolved."""
    for block in re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] in PARSERS:
                yield words


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_understood(document: Path) -> None:
    for name, *arguments in commands(document):
        values = PARSERS[name]().parse(arguments)
        if name == "efficientllm-train":
            values.pop("print_config")
            configuration(values)
        if name == "efficientllm-export":
            load_exporter(values["target"])


def test_readme_shows_every_command() -> None:
    shown = {words[0] for words in commands(ROOT / "README.md")}
    assert shown == set(PARSERS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_machine_is_named(document: Path) -> None:
    assert not re.search(r"(?<![\w.])/(tmp|work|root|home)/", document.read_text(encoding="utf-8"))


def test_every_training_flag_has_a_help_text() -> None:
    for action in train_parser()._actions:
        assert action.help, action.option_strings
