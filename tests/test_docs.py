"""README and docs: commands parse, Python runs, links and pictures exist, and no machine of ours is named."""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import prose
import pytest
import site_pages
from serving import loaded_pool, serve

from efficientllm.devices.cli import build_parser as bench_parser
from efficientllm.export.cli import build_parser as export_parser
from efficientllm.export.targets import known_targets, load_exporter
from efficientllm.runtime.base.child import run_python
from efficientllm.runtime.chat import build_parser as chat_parser
from efficientllm.runtime.command_line import COMMANDS
from efficientllm.runtime.engines.engine import EngineOptions
from efficientllm.server.cli import build_parser as serve_parser
from efficientllm.server.options import AppOptions
from efficientllm.server.web import build_parser as web_parser
from efficientllm.train.cli import build_parser as train_parser
from efficientllm.train.cli import configuration
from efficientllm.train.config.presets import PRESETS
from efficientllm.train.data.check import build_parser as data_parser
from efficientllm.train.evaluation.cli import build_parser as eval_parser
from efficientllm.train.family.fit import build_parser as fit_parser

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESEARCH = sorted((ROOT / "research").rglob("*.md"))
PLUGIN = ROOT / "tests" / "plugin"
PARSERS = {
    "efficientllm-train": train_parser,
    "efficientllm-data": data_parser,
    "efficientllm-fit": fit_parser,
    "efficientllm-export": export_parser,
    "efficientllm-chat": chat_parser,
    "efficientllm-serve": serve_parser,
    "efficientllm-eval": eval_parser,
    "efficientllm-bench": bench_parser,
    "efficientllm-serve-web": web_parser,
}


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)


