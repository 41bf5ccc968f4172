"""`efficientllm-hub`: write a folder that is a repository of a model hub, with artefacts and a model card.

GGUF files are at the top as NAME-Q8_0.gguf, where llama.cpp, Ollama, LM Studio and Jan list the available types.
Ollama also reads the files `template` and `params` there. ONNX and ExecuTorch artefacts consist of several files and
keep their folders. The first ONNX artefact is in onnx/, with its configuration and tokenizer at the top for
transformers.js.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..runtime.base import flags
from ..runtime.base.errors import ArtefactError, OptionError, UsageError
from ..runtime.base.files import fill_template, link_or_copy, sha256_of
from ..runtime.base.output import atomic_output, unknown_files
from ..runtime.base.quantities import format_bytes, format_count, markdown_table
from ..runtime.engines.artefact import Artefact
from ..runtime.engines.contract_text import JOBS_NOTE, contract_rows, job_rows
from ..runtime.engines.manifest import MANIFEST_NAME, OLLAMA_FILE, Manifest
from .results import Result, Run
from .run_table import device_line, origin_lines

CARD = "README.md"
MARK, MARK_END = "<!-- written by efficientllm-hub: ", " -->"
"""Delimiters of the JSON in the card's last line: {file: SHA-256}. The card's hash excludes that line."""
LIBRARIES = {"llama.cpp": "gguf", "onnxruntime": "onnx", "executorch": "executorch"}
"""Maps an engine to the hub's library_name of its format."""
ONNX_FOLDER = "onnx"
TRANSFORMERS_JS_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
"""Files that transformers.js reads at the top of a repository."""
OLLAMA_HUB_FILES = ("template", "params")
"""Files that Ollama reads beside a GGUF of a hub (`ollama run hf.co/OWNER/NAME`)."""
YAML_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
"""Words that YAML 1.1 reads as other types than strings unless they are quoted."""
MIN_LINK_BYTES = 16_000_000
"""Smallest file that is linked. Smaller ones are copied, because an edit of a link would change the artefact."""
MODELFILE_COMMAND = re.compile(
    r"""^[ \t]*(?:parameter[ \t]+(?P<parameter>\w+)|(?P<name>[a-z]+))[ \t]+"""
    r'''(?:"""(?P<long>.*?)"""|"(?P<quoted>.*?)"(?=[ \t]*$)|(?P<plain>.*?)[ \t]*$)''',
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)
"""Matches NAME text or PARAMETER name text in a Modelfile. A quoted text may have several lines."""


@dataclass(frozen=True)
class CardSettings:
    """Model card."""

    name: str = ""
    """Name of the model and of its GGUF files; default: the name of the output folder."""
    base_model: str = ""
    """Hub id of the source model; default: that of the training."""
    license: str = ""
    """SPDX name of the source's licence, such as apache-2.0; default: that of the training."""
    language: str = "en"
    """Language of the model."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            flags.require(self, item.name, re.fullmatch(r"[\w.+/-]*", value) is not None, "must be one plain word")
        flags.require(self, "name", "/" not in self.name, "must be one plain word without the owner")
        flags.require(self, "name", self.name not in (".", ".."), "must be one plain word")


@dataclass(frozen=True)
class HubEntry:
    """One artefact in the repository."""

    artefact: Path
    manifest: Manifest
    target: str
    """Its file (GGUF) or folder in the repository."""
    size: str = ""
    """Its parameters, as in 81.4M, if the repository has several sizes of a runtime and type."""

    @property
    def is_file(self) -> bool:
        return self.manifest.engine == "llama.cpp"

    @property
    def num_bytes(self) -> int:
        """Return the bytes of its files in the repository."""
        return self.manifest.files[self.manifest.model_file]["bytes"] if self.is_file else self.manifest.total_bytes


def _library(manifest: Manifest) -> str:
    return LIBRARIES.get(manifest.engine, manifest.engine)


def write_hub_folder(
    output: Path, artefacts: Sequence[Path], bench: Sequence[Path], settings: CardSettings, overwrite: bool = False
) -> Path:
    """Write the folder `output` completely or not at all.

    Raises UsageError for unusable arguments, and ArtefactError for a damaged artefact.
    """
    settings = _with_name(settings, output)
    entries, runs = _hub_entries(artefacts, settings.name), [Run.read(path) for path in bench]
    settings = _with_source(settings, entries[0].manifest.training)
    for path, run in zip(bench, runs, strict=True):
        if not any(_result_of(entry, [run]) for entry in entries):
            raise UsageError(f"--bench {path} measured none of these artefacts; remove it, or measure them")
    remedy = "name another folder, or give --overwrite to replace it"
    with atomic_output(output, overwrite, _foreign_files, [*artefacts, *bench], remedy, "OUTPUT") as folder:
        for entry in entries:
            _add_files(entry, folder)
        text = model_card(entries, runs, settings) + "\n"
        (folder / CARD).write_text(text, encoding="utf-8")
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        hashes = {path.relative_to(folder).as_posix(): _hash_of(path) for path in files}
        (folder / CARD).write_text(f"{text}{MARK}{json.dumps(hashes)}{MARK_END}\n", encoding="utf-8")
    return output


def _with_name(settings: CardSettings, output: Path) -> CardSettings:
    """Return the settings with the folder's name as default. Raises UsageError if that is not a plain word."""
    try:
        return settings if settings.name else replace(settings, name=output.absolute().name)
    except OptionError as error:
        raise UsageError(f"the name of {output} is not one plain word; rename the folder, or give --name") from error


