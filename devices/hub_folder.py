"""A folder that makes a good repository of a model hub: artefacts under names that programs look for, and a card.

GGUF files lie at the top as NAME-Q8_0.gguf, which is where llama.cpp, Ollama, LM Studio and Jan look for types to
choose from, with what Ollama reads beside them; ONNX and ExecuTorch artefacts are folders of several files that stay
together. The first ONNX artefact lies in onnx/, its configuration and tokenizer at the top, too: transformers.js looks
there.

What Ollama reads of a model hub's repository beside a GGUF (`ollama run hf.co/OWNER/NAME`): `template`, `params`.

A Modelfile says the same for `ollama create`; there it is written by the export and may have been changed by hand.

`efficientllm-hub`: artefacts and their figures as the folder of a model hub's repository.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..runtime.base import flags
from ..runtime.base.command import run_command
from ..runtime.base.errors import ArtefactError, OptionError, UsageError
from ..runtime.base.files import sha256_of
from ..runtime.base.output import atomic_output, unknown_files
from ..runtime.base.quantities import format_bytes, format_count, markdown_table
from ..runtime.engines.artefact import Artefact
from ..runtime.engines.contract_text import contract_rows
from ..runtime.engines.manifest import MANIFEST_NAME, OLLAMA_FILE, Manifest
from .report import device_line, origin_lines
from .results import Figure, Result, Run

FILES = ("template", "params")

COMMAND = re.compile(
    r"""^[ \t]*(?:parameter[ \t]+(?P<parameter>\w+)|(?P<name>[a-z]+))[ \t]+"""
    r'''(?:"""(?P<long>.*?)"""|"(?P<quoted>.*?)"(?=[ \t]*$)|(?P<plain>.*?)[ \t]*$)''',
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)
"""A Modelfile's NAME text, or PARAMETER name text; a text in quotes may have several lines."""


def ollama_files(modelfile: str) -> dict[str, str]:
    """{file: its text} of what a Modelfile says; of a template, as Ollama takes it, the last."""
    parameters: dict[str, Any] = {}
    template = None
    for found in COMMAND.finditer(modelfile):  # what stands in another one's text is no command
        text = next(each for each in (found["long"], found["quoted"], found["plain"]) if each is not None)
        parameter = (found["parameter"] or "").lower()
        if parameter == "stop":
            parameters.setdefault("stop", []).append(text)
        elif parameter:
            parameters[parameter] = _value(text)
        elif found["name"].lower() == "template":
            template = text
    files = {"template": template} if template is not None else {}
    return files | ({"params": json.dumps(parameters, ensure_ascii=False, indent=2) + "\n"} if parameters else {})


def _value(text: str) -> Any:
    """A number, true or false; anything else is a text as it stands."""
    if text in ("true", "false"):
        return text == "true"
    try:
        number = float(text)
    except ValueError:
        return text
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else number if math.isfinite(number) else text


CARD = "README.md"
MARK, MARK_END = "<!-- written by efficientllm-hub: ", " -->"
"""Around the JSON in the card's last line, {file: its SHA-256, that of the card without that line}."""
LIBRARIES = {"llama.cpp": "gguf", "onnxruntime": "onnx", "executorch": "executorch"}
"""engine -> what the Hugging Face hub calls the format in library_name."""

ONNX_FOLDER = "onnx"
TOP_OF_ONNX = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
"""Files that transformers.js reads at the top of a repository."""
YAML_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
"""Of YAML 1.1: no strings unless they are quoted."""
LINKED_BYTES = 16_000_000
"""From this size on files are linked: configurations and tokenizers are small, and an edit would be the artefact's."""


@dataclass(frozen=True)
class CardSettings:
    """What artefacts do not say of themselves."""

    name: str = ""
    """Of the model, and of its GGUF files; default: the output folder's."""
    base_model: str = ""
    """Hub id of the model that was pruned."""
    license: str = ""
    """SPDX name, as apache-2.0: that of the source applies."""
    language: str = "en"
    """Of the model."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            flags.require(self, item.name, re.fullmatch(r"[\w.+/-]*", value) is not None, "must be one plain word")
        flags.require(self, "name", "/" not in self.name, "must be one plain word; the owner is told to the hub")
        flags.require(self, "name", self.name not in (".", ".."), "must be one plain word")


@dataclass(frozen=True)
class Part:
    """One artefact in the repository."""

    artefact: Path
    manifest: Manifest
    place: str
    """Its file (GGUF) or folder in the repository."""

    @property
    def library(self) -> str:
        return _library(self.manifest)

    @property
    def is_file(self) -> bool:
        return self.manifest.engine == "llama.cpp"

    @property
    def size(self) -> int:
        """Bytes of what lies in the repository."""
        return self.manifest.files[self.manifest.model_file]["bytes"] if self.is_file else self.manifest.total_bytes


def write_hub_folder(
    output: Path, artefacts: Sequence[Path], bench: Sequence[Path], settings: CardSettings, overwrite: bool = False
) -> Path:
    """Write the folder `output`, whole or not at all. UsageError for what cannot be used as given, ArtefactError for an
    artefact that is damaged."""
    settings = _named(settings, output)
    parts, runs = _parts(artefacts, settings.name), [Run.read(path) for path in bench]
    for path, run in zip(bench, runs, strict=True):
        if not any(_result(part, [run]) for part in parts):
            raise UsageError(f"--bench {path} measured none of these artefacts; leave it out, or measure them")
    remedy = "give another --output, or --overwrite to replace it"
    with atomic_output(output, overwrite, _foreign, [*artefacts, *bench], remedy) as folder:
        for part in parts:
            _put(part, folder)
        text = card(parts, runs, settings) + "\n"
        (folder / CARD).write_text(text, encoding="utf-8")
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        written = {path.relative_to(folder).as_posix(): _hash_of(path) for path in files}
        (folder / CARD).write_text(f"{text}{MARK}{json.dumps(written)}{MARK_END}\n", encoding="utf-8")
    return output


def _named(settings: CardSettings, output: Path) -> CardSettings:
    """`settings` with a name: without one, that of the folder; UsageError where it is no plain word."""
    try:
        return settings if settings.name else replace(settings, name=output.absolute().name)
    except OptionError as error:
        raise UsageError(f"{output}: its name is the model's and must be one plain word; or give --name") from error


def _library(manifest: Manifest) -> str:
    """A plug-in's engine is called what it is called."""
    return LIBRARIES.get(manifest.engine, manifest.engine)