def commands(document: Path) -> Iterator[list[str]]:
    """Our own commands in code blocks, comments and continuation lines resolved."""
    for block in blocks(document, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["efficientllm"]:
                words = [f"efficientllm-{words[1]}", *words[2:]]
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


def test_the_image_and_the_service_start_the_server() -> None:
    unit = (ROOT / "deploy" / "efficientllm.service").read_text(encoding="utf-8")
    image = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    (service,) = re.findall(r"^ExecStart=(.+)$", unit, re.MULTILINE)
    entry, default = entry_and_default(image)
    for program, *arguments in (shlex.split(service), [*entry, *default]):
        assert Path(program).name == "efficientllm-serve"
        assert serve_parser().parse(arguments)["artefact"]


def test_the_image_of_training_starts_a_run() -> None:
    image = (ROOT / "deploy" / "Dockerfile.train").read_text(encoding="utf-8")
    entry, default = entry_and_default(image)
    assert entry == ["efficientllm"]
    assert default[0] in COMMANDS
    (command,) = re.findall(r"docker run .* efficientllm-train (train .+)$", image, re.MULTILINE)
    values = train_parser().parse(shlex.split(command)[1:])
    values.pop("print_config")
    assert configuration(values).run.output


def entry_and_default(image: str) -> tuple[list[str], list[str]]:
    """Return the program of a Dockerfile that does not end as root, and its default arguments."""
    (user,) = re.findall(r"^USER (.+)$", image, re.MULTILINE)
    assert user not in {"root", "0"}
    entry, default = re.findall(r"^(?:ENTRYPOINT|CMD) (.+)$", image, re.MULTILINE)
    return json.loads(entry), json.loads(default)


PYTHON_BLOCKS = [
    pytest.param(block, id=f"{document.name}-{index}")
    for document in DOCUMENTS
    for index, block in enumerate(blocks(document, "python"))
]


@pytest.fixture(scope="module")
def address(artefact: Path) -> Iterator[str]:
    with serve(
        loaded_pool({"small": str(artefact)}, EngineOptions(threads=1)), AppOptions(api_key="secret")
    ) as address:
        yield address


@pytest.mark.slow
@pytest.mark.parametrize("block", PYTHON_BLOCKS)
def test_python_blocks_run(
    block: str, address: str, artefact: Path, source_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    """In a folder where the names of the documents are tiny models and texts, less what the block makes itself."""
    links = {"HuggingFaceTB/SmolLM2-135M-Instruct": source_folder}
    if "export(" not in block:
        links |= {"runs/small/model": artefact.parent / "checkpoint", "small-gguf": artefact}
    for name, target in links.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(target, target_is_directory=True)
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    (tmp_path / "train.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n', encoding="utf-8")
    replacements = {"http://127.0.0.1:8000": address, "http://127.0.0.1:11434": address}
    replacements |= {'model="large"': 'model="small"', "range(100)": "range(3)", "10_000_000": "2_000"}
    for written, small in replacements.items():
        block = block.replace(written, small)
    done = run_python("-c", block, cwd=tmp_path)
    assert done.code == 0, done.errors


def test_architecture_page_shows_the_tested_plug_in() -> None:
    sources = [*PLUGIN.glob("*.toml"), *PLUGIN.rglob("*.py")]
    lines = {line for source in sources for line in source.read_text(encoding="utf-8").splitlines()}
    page = ROOT / "docs" / "architecture.md"
    examples = [block for block in blocks(page, "python") if "FAMILIES" not in block]
    for block in [*blocks(page, "toml"), *examples]:
        assert {line.removesuffix(" ...") for line in block.splitlines()} <= lines


def test_the_page_of_commands_shows_each() -> None:
    shown = {words[0] for words in commands(ROOT / "docs" / "commands.md")}
    assert shown == set(PARSERS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_has_each_flag_and_two_examples_that_parse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", sys.argv)
    page, parser = site_pages.command_page(name), site_pages.parser_of(name)
    shown = [flag for flag, action in parser._option_string_actions.items() if action.help != argparse.SUPPRESS]
    assert all(f"`{flag}" in page or f", {flag}" in page for flag in shown)
    assert len(parser.examples) == 2
    for program, command, *arguments in map(shlex.split, parser.examples):
        assert (program, command) == ("efficientllm", name)
        assert site_pages.parser_of(name).parse(arguments[: arguments.index(">")] if ">" in arguments else arguments)


def test_the_reference_has_the_names_for_programs_and_each_target() -> None:
    page = site_pages.python_page()
    for package in site_pages.PACKAGES:
        for name in importlib.import_module(f"efficientllm.{package}").__all__:
            assert name == "__version__" or f"### {name}\n" in page
    assert all(f"## --target {target}\n" in site_pages.command_page("export") for target in known_targets())


def test_the_site_has_its_style_of_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COMMANDS", "GROUPS"):  # their pages take seconds
        monkeypatch.setattr(site_pages, name, {})
    site_pages.write_pages(tmp_path / "pages")
    (name,) = re.findall(r"^extra_css: \[(.+)\]$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert "padding" in (tmp_path / "pages" / name).read_text(encoding="utf-8")


def test_the_site_has_every_document() -> None:
    named = re.findall(r": ((?:docs|research|tests)/[\w/.-]+)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert {f"docs/{page.name}" for page in DOCUMENTS[1:]} <= set(named)
    for name in named:
        assert (ROOT / name).is_file() or name.startswith("docs/reference/"), name


def test_readme_is_short_and_starts_with_a_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 1200
    assert len(text.partition("efficientllm chat demo")[0].split()) <= 100
    sentences = prose.Prose.of([text])
    assert sentences.words_per_sentence <= 16
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert [table.count("\n") - 2 <= 6 for table in tables] == [True]


@pytest.mark.parametrize("document", [*DOCUMENTS, *RESEARCH], ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target, _, anchor in re.findall(r"\]\(([^)#]*)(#([^)]+))?\)", document.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path = document.parent / target if target else document
        assert path.exists(), target
        assert not anchor or anchor in anchors_of(path), f"{target}#{anchor}"


def anchors_of(page: Path) -> set[str]:
    """What GitHub calls a page's headings: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_existing_files(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"\b(?:train|export|runtime|server|devices|tests)/[\w/]+\.(?:py|sh|txt|html)\b", text):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_presets_that_are_named_exist(document: Path) -> None:
    named = re.findall(r"(?:--preset |`)((?:gpu|node|cpu)\w*-\w+)\b", document.read_text(encoding="utf-8"))
    assert set(named) <= set(PRESETS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_machine_is_named(document: Path) -> None:
    assert not re.search(r"(?<![\w.])/(tmp|work|root|home)/", document.read_text(encoding="utf-8"))


def test_every_training_flag_has_a_help_text() -> None:
    for action in train_parser()._actions:
        assert action.help, action.option_strings
