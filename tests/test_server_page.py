"""The chat page in a real headless Chromium."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import serve

from efficientllm.runtime.engines.engine import EngineOptions
from efficientllm.server.app import AppOptions
from efficientllm.server.pool import ModelPool

expect: Any = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def address(artefact: Path) -> Iterator[str]:
    pool = ModelPool({"tiny": str(artefact), "twin": str(artefact / "model.gguf")}, EngineOptions(threads=1))
    with serve(pool, AppOptions()) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    context = browser.new_context()
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: errors.append(request.url) if not request.url.startswith(address) else None)
    page.goto(address)
    expect(page.locator("#model option")).to_have_count(2)
    yield page
    context.close()
    assert not errors, errors


def ask(page: Any, text: str) -> None:
    page.fill("#question", text)
    page.press("#question", "Enter")


def wait_for_answer(page: Any) -> str:
    expect(page.locator("#figures")).to_have_text(re.compile("MB resident"))  # written last
    expect(page.locator("#send")).to_be_enabled()
    return page.locator(".assistant").last.text_content()


def test_answers_stream_and_figures_show(page: Any) -> None:
    page.click("summary")
    page.fill("#max_tokens", "24")
    page.fill("#seed", "7")
    ask(page, "Hello")
    answer = wait_for_answer(page)
    assert answer
    assert page.locator(".user").text_content() == "Hello"
    expect(page.locator("#figures")).to_have_text(re.compile(r"first token \d+ ms, .* tokens/s, \d+ tokens, \d+ MB"))
    # the conversation outlives the page, settings too
    page.reload()
    assert page.locator(".assistant").last.text_content() == answer
    assert page.input_value("#max_tokens") == "24"
    page.click("#new")
    assert page.locator(".assistant").count() == 0


def test_an_answer_can_be_stopped(page: Any) -> None:
    page.click("summary")
    page.fill("#max_tokens", "100000")
    page.fill("#seed", "3")
    ask(page, "Go on")
    expect(page.locator(".assistant")).to_have_text(re.compile("..."))
    page.keyboard.press("Escape")
    assert wait_for_answer(page)
    assert page.evaluate("fetch('health').then((answer) => answer.json()).then((body) => body.status)") == "ok"


def test_refusals_are_shown_and_the_question_is_kept(page: Any) -> None:
    question = "word " * 600
    ask(page, question)
    page.wait_for_selector(".error")
    assert "context window" in page.locator(".error").text_content()
    assert page.input_value("#question") == question.strip()


def test_the_second_model_can_be_picked(page: Any) -> None:
    page.select_option("#model", "twin")
    page.click("summary")
    page.fill("#max_tokens", "4")
    ask(page, "Hi")
    wait_for_answer(page)
    loaded = page.evaluate("fetch('health').then((answer) => answer.json()).then((body) => Object.keys(body.loaded))")
    assert loaded == ["tiny", "twin"]


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1100, "light")])
def test_it_fits_phones_and_both_color_schemes(browser: Any, address: str, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 640}, color_scheme=scheme)
    page = context.new_page()
    page.goto(address)
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    if folder := os.environ.get("EFFICIENTLLM_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/page-{scheme}.png")
    context.close()
