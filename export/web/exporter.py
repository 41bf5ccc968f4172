"""`--target web`: the GGUF in parts, llama.cpp in WebAssembly, and a chat page."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from ...runtime.base.files import sha256_of, write_json_atomically
from ..checkpoint import Checkpoint
from ..gguf.exporter import GgufOptions, check_gguf, write_model
from ..greedy import greedy_check
from ..manifest import generation_defaults, write_manifest
from ..request import ExportRequest, log
from ..targets import Exporter
from .wllama import COMPAT, VERSION, WLLAMA, copy_wllama

PAGE_FILES = ("index.html", "app.css", "app.js", "parts.js", "icon.svg", "sw.js")
"""Our files, copied unchanged except for two marks in the service worker."""

SETTINGS_FILE = "model.json"
WEB_MANIFEST = "app.webmanifest"
MAX_CONTEXT = 2048
"""Tokens of context that the page requests, for the memory of a phone."""


@dataclass(frozen=True)
class WebOptions(GgufOptions):
    """--target web."""

    wllama: str = ""
    """Folder with wllama's two npm tarballs, for machines without npm or network; default: `npm pack`, once."""


PART_BYTES = 8 << 20
"""Largest loss of an interrupted download. Hosts of static files accept 25 to 100 MB."""
CHECKED_TOKENS = 64
"""Greedy tokens that the page compares."""


@dataclass(frozen=True)
class Part:
    """One piece of the file."""

    file: str
    bytes: int
    sha256: str


def export_web(checkpoint: Checkpoint, request: ExportRequest[WebOptions], folder: Path) -> None:
    """Write a folder for any file server. A failure leaves nothing behind."""
    runtime_files = copy_wllama(folder, request.options.wllama)  # first: what it lacks is known before minutes of work
    contents = write_model(checkpoint, request, folder)
    model = folder / contents.files[0]
    request.clock.begin("answering")
    check = greedy_check(model, count=CHECKED_TOKENS)
    parts = _split_file(model, folder)
    model.unlink()
    name = Path(checkpoint.name).name
    settings = {
        "name": name,
        "quantization": contents.quantization,
        "parameters": checkpoint.architecture.num_parameters,
        "context": min(checkpoint.context_length, MAX_CONTEXT),
        "defaults": generation_defaults(checkpoint),
        "runtime": f"wllama {VERSION}",
        "check": asdict(check),
        "parts": [asdict(part) for part in parts],
    }
    write_json_atomically(folder / SETTINGS_FILE, settings)
    write_json_atomically(folder / WEB_MANIFEST, web_manifest(name))
    _write_page(folder, parts)
    files = [SETTINGS_FILE, WEB_MANIFEST, *PAGE_FILES, *runtime_files, *(part.file for part in parts)]
    contents = replace(contents, engine="wllama", files=files, layout=f"web page, {contents.layout}")
    write_manifest(checkpoint, request, folder, contents)
    log.info("open it with: efficientllm-serve-web %s", request.output)


EXPORTER = Exporter(WebOptions, export_web, check_gguf)


def _split_file(path: Path, folder: Path) -> list[Part]:
    """Split `path` into FOLDER/model-000.part and so on, which concatenate to the file."""
    # so that a browser can continue an interrupted download
    parts = []
    with path.open("rb") as stream:
        while content := stream.read(PART_BYTES):
            name = f"model-{len(parts):03d}.part"
            (folder / name).write_bytes(content)
            parts.append(Part(name, len(content), sha256_of(folder / name)))
    return parts


def web_manifest(name: str) -> dict[str, Any]:
    """Return the web app manifest, with which a browser installs the page (https://www.w3.org/TR/appmanifest/)."""
    icon = {"src": "icon.svg", "sizes": "any", "type": "image/svg+xml", "purpose": "any maskable"}
    return {
        "name": name,
        "short_name": name[:12],
        "id": "./",
        "start_url": "./",
        "display": "standalone",
        "background_color": "#15171b",
        "theme_color": "#1d2026",
        "icons": [icon],
    }


def _write_page(folder: Path, parts: list[Part]) -> None:
    """Copy the page. Its service worker gets the list of files and a version that changes with any of them."""
    source = resources.files(__name__.rpartition(".")[0])
    for name in PAGE_FILES:
        (folder / name).write_text(source.joinpath(name).read_text(encoding="utf-8"), encoding="utf-8")
    shell = ["./", SETTINGS_FILE, WEB_MANIFEST, *(name for name in PAGE_FILES if name != "sw.js")]
    shell += WLLAMA.files.values()
    digest = hashlib.sha256("".join(part.sha256 for part in parts).encode())
    for name in sorted({*shell, *COMPAT.files.values(), "sw.js"} - {"./"}):
        digest.update((folder / name).read_bytes())
    worker = folder / "sw.js"
    text = worker.read_text(encoding="utf-8").replace("@VERSION@", digest.hexdigest()[:16])
    worker.write_text(text.replace("@SHELL@", " ".join(shell)), encoding="utf-8")