def _parts(artefacts: Sequence[Path], name: str) -> list[Part]:
    parts: list[Part] = []
    for path in artefacts:
        manifest = Manifest.read(path)
        Artefact.open(path).verify()
        if manifest.engine == "llama.cpp":
            place = f"{name}-{manifest.quantization.upper()}.gguf"
        elif _library(manifest) == "onnx" and all(part.place != ONNX_FOLDER for part in parts):
            place = ONNX_FOLDER
        else:
            place = f"{_library(manifest)}-{manifest.quantization}"
        kind = (manifest.engine, manifest.quantization)
        if any(part.place == place or (part.manifest.engine, part.manifest.quantization) == kind for part in parts):
            raise UsageError(f"{path}: a second {' in '.join(kind)}; give one artefact of each runtime and type")
        parts.append(Part(path, manifest, place))
    return parts


def _put(part: Part, folder: Path) -> None:
    """Put a part there, and what programs look for beside it."""
    if part.is_file:
        _link(part.artefact / part.manifest.model_file, folder / part.place)
        _put_ollama_files(part, folder)
        return
    for name in (*part.manifest.files, MANIFEST_NAME):
        target = folder / part.place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        _link(part.artefact / name, target)
    for name in TOP_OF_ONNX:
        if part.place == ONNX_FOLDER and name in part.manifest.files:
            _link(part.artefact / name, folder / name)


