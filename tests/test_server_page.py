"""The chat page in a real headless Chromium."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM, chromium
from serving import loaded_pool, serve

from efficientllm.runtime.engines.engine import EngineOptions
from efficientllm.server.models.pool import ModelPool
from efficientllm.server.options import AppOptions

expect: Any = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
    pytest.mark.slow,
    pytest.mark.xdist_group("page"),
]


@pytest.fixture(scope="module")
def pool(artefact: Path) -> ModelPool:
    return loaded_pool({"tiny": str(artefact), "twin": str(artefact / "model.gguf")}, EngineOptions(threads=1))


@pytest.fixture(scope="module")
def address(pool: ModelPool) -> Iterator[str]:
    with serve(pool, AppOptions()) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


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


def ask(page: Any, text: str, **settings: object) -> None:
    if settings:
        page.evaluate("document.getElementById('panel').open = true")
        for name, value in settings.items():
            page.fill(f"#{name}", str(value))
    page.fill("#question", text)
    page.press("#question", "Enter")


def wait_for_answer(page: Any) -> str:
    expect(page.locator("#figures")).to_have_text(re.compile("MB resident"))  # written last
    expect(page.locator("#send")).to_be_enabled()
    return page.locator(".assistant .text").last.text_content()


LONG: dict[str, object] = {"max_tokens": 100_000, "seed": 3, "temperature": 1}


def test_answers_stream_and_figures_show(page: Any) -> None:
    ask(page, "Hello", max_tokens=24, seed=7)
    answer = wait_for_answer(page)
    assert answer
    assert page.locator(".user .text").text_content() == "Hello"
    figures = re.compile(r"first token \d+ ms, .* tokens/s, \d+ tokens")
    expect(page.locator("#figures")).to_have_text(figures)
    expect(page.locator(".assistant .tools")).to_have_text(figures)
    # the conversation outlives the page, settings too
    page.reload()
    assert page.locator(".assistant .text").last.text_content() == answer
    assert page.input_value("#max_tokens") == "24"
    page.click("#new")
    assert page.locator(".assistant").count() == 0


def test_page_shows_an_answer_after_two_seconds_of_silence(page: Any, pool: ModelPool) -> None:
    """The server sends a comment after a second without a token."""
    with pool.loaded["tiny"].engine.caches():  # no pass of the engine can start
        ask(page, "Hello", max_tokens=4, seed=7)
        page.wait_for_timeout(2000)
    assert wait_for_answer(page)
    assert page.locator(".error").count() == 0


EVENT = '{"choices": [{"delta": {"content": "%s"}}]}'


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_page_reads_events_by_their_standard(page: Any, end: str) -> None:
    first, second = EVENT % "A", EVENT % "B"
    lines = [": ping", "event: x", f"data:{first}", "", "id", ":", "", f"data: {second[:12]}", f"data: {second[12:]}"]
    lines += ["retry: 5", "", "data: [DONE]", "", ""]
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, body=end.join(lines)))
    ask(page, "Hello")
    assert wait_for_answer(page) == "AB"
    assert page.locator(".error").count() == 0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "The server does not answer. Check that it is running."),
        ((502, "<html>"), "The server refused the request: 502 Bad Gateway"),
        ((200, "data: <html>\n\n"), "The server sent an answer that this page cannot read. Reload the page."),
        ((200, f"data: {EVENT}\n\n"), "The connection to the server broke before the answer was complete. Ask again."),
    ],
)
def test_page_tells_failure_in_sentence(page: Any, answer: tuple[int, str] | None, message: str) -> None:
    def reply(route: Any) -> None:
        route.fulfill(status=answer[0], body=answer[1]) if answer else route.abort()

    page.route("**/v1/chat/completions", reply)
    ask(page, "Hello")
    expect(page.locator(".error .text")).to_have_text(message)


def test_an_answer_can_be_stopped(page: Any) -> None:
    ask(page, "Go on", **LONG)
    expect(page.locator(".assistant .text")).to_have_text(re.compile("..."))
    page.keyboard.press("Escape")
    assert wait_for_answer(page)
    assert page.evaluate("fetch('health').then((answer) => answer.json()).then((body) => body.status)") == "ok"


def test_a_new_chat_amid_an_answer_leaves_it_where_it_belongs(page: Any) -> None:
    ask(page, "First question", **LONG)
    expect(page.locator(".assistant .text")).to_have_text(re.compile("..."))
    page.click("#new")
    expect(page.locator(".empty")).to_be_visible()
    ask(page, "Second question", max_tokens=4)
    wait_for_answer(page)
    assert page.locator(".user .text").all_text_contents() == ["Second question"]
    page.reload()
    assert page.locator(".user .text").all_text_contents() == ["Second question"]
    page.click("#chats .title >> text=First question")
    assert page.locator(".user .text").all_text_contents() == ["First question"]
    assert page.locator(".assistant .text").text_content()
    page.click("#chats [aria-label='Delete \"First question\"']")
    assert page.locator("#chats .title").all_text_contents() == ["Second question"]


def test_the_view_stays_where_the_reader_scrolled_it(page: Any) -> None:
    page.set_viewport_size({"width": 700, "height": 420})
    ask(page, "Long\n\n" * 30, **LONG)
    expect(page.locator(".assistant .text")).to_have_text(re.compile("..."))
    page.evaluate("document.getElementById('log').scrollTop = 0")
    wait_for_answer(page)
    assert page.evaluate("document.getElementById('log').scrollTop") == 0


def test_answers_are_regenerated_and_questions_edited(page: Any) -> None:
    ask(page, "One", max_tokens=12, seed=1, temperature=1)
    first = wait_for_answer(page)
    page.fill("#seed", "2")
    page.click("text=Regenerate")
    expect(page.locator(".assistant .text")).not_to_have_text(first)
    wait_for_answer(page)
    assert page.locator(".message").count() == 2
    page.click(".user >> text=Edit")
    assert page.input_value("#question") == "One"
    expect(page.locator("#figures")).to_have_text(re.compile("Esc cancels"))
    page.keyboard.press("Escape")
    assert page.input_value("#question") == ""
    assert page.locator(".message").count() == 2
    page.click(".user >> text=Edit")
    ask(page, "Two")
    wait_for_answer(page)
    assert page.locator(".user .text").all_text_contents() == ["Two"]


@pytest.mark.parametrize("what", ["Regenerate", "Edit"])
def test_page_restores_the_chat_after_a_failed_answer(page: Any, what: str) -> None:
    show(page, ("user", "One"), ("assistant", "First"), ("user", "Two"), ("assistant", "Second"))
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, json={"error": {"message": "busy"}}))
    page.locator(f"text={what}").first.click()
    if what == "Edit":
        ask(page, "Another")
    page.wait_for_selector(".error")
    assert page.locator(".message:not(.error) .text").all_text_contents() == ["One", "First", "Two", "Second"]
    assert page.input_value("#question") == ("Another" if what == "Edit" else "")
    page.unroute("**/v1/chat/completions")
    page.reload()
    assert page.locator(".user .text").all_text_contents() == ["One", "Two"]


def test_two_tabs_keep_each_others_chats(page: Any) -> None:
    show(page, ("user", "Here"), ("assistant", "First"))
    other = page.context.new_page()
    other.goto(page.url)
    other.click("#new")
    ask(other, "There", max_tokens=4)
    wait_for_answer(other)
    expect(page.locator("#chats .title")).to_have_text(["There", "Here"])
    ask(page, "Here, too", max_tokens=4)
    wait_for_answer(page)
    other.reload()
    assert sorted(other.locator("#chats .title").all_text_contents()) == ["Here", "There"]


MARKDOWN = """# Title

