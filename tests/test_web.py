"""`--target web`: what the folder holds, how it is served, and what a real Chromium makes of it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import http.server
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM, chromium
from exporting import export
from tiny import tiny_architecture, tiny_model
from transformers import PreTrainedTokenizerFast

from efficientllm.export.web import exporter, wllama
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.server import web
from efficientllm.train.model.irregular import save_checkpoint

expect: Any = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

PATIENCE_MS = 120_000
"""Of a busy machine, on which the tiny model takes half a minute to load."""

TARBALLS = Path(__file__).parents[1] / "build/node"
PART_BYTES = 1 << 17
PACK = f"npm pack --pack-destination build/node @wllama/wllama@{wllama.VERSION} @wllama/wllama-compat@{wllama.VERSION}"

pytestmark = pytest.mark.xdist_group("web")
needs_wllama = pytest.mark.skipif(
    not all((TARBALLS / package.tarball).is_file() for package in (wllama.WLLAMA, wllama.COMPAT)),
    reason=f"wllama is missing ({PACK})",
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(tiny_model(tiny_architecture()), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny unequal model in parts of 128 KiB; f32, so that no kernel rounds its greedy tokens away."""
    output = tmp_path_factory.mktemp("web") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "PART_BYTES", PART_BYTES)
        assert export(checkpoint, "web", output, "--quantize", "f32", "--wllama", str(TARBALLS)) == 0
    return output


@contextlib.contextmanager
def served(folder: Path, isolated: bool = True) -> Iterator[str]:
    """The folder behind `efficientllm-serve-web`, or behind a server that sends none of its headers."""
    plain = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = web.web_server(folder, web.WebServerOptions(port=0))
    if not isolated:
        server.RequestHandlerClass = plain  # type: ignore[assignment]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@needs_wllama