def _put_ollama_files(part: Part, folder: Path) -> None:
    """Of the first GGUF that has a Modelfile; Ollama reads one for all of a repository."""
    try:
        files = ollama_files((part.artefact / OLLAMA_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except UnicodeDecodeError as error:
        raise ArtefactError(f"{part.artefact / OLLAMA_FILE} is not UTF-8; write it again, or delete it") from error
    if any((folder / name).exists() for name in FILES):
        return
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system has no such thing, and of what people may edit."""
    if source.stat().st_size < LINKED_BYTES:
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _foreign(folder: Path) -> list[str]:
    """What this command has not written, or somebody has changed since: everything where the card does not say."""
    known = _written(folder)
    return unknown_files(folder, known, lambda path, name: _hash_of(path) == known[name])


def _written(folder: Path) -> dict[str, str]:
    """What the card's last line says; {} where there is none."""
    try:
        last = (folder / CARD).read_text(encoding="utf-8").rstrip().rpartition("\n")[2]
        written = json.loads(last.removeprefix(MARK).removesuffix(MARK_END)) if last.startswith(MARK) else {}
    except (OSError, ValueError):
        return {}
    return {str(name): str(content) for name, content in written.items()} if isinstance(written, dict) else {}


def _hash_of(file: Path) -> str:
    """SHA-256; of the card, of what stands above its last line."""
    if file.name != CARD:
        return sha256_of(file)
    return hashlib.sha256(file.read_bytes().partition(MARK.encode())[0]).hexdigest()


def card(parts: Sequence[Part], runs: Sequence[Run], settings: CardSettings) -> str:
    """The repository's README: front matter, files with what was measured of them, quality, how to run it."""
    first = parts[0].manifest
    shape, training = first.architecture, first.training
    libraries = list(dict.fromkeys(part.library for part in parts))
    is_pruned = training.get("source_parameters", 0) > training.get("parameters", 0)
    relation = "finetune" if training else "quantized"
    header = [
        "---",
        *([f"license: {_yaml(settings.license)}"] if settings.license else []),
        *([f"base_model: {_yaml(settings.base_model)}"] if settings.base_model else []),
        *([f"base_model_relation: {relation}"] if settings.base_model else []),
        f"language: {_yaml(settings.language)}",
        f"library_name: {libraries[0]}",
        "pipeline_tag: text-generation",
        f"tags: [{', '.join(['efficientllm', *(['pruned'] if is_pruned else []), *libraries])}]",
        "inference: false",
        "---",
    ]
    size = format_count(shape["num_parameters"]) if "num_parameters" in shape else ""
    origin = settings.base_model or training.get("source", "")
    title = f"# {settings.name}: {size} parameters" if size else f"# {settings.name}"
    lines = [*header, "", title, ""]
    if training.get("source_parameters"):
        lines += [
            f"Pruned while training from {origin}: {training['source_parameters']:,} parameters became "
            f"{training['parameters']:,} over {training['tokens']:,} tokens.",
            "",
        ]
    lines += ["## Files", "", markdown_table(_file_rows(parts, runs), left=(0, 1, 2)), ""]
    for run in runs:
        lines += [f"- {line}" for line in (device_line(run.device, run.options.threads), *origin_lines(run))]
    lines += ["- speeds: median (first-third quartile)"] if runs else []
    lines += ["- KL: mean divergence from the checkpoint in torch, nats per token, at export", ""]
    if training.get("quality"):
        note = "Of the checkpoint, on texts, chats and questions that no run trains on; ± is one standard error."
        lines += ["## Quality", "", markdown_table(contract_rows(training["quality"])), "", note, ""]
    lines += ["## Running it", "", "```bash", *[_command(part) for part in parts], "```", ""]
    licence = f"{settings.license}, the source's." if settings.license else "The source's licence applies."
    return "\n".join([*lines, f"## Licence\n\n{licence}", ""])


def _yaml(word: str) -> str:
    """A word as YAML reads it back: `no` alone is false there."""
    is_plain = re.fullmatch(r"[A-Za-z][\w.+/-]*", word) and word.lower() not in YAML_WORDS
    return word if is_plain else json.dumps(word)


def _file_rows(parts: Sequence[Part], runs: Sequence[Run]) -> list[list[str]]:
    """Header and a row per artefact, with its speeds in the first run that measured it."""
    measured = [_result(part, runs) for part in parts]
    tests = list(dict.fromkeys(test for result in measured if result for test in result.speeds))
    rows = [["file", "runtime", "type", "bytes", "KL", *(f"{test} t/s" for test in tests)]]
    rows[0] += ["peak memory"] if any(measured) else []
    for part, result in zip(parts, measured, strict=True):
        compared = part.manifest.verification.get("quantized") or part.manifest.verification.get("exact") or {}
        kl = f"{compared['mean_kl']:.4f}" if "mean_kl" in compared else "not verified"
        row = [part.place, part.manifest.engine, part.manifest.quantization]
        row += [format_bytes(part.size), kl]
        row += [_speed(result.speeds.get(test) if result else None) for test in tests]
        row += [format_bytes(result.peak_rss_bytes) if result else ""] if any(measured) else []
        rows.append(row)
    return rows


def _result(part: Part, runs: Sequence[Run]) -> Result | None:
    """What was measured of the same files, wherever they lay."""
    files = part.manifest.files
    return next((each for run in runs for each in run.results if each.manifest.get("files") == files), None)


def _speed(figure: Figure | None) -> str:
    return figure.describe(figure.digits) if figure is not None else ""


def _command(part: Part) -> str:
    if part.is_file:
        return f"llama-server -m {part.place}    # or efficientllm-chat, Ollama, LM Studio, Jan"
    if part.manifest.engine == "litert-lm":  # no engine of ours runs it
        return f"litert-lm run {part.place}/{part.manifest.model_file}"
    if part.manifest.engine == "wllama":
        return f"efficientllm-serve-web {part.place}    # or any web server"
    if part.manifest.engine == "transformers":
        return f"# transformers: AutoModelForCausalLM.from_pretrained('{part.place}')"
    if part.place == ONNX_FOLDER:
        return f"efficientllm-chat {part.place}    # or transformers.js: from_pretrained('OWNER/NAME')"
    return f"efficientllm-chat {part.place}"


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        CardSettings,
        prog="efficientllm-hub",
        description="Write a folder that makes a good repository of a model hub: files under the names that programs "
        "look for, and a card with what was measured. Nothing is uploaded.",
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder to write")
    parser.add_argument("artefacts", nargs="+", metavar="ARTEFACT", help="folder written by efficientllm-export")
    parser.add_argument(
        "--bench", action="append", metavar="JSON", help="file of efficientllm-bench --json, repeatable: speeds"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that this command wrote")
    return parser


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    output, artefacts, bench, overwrite = (
        arguments.pop(name, None) for name in ("output", "artefacts", "bench", "overwrite")
    )
    settings = flags.take(arguments, CardSettings)
    folder = write_hub_folder(
        Path(output), list(map(Path, artefacts)), list(map(Path, bench or ())), settings, bool(overwrite)
    )
    print(f"folder: {folder}")
    print(f"to publish: hf upload OWNER/{settings.name or folder.absolute().name} {folder}")
    return 0


def main() -> None:
    sys.exit(run_command(body))


if __name__ == "__main__":
    main()
