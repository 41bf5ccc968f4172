"""The pictures of docs/server.md: `python tests/tools/page_pictures.py ARTEFACT` asks questions on the real page; a
folder of `--target web` makes those of docs/web.md."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chromium import chromium
from serving import loaded_pool, serve

from efficientllm.runtime.engines.engine import EngineOptions
from efficientllm.server.options import AppOptions
from efficientllm.server.web import WebServerOptions, web_server

QUESTIONS = ("Name three planets.", "Write a Python function that adds two numbers.")
FOLDER = Path(__file__).resolve().parents[2] / "docs" / "images"

PICTURES = {
    "": ("light", 1000, 640),
    "-phone": ("dark", 390, 640),
}
"""End of the file's name -> colour scheme and size of the window."""


@contextlib.contextmanager
def window(browser: Any, address: str, name: str, end: str) -> Iterator[Any]:
    """The page in a new window, which is kept as it is at the end."""
    scheme, width, height = PICTURES[end]
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": height}, has_touch=width < 500
    )
    page = context.new_page()
    page.goto(address)
    yield page
    page.screenshot(path=FOLDER / f"{name}{end}.png")
    context.close()


def ask_server(page: Any) -> None:
    """The questions, on the page of efficientllm-serve."""
    page.locator("#model option").first.wait_for(state="attached")
    page.evaluate("document.getElementById('panel').open = true")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "160")
    page.evaluate("document.getElementById('panel').open = false")
    for number, question in enumerate(QUESTIONS, 1):
        page.fill("#question", question)
        page.click("#send")
        page.locator(".assistant .tools").nth(number - 1).get_by_text("tokens/s").wait_for(timeout=120_000)


def ask_web(page: Any) -> None:
    """The first question, on the page that runs the model itself."""
    page.click("#load")
    page.wait_for_selector("#question:enabled", timeout=300_000)
    page.evaluate("document.getElementById('panel').open = true")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "120")
    page.evaluate("document.getElementById('panel').open = false")
    page.fill("#question", QUESTIONS[0])
    page.click("#send")
    page.locator("#figures", has_text="tokens/s").wait_for(timeout=300_000)


def main() -> None:
    artefact = Path(sys.argv[1])
    with contextlib.ExitStack() as stack:
        if (artefact / "model.json").is_file():
            server = stack.enter_context(web_server(artefact, WebServerOptions(port=0)))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            name, address, ask = "web", f"http://127.0.0.1:{server.server_port}/", ask_web
        else:
            pool = loaded_pool({"SmolLM2-135M": str(artefact)}, EngineOptions(threads=1, context=2048))
            name, address, ask = "chat", stack.enter_context(serve(pool, AppOptions())), ask_server
        browser = stack.enter_context(chromium())
        for end in PICTURES:
            with window(browser, address, name, end) as page:
                ask(page)


if __name__ == "__main__":
    main()