def _with_source(settings: CardSettings, training: dict[str, Any]) -> CardSettings:
    """Return the settings with the source's licence and name that the training noted as defaults."""
    for name in ("base_model", "license"):
        with contextlib.suppress(OptionError, TypeError):  # the words of another's card may be anything
            settings = replace(settings, **{name: getattr(settings, name) or training.get(name, "")})
    return settings


def _hub_entries(artefacts: Sequence[Path], name: str) -> list[HubEntry]:
    """Return the entries of verified artefacts. The number of parameters is in their names only where it differs."""
    opened = [_verified(path) for path in artefacts]
    kinds = {_kind(manifest) for _, manifest in opened}
    shapes = {(_kind(manifest), _size(manifest)) for _, manifest in opened}
    has_sizes = len(shapes) > len(kinds)
    entries: list[HubEntry] = []
    for path, manifest in opened:
        size = _size(manifest) if has_sizes else ""
        targets = [entry.target for entry in entries]
        target = _target(manifest, name, size, targets)
        others = [(_kind(entry.manifest), entry.size) for entry in entries]
        if target in targets or (_kind(manifest), size) in others:
            each = "each runtime, type and number of parameters" if size else "each runtime and type"
            raise UsageError(f"{path}: a second {' in '.join(_kind(manifest))}; give one artefact of {each}")
        entries.append(HubEntry(path, manifest, target, size))
    return entries


def _kind(manifest: Manifest) -> tuple[str, str]:
    return manifest.engine, manifest.quantization


def _target(manifest: Manifest, name: str, size: str, targets: Sequence[str]) -> str:
    """Return the file or folder of an artefact in the repository. `targets`: those of the artefacts before it."""
    if manifest.engine == "llama.cpp":
        return "-".join(filter(None, (name, size, manifest.quantization.upper()))) + ".gguf"
    library = _library(manifest)
    if library == "onnx" and ONNX_FOLDER not in targets:
        return ONNX_FOLDER
    return "-".join(filter(None, (library, size, manifest.quantization)))


def _verified(path: Path) -> tuple[Path, Manifest]:
    """Return an artefact's folder and manifest. Raises an error if it is damaged or has no manifest."""
    artefact = Artefact.open(path)
    artefact.verify()
    if artefact.manifest is None:
        raise UsageError(f"{path} has no {MANIFEST_NAME}; give a folder written by efficientllm-export")
    return artefact.path, artefact.manifest


def _size(manifest: Manifest) -> str:
    """Return the parameters of a model in words, or "" if its manifest lacks them."""
    count = manifest.architecture.get("num_parameters", 0)
    return format_count(count) if count else ""


def _add_files(entry: HubEntry, folder: Path) -> None:
    """Add the files of an entry, and those that programs read beside it."""
    if entry.is_file:
        _link(entry.artefact / entry.manifest.model_file, folder / entry.target)
        _add_ollama_files(entry, folder)
        return
    for name in (*entry.manifest.files, MANIFEST_NAME):
        target = folder / entry.target / name
        target.parent.mkdir(parents=True, exist_ok=True)
        _link(entry.artefact / name, target)
    for name in TRANSFORMERS_JS_FILES:
        if entry.target == ONNX_FOLDER and name in entry.manifest.files:
            _link(entry.artefact / name, folder / name)


def _link(source: Path, target: Path) -> None:
    """Create a hard link to a large file, and a copy of a small one."""
    if source.stat().st_size >= MIN_LINK_BYTES:
        link_or_copy(source, target)
    else:
        shutil.copyfile(source, target)


