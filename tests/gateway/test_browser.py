"""The page at `/` in a real browser, in front of answers that the test writes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from deepseek_triton.clients import Chunk
from deepseek_triton.gateway.cli import main as deepseek_gateway
from deepseek_triton.gateway.page.routes import PAGE
from tests.support.browser import chromium
from tests.support.gateway import MODEL, FakeBackend, gateway
from tests.support.waiting import until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("gateway page")]

REASONING = "The user greets me. A greeting in return is right."
ANSWER = "Grüße, 世界 — <b>hello</b> 👋"


def thinking(num_parts: int = 1) -> tuple[Chunk, ...]:
    """An answer with reasoning, and with text that would be dangerous as HTML."""
    parts = [Chunk(part, "", 5, 3 + i) for i, part in enumerate([ANSWER] * num_parts)]
    thought = [Chunk("", "", 5, 1 + i, reasoning=part) for i, part in enumerate((REASONING[:10], REASONING[10:]))]
    return (*thought, *parts, Chunk("", "stop", 5, 3 + num_parts))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page whose errors, of scripts and of its security policy, fail the test."""
    context = browser.new_context()
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if "Security Policy" in message.text else None)
    page.set_default_timeout(10_000)
    yield page
    context.close()
    assert errors == []


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    return FakeBackend(thinking(), pause_s=0.02)


@pytest.fixture(scope="module")
def url(backend: FakeBackend) -> Iterator[str]:
    with gateway(backend) as url:
        yield url


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def finish(page: Page) -> None:
    page.wait_for_selector("#send:text('Send'):enabled")


def test_models_health_and_load_are_shown(page: Page) -> None:
    with gateway(FakeBackend(thinking(400), pause_s=0.05)) as url:
        page.goto(url)
        page.locator("#health.good", has_text="ready").wait_for()
        assert page.locator("#models button[aria-pressed=true]").inner_text().split() == [MODEL, "chat"]
        ask(page, "Hello")
        page.locator("#live", has_text=re.compile("^1$")).wait_for()
        page.locator("#upstream", has_text=re.compile("^1$")).wait_for()
        page.locator("#speed", has_text=re.compile(r"^\d+\.\d$")).wait_for()
        page.locator("#first", has_text=re.compile("ms$")).wait_for()
        page.click("#send")
        page.locator("#live", has_text=re.compile("^0$")).wait_for()


def test_an_answer_streams_with_its_reasoning_folded(url: str, page: Page, backend: FakeBackend) -> None:
    page.goto(url)
    ask(page, "Hello")
    finish(page)
    turn = page.locator(".turn.assistant")
    assert turn.locator(".text").inner_text() == ANSWER  # as text: nothing of it became an element
    assert not turn.locator("details p").is_visible()
    turn.get_by_text("Reasoning").click()
    assert turn.locator("details p").inner_text() == REASONING
    numbers = turn.locator(".numbers").inner_text()
    assert re.fullmatch(r"4 tokens · [\d.]+ tokens/s · first after \d+ ms", numbers), numbers
    ask(page, "And again")
    page.locator(".turn").nth(3).wait_for()
    finish(page)
    sent = backend.requests[-1].messages or ()
    assert [(m.role, m.content) for m in sent] == [  # type: ignore[union-attr]
        ("user", "Hello"), ("assistant", ANSWER), ("user", "And again"),
    ]  # fmt: skip


def test_text_appears_while_the_answer_still_runs_and_stop_ends_it(browser: Browser) -> None:
    endless = FakeBackend(thinking(200), pause_s=0.05)
    with gateway(endless) as url:
        page = browser.new_page()
        page.goto(url)
        page.fill("#max-tokens", "7")
        ask(page, "Hello")
        page.locator(".turn.assistant .text", has_text="世界").wait_for()
        page.click("#send:text('Stop')")
        finish(page)
        assert "stopped" in page.inner_text(".numbers")
        until(lambda: (endless.running, endless.cancelled) == (0, 1))
        assert endless.requests[-1].max_tokens == 7
        page.click("#clear")
        assert page.locator(".turn").count() == 0
        page.close()


def test_events_are_read_however_the_network_cuts_them(url: str, page: Page) -> None:
    """Comment lines, CR LF, an event in two lines of data, and characters whose bytes come in several pieces."""
    page.goto(url)
    raw = (
        ": a comment\r\n\r\nid: 7\r\nevent: message\r\n"
        'data: {"choices":[{"delta":{"content":"世"},"finish_reason":null}]}\r\n\r\n: heartbeat\n\n'
        'data: {"choices":\ndata: [{"delta":{"content":"👋"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    )
    found = page.evaluate(
        """async (text) => {
            const bytes = new TextEncoder().encode(text), found = [];
            const start = (to) => { for (const b of bytes) to.enqueue(new Uint8Array([b])); to.close(); };
            const body = new ReadableStream({ start });
            for await (const event of events(body)) found.push(event.choices[0].delta.content);
            return found;
        }""",
        raw,
    )
    assert found == ["世", "👋"]


def test_errors_are_shown_and_the_question_is_forgotten(url: str, page: Page, backend: FakeBackend) -> None:
    page.goto(url)
    page.fill("#temperature", "9")
    ask(page, "Hello")
    page.locator(".turn.assistant .error", has_text="temperature").wait_for()
    page.fill("#temperature", "")
    ask(page, "Hello again")
    finish(page)
    assert [message.content for message in backend.requests[-1].messages or ()] == ["Hello again"]  # type: ignore[union-attr]


def test_a_key_is_asked_for_and_kept_for_the_tab_alone(
    browser: Browser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys.json"
    with ThreadPoolExecutor(1) as own:  # Playwright runs this thread's event loop
        assert own.submit(deepseek_gateway, ["keys", "add", "alice", "--keys", str(keys)]).result() == 0
    key = capsys.readouterr().out.strip()
    with gateway(FakeBackend(), keys=str(keys)) as url:
        context = browser.new_context()
        page = context.new_page()
        page.goto(url)
        page.locator("#models-hint", has_text="An API key is needed.").wait_for()
        page.locator("#key").fill(key)
        page.locator("#key").press("Tab")
        page.locator("#models button", has_text=MODEL).wait_for()
        ask(page, "Hello")
        page.locator(".turn.assistant .text", has_text="Hello").wait_for()
        page.reload()
        page.locator("#models button", has_text=MODEL).wait_for()
        other = context.new_page()
        other.goto(url)
        assert other.input_value("#key") == ""
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_a_phone_and_a_desk_by_day_and_night(browser: Browser, url: str, scheme: str, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 740}, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(url)
    ask(page, "unbreakable" * 30)
    finish(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
    assert (brightness > 127) == (scheme == "light")
    box = page.locator("#send").bounding_box()
    assert box is not None and box["x"] + box["width"] <= width
    context.close()


def test_the_policy_lets_nothing_in(browser: Browser, url: str) -> None:
    policy = httpx.get(url).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    page = browser.new_page()
    blocked: list[str] = []
    page.on("console", lambda message: blocked.append(message.text))
    page.goto(url)
    is_run = page.evaluate(
        """() => {
            const script = document.createElement('script');
            script.textContent = 'window.injected = true';
            document.body.append(script);
            return Boolean(window.injected);
        }"""
    )
    assert not is_run and any("Security Policy" in line for line in blocked)
    page.close()


def test_the_page_needs_no_other_place() -> None:
    text = PAGE.decode()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text)
    assert set(re.findall(r"https?://[^'\"\s)]+", text)) == {"http://www.w3.org/2000/svg"}
