"""The page: what it may hold, and in a headless browser, where there is one, what it does."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from asgi import on_a_socket
from fake_worker import FakeWorker

from model.serving.http.app import ServerOptions, create_app
from model.serving.http.routes import PAGE, WEB

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DRAFTED = "span[class^=depth]"


def test_nothing_comes_from_elsewhere_and_text_is_never_html() -> None:
    html, css, script = (
        (WEB / name).read_text(encoding="utf-8") for name in ("index.html", "style.css", "app.js")
    )
    assert sorted(PAGE.values()) == sorted(path.name for path in WEB.iterdir())
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html + css)
    assert not re.search(
        r"https?:|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|Function\(", script
    )
    assert not re.search(
        r"<style|\sstyle=|\son\w+=|<script(?! src=\"app\.js\" defer></script>)", html
    )
    assert set(re.findall(r'\$\("(\w+)"\)', script)) <= set(re.findall(r'id="(\w+)"', html))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def worker() -> FakeWorker:
    return FakeWorker(step_s=0.002)


@pytest.fixture
def page(browser: Browser, worker: FakeWorker) -> Iterator[Page]:
    """The page of a running server. No script error and no breach of its policy may turn up."""
    bad: list[str] = []
    with on_a_socket(create_app(worker, ServerOptions()), worker) as address:
        page = browser.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: bad.append(str(error)))
        page.on("console", lambda said: bad.append(said.text) if said.type == "error" else None)
        page.goto(address)
        page.get_by_text("fake (F32), 512 tokens; drafts: three heads").wait_for()
        yield page
        page.close()
    assert [line for line in bad if "status of 4" not in line] == []


def write(page: Page, prompt: str, kind: str, draft: str) -> None:
    page.get_by_label(kind, exact=True).check()
    page.get_by_label(draft, exact=True).check()
    page.locator("#prompt").fill(prompt)
    page.locator("#prompt").press("Enter")


def test_accepted_drafts_are_tinted(page: Page, worker: FakeWorker) -> None:
    write(page, "<b onclick=alert(1)>hello</b>", "completion", "speculative")
    page.get_by_text("done", exact=True).wait_for()
    assert (
        worker.requests[0].draft == "auto"
        and worker.requests[0].prompt == "<b onclick=alert(1)>hello</b>"
    )
    form = r"(\d+) tokens, (\d+) of them drafted · [\d.]+ tokens/s · acceptance length ([\d.]+)"
    figures = re.search(form, page.locator(".figures").inner_text())
    assert figures and int(figures[1]) == 256
    assert page.locator(".panel").locator(DRAFTED).count() == int(figures[2]) > 50
    assert float(figures[3]) == pytest.approx(256 / (256 - int(figures[2])), abs=0.01)
    shown = page.locator(".text").evaluate("e => e.textContent")
    assert (
        shown.startswith("<b onclick=alert(1)>hello</b>")
        and len(shown.encode("utf-16-le")) // 2 > 256
    )
    tags = page.locator(".text").evaluate(
        "e => [...new Set([...e.querySelectorAll('*')].map(c => c.tagName))]"
    )
    assert tags == ["SPAN"]


def test_plain_has_no_tints_and_a_chat_remembers(page: Page, worker: FakeWorker) -> None:
    write(page, "hello", "chat", "plain")
    page.get_by_text("done", exact=True).wait_for()
    assert page.locator(".panel").locator(DRAFTED).count() == 0
    answer = page.locator(".text").evaluate("e => e.textContent")
    write(page, "and?", "chat", "plain")
    page.locator(".panel").nth(1).wait_for()
    page.get_by_text("done", exact=True).wait_for()
    assert [m["content"] for m in worker.requests[1].prompt if isinstance(m, dict)] == [
        "hello",
        answer,
        "and?",
    ]


def test_a_comparison_streams_both(page: Page, worker: FakeWorker) -> None:
    write(page, "hello", "completion", "compare")
    page.get_by_text("times as many tokens/s from the same steps").wait_for()
    assert [request.draft for request in worker.requests] == ["none", "auto"]
    assert len({request.sampling.seed for request in worker.requests}) == 1
    assert page.locator("h2").all_inner_texts() == ["plain", "speculative"]
    assert page.locator(".panel.first").count() == 1
    assert page.locator(".panel").nth(0).locator(DRAFTED).count() == 0
    assert page.locator(".panel").nth(1).locator(DRAFTED).count() > 50


def test_escape_stops_and_errors_are_told(page: Page, worker: FakeWorker) -> None:
    worker.step_s = 0.02
    write(page, "hello", "completion", "speculative")
    page.get_by_text("tokens/s").wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("stopped").wait_for()
    page.wait_for_timeout(100)
    assert len(worker.cancelled) == 1 and not worker.alive
    write(page, "a" * 600, "completion", "speculative")
    page.get_by_text("the prompt has 600 tokens, the context 512").wait_for()
    write(page, "FAIL LATER", "completion", "speculative")
    page.get_by_text("the worker died").wait_for()


def test_it_fits_a_phone_and_the_dark(page: Page) -> None:
    colours = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colours[0] != colours[1]
    page.set_viewport_size({"width": 360, "height": 640})
    write(page, "w" * 300, "completion", "compare")
    page.get_by_text("times as many tokens/s from the same steps").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    first, second = (page.locator(".panel").nth(i).bounding_box() for i in (0, 1))
    assert first and second and second["y"] >= first["y"] + first["height"], "one below the other"


def test_all_of_it_works_with_the_keyboard(page: Page, worker: FakeWorker) -> None:
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("you")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "send"
    page.keyboard.press("Space")
    page.get_by_text("done", exact=True).wait_for()
    assert worker.requests[0].prompt == [{"role": "user", "content": "hello\nyou"}]