def _add_ollama_files(entry: HubEntry, folder: Path) -> None:
    """Write Ollama's files from the first Modelfile. Ollama reads one set for all files of a repository."""
    try:
        files = ollama_files((entry.artefact / OLLAMA_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except UnicodeDecodeError as error:
        raise ArtefactError(f"{entry.artefact / OLLAMA_FILE} is not UTF-8; write it again, or delete it") from error
    if any((folder / name).exists() for name in OLLAMA_HUB_FILES):  # of an earlier entry
        return
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def ollama_files(modelfile: str) -> dict[str, str]:
    """Return {file: text} of a Modelfile. As in Ollama, the last of several templates counts."""
    # from its text, not from the manifest: the user may have edited it since the export
    parameters: dict[str, Any] = {}
    template = None
    for command in MODELFILE_COMMAND.finditer(modelfile):  # a command inside another one's text does not match
        text = next(each for each in (command["long"], command["quoted"], command["plain"]) if each is not None)
        parameter = (command["parameter"] or "").lower()
        if parameter == "stop":
            parameters.setdefault("stop", []).append(text)
        elif parameter:
            parameters[parameter] = _parameter_value(text)
        elif command["name"].lower() == "template":
            template = text
    files = {}
    if template is not None:
        files["template"] = template
    if parameters:
        files["params"] = json.dumps(parameters, ensure_ascii=False, indent=2) + "\n"
    return files


def _parameter_value(text: str) -> bool | int | float | str:
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) else text


def _foreign_files(folder: Path) -> list[str]:
    """Return the files that this command did not write, or that were changed since. Without a card, all files."""
    known = _recorded_hashes(folder)
    return unknown_files(folder, known, lambda path, name: _hash_of(path) == known[name])


def _recorded_hashes(folder: Path) -> dict[str, str]:
    try:
        last_line = (folder / CARD).read_text(encoding="utf-8").rstrip().rpartition("\n")[2]
        if not last_line.startswith(MARK):
            return {}
        hashes = json.loads(last_line.removeprefix(MARK).removesuffix(MARK_END))
    except (OSError, ValueError):
        return {}
    if not isinstance(hashes, dict):
        return {}
    return {str(name): str(digest) for name, digest in hashes.items()}


def _hash_of(file: Path) -> str:
    """Return the SHA-256 of a file, and of the card without its last line."""
    if file.name != CARD:
        return sha256_of(file)
    return hashlib.sha256(file.read_bytes().partition(MARK.encode())[0]).hexdigest()


def model_card(entries: Sequence[HubEntry], runs: Sequence[Run], settings: CardSettings) -> str:
    """Return the repository's README: front matter, files with figures, quality, commands and licence."""
    first = entries[0].manifest
    training = first.training
    sizes = {entry.size: entry for entry in entries}
    counts = list(sizes) if len(sizes) > 1 else [_size(first)]
    became = _listed(counts) if len(counts) > 1 else f"{training.get('parameters', 0):,}"
    qualities = {size: entry.manifest.training.get("quality") for size, entry in sizes.items()}
    jobs: list[list[str]] = []
    for entry in entries:
        header, *rows = job_rows(entry.manifest.jobs)
        if rows and not jobs:
            jobs.append(["file", *header])
        jobs += [[entry.target, *row] for row in rows]
    devices: list[str] = []
    for run in runs:
        devices += [device_line(run.device, run.options.threads), *origin_lines(run)]
    return fill_template(
        "efficientllm.devices",
        "hub_card.md.jinja",
        settings=settings,
        size=f": {_listed(counts)} parameters" if counts[0] else "",
        libraries=list(dict.fromkeys(_library(entry.manifest) for entry in entries)),
        is_pruned=training.get("source_parameters", 0) > training.get("parameters", 0),
        relation="finetune" if training else "quantized",
        training={"source": "", "source_parameters": 0, **training},
        became=became,
        tokens=max(entry.manifest.training.get("tokens", 0) for entry in entries),
        qualities={size: quality for size, quality in qualities.items() if quality},
        files=_file_rows(entries, runs),
        devices=devices,
        limits=[f"{each.target}: {limit}".replace("<", "&lt;") for each in entries for limit in each.manifest.limits],
        jobs=jobs,
        jobs_note=JOBS_NOTE,
        commands=[_command(entry) for entry in entries],
        yaml=_yaml,
        markdown_table=markdown_table,
        contract_rows=contract_rows,
    )


def _listed(words: Sequence[str]) -> str:
    """Return "a, b and c"."""
    *before, last = words
    return " and ".join(filter(None, (", ".join(before), last)))


def _yaml(word: str) -> str:
    """Return a word quoted if YAML would read it as another type, such as `no`."""
    is_plain = re.fullmatch(r"[A-Za-z][\w.+/-]*", word) and word.lower() not in YAML_WORDS
    return word if is_plain else json.dumps(word)


def _file_rows(entries: Sequence[HubEntry], runs: Sequence[Run]) -> list[list[str]]:
    """Return the header and one row per artefact, with its figures in the first run that measured it."""
    results = [_result_of(entry, runs) for entry in entries]
    tests = list(dict.fromkeys(test for result in results if result for test in result.speeds))
    has_memory = any(results)
    has_sizes = any(entry.size for entry in entries)
    held_out = _held_out(entries) if has_sizes else {}
    header = ["file", "runtime", "type"]
    if has_sizes:
        header += ["parameters", *held_out]
    header += ["bytes", "KL", *(f"{test} t/s" for test in tests)]
    if has_memory:
        header.append("peak memory")
    rows = [header]
    for index, (entry, result) in enumerate(zip(entries, results, strict=True)):
        row = [entry.target, *_kind(entry.manifest)]
        if has_sizes:
            row += [entry.size, *(f"{values[index]:.3f}" for values in held_out.values())]
        row += [format_bytes(entry.num_bytes), _mean_kl(entry.manifest)]
        for test in tests:
            figure = result.speeds.get(test) if result else None
            row.append(figure.describe(figure.digits) if figure else "")
        if has_memory:
            row.append(format_bytes(result.peak_rss_bytes) if result else "")
        rows.append(row)
    return rows


def _mean_kl(manifest: Manifest) -> str:
    verification = manifest.verification
    compared = verification.get("quantized") or verification.get("exact") or {}
    return f"{compared['mean_kl']:.4f}" if "mean_kl" in compared else "not verified"


def _held_out(entries: Sequence[HubEntry]) -> dict[str, list[float]]:
    """Return {title: figures of all entries} of the held-out text, or {} if they cannot be compared.

    Perplexities of different vocabularies cannot. Bits per byte can.
    """
    trainings = [entry.manifest.training for entry in entries]
    bits = [training.get("bits_per_byte", {}).get("final") for training in trainings]
    perplexities = [training.get("perplexity", {}).get("final") for training in trainings]
    if all(bits):
        return {"held-out bits per byte": bits}
    has_one_vocabulary = len({entry.manifest.architecture.get("vocab_size") for entry in entries}) == 1
    return {"held-out perplexity": perplexities} if has_one_vocabulary and all(perplexities) else {}


def _result_of(entry: HubEntry, runs: Sequence[Run]) -> Result | None:
    """Return the first result of the same files, in any folder."""
    files = entry.manifest.files
    results = (result for run in runs for result in run.results)
    return next((result for result in results if result.manifest.get("files") == files), None)


def _command(entry: HubEntry) -> str:
    if entry.is_file:
        return f"llama-server -m {entry.target}    # or efficientllm-chat, Ollama, LM Studio, Jan"
    if entry.manifest.engine == "litert-lm":  # not an engine of efficientllm-chat
        return f"litert-lm run {entry.target}/{entry.manifest.model_file}"
    if entry.manifest.engine == "openvino-genai":
        return f"# OpenVINO GenAI: openvino_genai.LLMPipeline('{entry.target}', 'CPU')"
    if entry.manifest.engine == "wllama":
        return f"efficientllm-serve-web {entry.target}    # or any web server"
    if entry.manifest.engine == "transformers":
        return f"# transformers: AutoModelForCausalLM.from_pretrained('{entry.target}')"
    if entry.target == ONNX_FOLDER:
        return f"efficientllm-chat {entry.target}    # or transformers.js: from_pretrained('OWNER/NAME')"
    return f"efficientllm-chat {entry.target}"


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        CardSettings,
        prog="efficientllm-hub",
        examples=("hub hub/small small-gguf", "hub hub/small small-gguf small-onnx --bench laptop.json"),
        description="Write a folder for a repository of a model hub: files under the names that programs expect, and "
        "a card with the figures. Nothing is uploaded.",
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder to write")
    parser.add_argument("artefacts", nargs="+", metavar="ARTEFACT", help="folder written by efficientllm-export")
    parser.add_argument(
        "--bench", action="append", metavar="JSON", help="file of efficientllm-bench --json with speeds, repeatable"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that this command wrote")
    return parser


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    output, overwrite = Path(arguments.pop("output")), arguments.pop("overwrite")
    artefacts, bench = map(Path, arguments.pop("artefacts")), map(Path, arguments.pop("bench") or ())
    settings = flags.take(arguments, CardSettings)
    folder = write_hub_folder(output, list(artefacts), list(bench), settings, overwrite)
    print(f"folder: {folder}")
    print(f"to publish: hf upload OWNER/{settings.name or folder.absolute().name} {folder}")
    return 0