Some **bold**, *soft* and `code < x`, [a link](https://example.org/), [no link](javascript:alert(1)).

1. one
   - inner
2. two

| a | b |
| --- | --- |
| 1 | 2 |

```python
print("<b>")
```

> quoted

<img src=x onerror="window.hurt = 1"><script>window.hurt = 1</script> ![pixel](https://example.org/x.png)
"""


def show(page: Any, *messages: tuple[str, str]) -> None:
    chat = {"id": "x", "messages": [{"role": role, "content": content} for role, content in messages]}
    page.evaluate(
        "(stored) => localStorage.setItem('efficientllm.chats', JSON.stringify(stored))",
        {"all": [chat], "current": "x", "settings": {}},
    )
    page.reload()


def test_markdown_is_shown_and_can_do_nothing(page: Any) -> None:
    show(page, ("user", "<i>me</i> **me**"), ("assistant", MARKDOWN))
    text = page.locator(".assistant .text")
    assert page.locator(".user .text").inner_html() == "&lt;i&gt;me&lt;/i&gt; **me**"
    for selector, content in {
        "h3": "Title",
        "strong": "bold",
        "em": "soft",
        "p > code": "code < x",
        "ol > li > ul > li": "inner",
        "td >> nth=1": "2",
        "blockquote": "quoted",
        "pre code": 'print("<b>")',
    }.items():
        assert text.locator(selector).text_content() == content, selector
    assert [link.get_attribute("href") for link in text.locator("a").all()] == [
        "https://example.org/",
        "https://example.org/x.png",
    ]
    assert text.locator("img, script").count() == 0
    assert page.evaluate("window.hurt") is None


def test_messages_and_code_are_copied_as_they_were_written(page: Any) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    show(page, ("user", "Q"), ("assistant", MARKDOWN))
    for selector, expected in (
        (".assistant pre >> text=Copy", 'print("<b>")'),
        (".assistant .tools >> text=Copy", MARKDOWN),
    ):
        page.click(selector)
        expect(page.locator("text=Copied")).to_have_count(1)
        assert page.evaluate("navigator.clipboard.readText()") == expected
        expect(page.locator("text=Copied")).to_have_count(0)


def test_refusals_are_shown_and_the_question_is_kept(page: Any) -> None:
    question = "word " * 6000
    ask(page, question)
    page.wait_for_selector(".error")
    assert "context window" in page.locator(".error").text_content()
    assert page.input_value("#question") == question.strip()


def test_the_second_model_can_be_picked(page: Any) -> None:
    page.select_option("#model", "twin")
    ask(page, "Hi", max_tokens=4)
    wait_for_answer(page)
    loaded = page.evaluate("fetch('health').then((answer) => answer.json()).then((body) => Object.keys(body.loaded))")
    assert loaded == ["tiny", "twin"]


CONTRASTS = """() => {
  const channel = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const back = (node) => {
    for (; node; node = node.parentElement) {
      const color = parse(getComputedStyle(node).backgroundColor);
      if (color.length < 4 || color[3] > 0.99) return color;
    }
    return [255, 255, 255];
  };
  const found = {};
  for (const node of document.querySelectorAll("body, body *")) {
    const hasText = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    const says = hasText || node.matches("input, textarea");
    if (!says || node.disabled || !node.checkVisibility()) continue;
    const [one, other] = [light(parse(getComputedStyle(node).color)), light(back(node))].sort((a, b) => b - a);
    found[`${node.tagName}.${node.className}#${node.id}`] = (one + 0.05) / (other + 0.05);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_the_contrast_of_wcag_aa(browser: Any, address: str, scheme: str) -> None:
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto(address)
    show(page, ("user", "Q"), ("assistant", MARKDOWN))
    expect(page.locator("#model option")).to_have_count(2)
    ask(page, "word " * 6000, max_tokens=4)
    page.wait_for_selector(".error")
    found = page.evaluate(CONTRASTS)
    assert {"BUTTON.main#send", "CODE.#", "A.#"} <= found.keys()
    assert {name: ratio for name, ratio in found.items() if ratio < 4.5} == {}
    if folder := os.environ.get("EFFICIENTLLM_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/chat-{scheme}.png")
    context.close()


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
