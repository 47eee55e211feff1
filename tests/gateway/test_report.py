"""`/v1/reports` and the page `/report`, in a real browser, in front of reports that the test writes."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING

import httpx
import pytest

from deepseek_triton.clients import Chunk, RequestRejected, ServedModel
from deepseek_triton.gateway.backend.base import UnknownModelError, UpstreamCall
from tests.support.browser import chromium
from tests.support.gateway import FakeBackend, gateway

if TYPE_CHECKING:
    from playwright.sync_api import Page

MODEL = "text-report"
IMAGE = b"\x89PNG\r\n\x1a\nnot decoded here"
IMPRESSION = "Necrosis is present <b>here</b>, \\u00fc."
TEXT = (
    '{"findings":{"necrosis":"present 0.97","mitotic_figures":"uncertain 0.50"},'
    f'"impression":"{IMPRESSION}","notice":"Not a medical device."}}'
)


class Reporter(FakeBackend):
    """A backend with a model that reports; `images` are what came."""

    def __init__(self, **options: object) -> None:
        pieces = [TEXT[start : start + 7] for start in range(0, len(TEXT), 7)]
        chunks = [Chunk(piece, "", 5, 1 + index) for index, piece in enumerate(pieces)]
        super().__init__([*chunks, Chunk("", "stop", 5, len(pieces) + 1)], **options)  # type: ignore[arg-type]
        self.images: list[bytes] = []

    async def models(self) -> tuple[ServedModel, ...]:
        return (ServedModel("text", "generate"), ServedModel(MODEL, "report"))

    async def report(self, model: str, image: bytes, call: UpstreamCall) -> AsyncGenerator[Chunk, None]:
        if model != MODEL:
            raise UnknownModelError(f"the model '{model}' does not exist")
        self.images.append(image)
        if image == b"bad":
            raise RequestRejected("the image is neither a JPEG nor a PNG", kind="invalid")
        for chunk in self.chunks:
            yield chunk


@pytest.fixture(scope="module")
def reporter() -> Reporter:
    return Reporter()


@pytest.fixture(scope="module")
def url(reporter: Reporter) -> Iterator[str]:
    with gateway(reporter) as url:
        yield url


def body(image: bytes = IMAGE, **more: object) -> dict[str, object]:
    return {"model": MODEL, "image": base64.b64encode(image).decode(), **more}


def test_a_report_streams(url: str, reporter: Reporter) -> None:
    answer = httpx.post(f"{url}/v1/reports", json=body())
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert reporter.images[-1] == IMAGE
    *events, done = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert done == "[DONE]"
    *deltas, last = map(json.loads, events)
    assert "".join(one["delta"] for one in deltas) == TEXT
    assert last["finish_reason"] == "stop"
    assert last["usage"]["completion_tokens"] == len(deltas) + 1


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        ({"model": MODEL}, 400, "image is required"),
        ({**body(), "image": "no base64!"}, 400, "in base64"),
        ({**body(), "image": "data:image/png;base64,AAAA"}, 400, "in base64"),
        ({**body(), "image": "https://example.org/a.png"}, 400, "in base64"),
        ({**body(), "image": ""}, 400, "image"),
        (body(image_url="https://example.org/a.png"), 400, "unknown field 'image_url'"),
        ({**body(), "model": "other"}, 404, "does not exist"),
        (body(b"bad"), 400, "neither a JPEG nor a PNG"),
        (body(bytes(4 * 2**20)), 413, "body"),
    ],
)
def test_what_is_refused(url: str, sent: dict[str, object], status: int, message: str) -> None:
    answer = httpx.post(f"{url}/v1/reports", json=sent)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_there_is_no_page_without_such_a_model(url: str) -> None:
    page = httpx.get(f"{url}/report")
    assert page.status_code == 200
    assert "not a medical device" in page.text
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    with gateway(FakeBackend()) as other:
        assert httpx.get(f"{other}/report").status_code == 404


@pytest.fixture(scope="module")
def page(url: str) -> Iterator[Page]:
    """The page, whose errors, of scripts and of its security policy, fail the test."""
    errors: list[str] = []
    with chromium() as browser:
        page = browser.new_context().new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if "Security Policy" in line.text else None)
        page.set_default_timeout(10_000)
        page.goto(f"{url}/report")
        yield page
    assert errors == []


@pytest.mark.slow
@pytest.mark.parametrize("way", ["choose", "drop"])
def test_an_image_becomes_a_report(page: Page, reporter: Reporter, way: str) -> None:
    image = IMAGE + way.encode()
    if way == "choose":
        page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": image})
    else:
        transfer = page.evaluate_handle(
            """(bytes) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(bytes)], "a.png", { type: "image/png" }));
                return transfer;
            }""",
            list(image),
        )
        page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    page.locator("#numbers", has_text="tokens in").wait_for()
    assert reporter.images[-1] == image
    assert page.locator("#findings tr").all_inner_texts() == [
        "necrosis\tpresent\t0.97",
        "mitotic figures\tuncertain\t0.50",
    ]
    assert page.inner_text("#impression") == "Necrosis is present <b>here</b>, ü."
    assert page.locator("#impression b").count() == 0, "text is never HTML"
    assert page.inner_text("#stated") == "Not a medical device."
    assert json.loads(page.locator("#raw").text_content() or "")["findings"]["necrosis"] == "present 0.97"
    assert "not a medical device" in page.inner_text(".notice")


@pytest.mark.slow
def test_an_error_is_told(page: Page) -> None:
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"bad"})
    page.locator("#error", has_text="neither a JPEG nor a PNG").wait_for()
    assert page.locator("#result").is_hidden()


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 15, 30, 40, 60, 80, 100, 130, len(TEXT) - 1])
def test_what_has_come_so_far_is_read(page: Page, length: int) -> None:
    read = page.evaluate("(text) => readBeginning(text)", TEXT[:length])
    whole = json.loads(TEXT)
    assert set(read) <= set(whole)
    for name, one in read.get("findings", {}).items():
        assert whole["findings"][name].startswith(one)
    assert whole["impression"].startswith(read.get("impression", ""))
