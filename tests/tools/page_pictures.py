"""The pictures of docs/server.md: `python tests/tools/page_pictures.py ARTEFACT` asks questions on the real page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from chromium import chromium
from serving import serve

from efficientllm.runtime.engines.engine import EngineOptions
from efficientllm.server.app import AppOptions
from efficientllm.server.models.pool import ModelPool

QUESTIONS = ("Name three planets.", "Write a Python function that adds two numbers.")
FOLDER = Path(__file__).resolve().parents[2] / "docs" / "images"

PICTURES = {
    "chat": ("light", 1000, 640),
    "chat-phone": ("dark", 390, 640),
}
"""File -> colour scheme and size of the window."""


def picture(browser: Any, address: str, name: str) -> None:
    """Ask the questions in a new window and keep what it shows."""
    scheme, width, height = PICTURES[name]
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": height}, has_touch=width < 500
    )
    page = context.new_page()
    page.goto(address)
    page.locator("#model option").first.wait_for(state="attached")
    page.evaluate("document.getElementById('panel').open = true")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "160")
    page.evaluate("document.getElementById('panel').open = false")
    for number, question in enumerate(QUESTIONS, 1):
        page.fill("#question", question)
        page.click("#send")
        page.locator(".assistant .tools").nth(number - 1).get_by_text("tokens/s").wait_for(timeout=120_000)
    page.screenshot(path=FOLDER / f"{name}.png")
    context.close()


def main() -> None:
    pool = ModelPool({"SmolLM2-135M": sys.argv[1]}, EngineOptions(threads=1, context=2048))
    with serve(pool, AppOptions()) as address, chromium() as browser:
        for name in PICTURES:
            picture(browser, address, name)


if __name__ == "__main__":
    main()