def test_the_parts_are_the_gguf_and_the_manifest_knows_every_file(
    folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    assert export(checkpoint, "gguf", tmp_path / "gguf", "--quantize", "f32", "--no-verify") == 0
    settings = json.loads((folder / "model.json").read_text())
    parts = [(folder / part["file"]).read_bytes() for part in settings["parts"]]
    assert b"".join(parts) == (tmp_path / "gguf" / "model.gguf").read_bytes()
    assert [len(part) for part in parts[:-1]] == [PART_BYTES] * (len(parts) - 1)
    assert [hashlib.sha256(part).hexdigest() for part in parts] == [part["sha256"] for part in settings["parts"]]
    manifest = Manifest.read(folder)
    manifest.check_files(folder)
    assert manifest.files.keys() == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert manifest.verification["exact"]["max_logit_difference"] < 1e-3
    assert "Permission is hereby granted" in (folder / "wllama-LICENCE.txt").read_text()


@needs_wllama
def test_new_export_replaces_the_copy_of_the_browser(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "web"
    shutil.copytree(folder, copy)
    assert export(checkpoint, "web", copy, "--wllama", str(TARBALLS), "--no-verify") == 2  # not without --overwrite
    assert export(checkpoint, "web", copy, "--wllama", str(TARBALLS), "--no-verify", "--overwrite") == 0

    def version(of: Path) -> str:
        found = re.search('VERSION = "([0-9a-f]{16})"', (of / "sw.js").read_text())
        assert found is not None
        return found[1]

    assert version(copy) != version(folder)
    assert Manifest.read(copy).quantization == "q8_0"
    assert len(list(copy.glob("*.part"))) == 1


def test_machine_without_npm_gets_the_remedy(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EFFICIENTLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(wllama.shutil, "which", lambda name: None)
    assert export(checkpoint, "web", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "needs npm, which is not installed: install Node.js, or give --wllama FOLDER" in error
    assert len(error.splitlines()) == 1
    (tmp_path / wllama.WLLAMA.tarball).write_bytes(b"something else")
    assert export(checkpoint, "web", tmp_path / "out", "--wllama", str(tmp_path)) == 2
    assert "is not @wllama/wllama@" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_error_shows_the_message_of_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    program = tmp_path / "npm"
    program.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("EFFICIENTLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(wllama.shutil, "which", lambda name: str(program))
    with pytest.raises(wllama.UsageError, match="failed: npm error code ENOTFOUND; try again, or give --wllama"):
        wllama.copy_wllama(tmp_path, "")


@needs_wllama
def test_the_server_isolates_the_page_and_shows_no_more_than_the_folder(folder: Path) -> None:
    with served(folder) as address:
        connection = http.client.HTTPConnection(address.split("/")[2])

        def get(path: str) -> http.client.HTTPResponse:
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            return response

        page = get("/")
        assert page.status == 200
        assert page.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert page.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert get("/wllama.wasm").headers["Content-Type"] == "application/wasm"
        assert get("/app.webmanifest").headers["Content-Type"] == "application/manifest+json"
        assert get("/../checkpoint/config.json").status == 404
        connection.close()


def test_a_folder_without_a_page_is_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(web.body, [str(tmp_path)]) == 2
    assert "has no index.html; write a page with efficientllm-export --target web" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    expect.set_options(timeout=PATIENCE_MS)
    with chromium() as browser:
        yield browser


Visit = Callable[..., Any]


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    """visit(address, **context) -> a page of a fresh profile; no script error, no request to anywhere else."""
    contexts, errors = [], []

    def open_page(address: str, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith((address, "blob:")) else errors.append(request.url),
        )
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors, errors


def load_model(page: Any) -> None:
    page.click("#load")
    expect(page.locator("#question")).to_be_enabled(timeout=PATIENCE_MS)


def check_model(page: Any) -> str:
    page.evaluate("document.getElementById('panel').open = true")
    page.click("#check")
    expect(page.locator("#verdict")).to_have_text(re.compile("greedy|differs|error"), timeout=PATIENCE_MS)
    verdict = page.locator("#verdict").text_content()
    page.evaluate("document.getElementById('panel').open = false")
    return verdict


def screen(width: int, scheme: str) -> dict[str, Any]:
    """Settings of a browser's context."""
    return {"viewport": {"width": width, "height": 640}, "color_scheme": scheme}


def expect_it_fits(page: Any, width: int, scheme: str) -> None:
    """Nothing is wider than the screen, and the page has the colors that the system asks for."""
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


KEPT = """navigator.serviceWorker.ready.then(() => navigator.serviceWorker.controller || new Promise(
    (done) => navigator.serviceWorker.addEventListener("controllerchange", done, { once: true }))).then(() => true)"""
"""Until the service worker answers for the page. Playwright's own waiting evaluates strings, which the page forbids."""

SAME = "64 greedy tokens as on the machine that exported it"


@needs_wllama
@needs_chromium
@pytest.mark.slow
def test_the_page_answers_as_native_llama_cpp_and_without_its_server(folder: Path, visit: Visit) -> None:
    with served(folder) as address:
        page = visit(address)
        expect(page.locator("#offer")).to_have_text(re.compile("are downloaded once and kept"))
        load_model(page)
        assert check_model(page) == SAME
        expect(page.locator("#notes")).to_have_text("")
        page.evaluate(KEPT)
    page.reload()  # nobody listens there any more
    expect(page.locator("#question")).to_be_enabled(timeout=PATIENCE_MS)
    assert check_model(page) == SAME


@needs_wllama
@needs_chromium
@pytest.mark.slow
def test_answers_stream_stop_and_outlive_the_page_which_fits_a_screen(folder: Path, visit: Visit) -> None:
    with served(folder) as address:
        page = visit(address, **screen(1100, "light"))
        load_model(page)
        expect_it_fits(page, 1100, "light")
        page.fill("#max_tokens", "12")
        page.fill("#seed", "7")
        page.fill("#question", "Hello")
        page.press("#question", "Enter")
        expect(page.locator("#figures")).to_have_text(
            re.compile(r"first token \d+ ms, .* tokens/s, 12 tokens, read at")
        )
        answer = page.locator(".assistant").text_content()
        assert answer
        page.fill("#max_tokens", "2000")
        page.fill("#question", "Go on")
        page.press("#question", "Enter")
        expect(page.locator(".assistant").last).to_have_text(re.compile("..."))
        page.keyboard.press("Escape")
        expect(page.locator("#stop")).to_be_disabled()
        page.reload()
        assert page.locator(".assistant").first.text_content() == answer
        assert page.input_value("#max_tokens") == "2000"
        page.click("#new")
        assert page.locator(".assistant").count() == 0


@needs_wllama
@needs_chromium
@pytest.mark.slow
def test_broken_download_resumes_and_refuses_foreign_bytes(folder: Path, visit: Visit) -> None:
    with served(folder) as address:
        page = visit(address)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url.rpartition("/")[2]))
        page.route("**/model-001.part", lambda route: route.fulfill(body=b"x" * PART_BYTES))
        page.evaluate("() => { window.setTimeout = ((real) => (call) => real(call, 0))(window.setTimeout) }")
        page.click("#load")
        expect(page.locator("#state")).to_have_text(
            re.compile("model-001.part is not the file .*; what was downloaded")
        )
        assert asked.count("model-001.part") == 4
        page.unroute("**/model-001.part")
        load_model(page)
        assert asked.count("model-000.part") == 1
        assert asked.count("model-001.part") == 5
        assert check_model(page) == SAME


@needs_wllama
@needs_chromium
@pytest.mark.slow
def test_page_keeps_early_clicks(folder: Path, visit: Visit) -> None:
    with served(folder) as address:
        page = visit(address, service_workers="block")  # it would answer from what it keeps
        held: list[Any] = []
        page.route("**/model.json", lambda route: held.append(route))
        page.reload(wait_until="commit")
        expect(page.locator("#load")).to_be_disabled()
        while not held:
            page.wait_for_timeout(20)
        expect(page.locator("#load")).to_be_disabled()
        held[0].continue_()
        load_model(page)


@needs_wllama
@needs_chromium
@pytest.mark.slow
def test_a_server_without_the_headers_is_named_and_will_do_on_a_phone(folder: Path, visit: Visit) -> None:
    with served(folder, isolated=False) as address:
        page = visit(address, **screen(360, "dark"))
        expect(page.locator("#notes")).to_have_text("one thread: the server sends no COOP and COEP headers")
        load_model(page)
        assert check_model(page) == SAME
        expect_it_fits(page, 360, "dark")
