"""Load through the gateway: OpenAI's events as chunks, its troubles in one line, and a whole run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deepseek_triton import examples
from deepseek_triton.clients.api import Chunk, GenerateRequest, Message
from deepseek_triton.clients.errors import ProtocolError, RequestRejected, ServerOverloaded, ServerUnavailable
from deepseek_triton.clients.score import Score, ScoreRequest
from deepseek_triton.ensemble.protocol.contract import IMAGE, TensorSpec
from deepseek_triton.loadtest import profile
from deepseek_triton.loadtest.exchange import Recorder, exchange
from deepseek_triton.loadtest.openai_client import OpenAiClient
from deepseek_triton.loadtest.profile import LoadProfileError
from deepseek_triton.loadtest.prompts import History, ImageRequest, talk
from tests.loadtest.test_run import run_on_fake, write_profile
from tests.support.fake_triton import Behaviour, fake_triton
from tests.support.gateway_process import gateway_process
from tests.support.loadtests import PROFILE, make_profile

CHAT = GenerateRequest(messages=[Message("user", "hello")], max_tokens=5)


def answering(*events: Any, status: int = 200) -> OpenAiClient:
    """A client whose server answers everything with these events, or with the only one as a body."""
    client = OpenAiClient("http://gateway", "m", 5)
    text = "".join(f"data: {each if isinstance(each, str) else json.dumps(each)}\n\n" for each in events)
    body = json.dumps(events[0]) if status != 200 or "data" in events[0] or "usage" in events[0] else text
    client._http = httpx.Client(
        base_url="http://gateway", transport=httpx.MockTransport(lambda request: httpx.Response(status, text=body))
    )
    return client


def event(text: str, finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}]} | more


def usage(tokens: int) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": 7, "completion_tokens": tokens}}


def test_a_streams_tokens_are_counted_by_its_usage() -> None:
    client = answering(event("a b"), event("c", "length"), {"choices": []} | {"x": 1} | usage(4), "[DONE]")
    chunks = list(client.stream(CHAT))
    assert [(chunk.text, chunk.finish_reason) for chunk in chunks] == [("a b", ""), ("c", "length")]
    assert (chunks[-1].num_input_tokens, chunks[-1].num_output_tokens) == (7, 4)


@pytest.mark.parametrize(
    ("events", "kind", "message"),
    [
        ([event("a")], ProtocolError, r"ended without \[DONE\]"),
        ([event("a", "stop"), "[DONE]"], ProtocolError, "had no usage"),
        ([event("a"), {"error": {"message": "it broke"}}, "[DONE]"], RequestRejected, "it broke"),
        ([event("a"), "{", "[DONE]"], ProtocolError, "no JSON"),
    ],
)
def test_a_stream_that_is_not_whole_is_an_error(events: list[Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        list(answering(*events).stream(CHAT))


def test_refusals_are_told_apart() -> None:
    with pytest.raises(ServerOverloaded, match="status 429: too many"):
        answering({"error": {"message": "too many"}}, status=429).generate(CHAT)
    with pytest.raises(RequestRejected, match="status 400: no") as told:
        list(answering({"error": {"message": "no"}}, status=400).stream(CHAT))
    assert not isinstance(told.value, ServerOverloaded)
    with pytest.raises(ServerUnavailable, match=r"http://127\.0\.0\.1:9"):
        OpenAiClient("http://127.0.0.1:9", "m", 5).generate(CHAT)


def test_what_is_wrong_is_known_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert answering({"data": [{"id": "m"}]}).trouble() == ""
    assert answering({"data": [{"id": "other"}]}).trouble() == (
        "the gateway at http://gateway has no model 'm'; it has ['other']"
    )
    assert (
        answering({}, status=401).trouble() == "the gateway at http://gateway asks for an API key: set OPENAI_API_KEY"
    )
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    assert answering({}, status=401).trouble() == "the gateway at http://gateway refuses the key in OPENAI_API_KEY"
    assert "is a gateway there?" in answering({}, status=404).trouble()
    assert "no gateway at http://127.0.0.1:9" in OpenAiClient("http://127.0.0.1:9", "m", 5).trouble()


class Scorer:
    def score(self, request: ScoreRequest) -> tuple[Score, ...]:
        return (Score("a", {"a": 1.0}, {"a": 0.0}, True, 9),)


def scoring(**changes: Any) -> dict[str, Any]:
    length = {"median": 5, "sigma": 0, "least": 5, "most": 5}
    return {"requests": {"form": "score", "prompt_words": length} | changes, "protocols": {"grpc": 1}}


def test_a_text_to_score_is_measured_as_one_response(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("one\ntwo\n\nthree\n", encoding="utf-8")
    own = make_profile(**scoring(texts=str(texts)))
    asked = [History(talk(own, i), own.requests, own.seed).request(talk(own, i).turns[0]) for i in range(40)]
    assert {request.texts for request in asked if isinstance(request, ScoreRequest)} == {("one",), ("two",), ("three",)}
    assert asked[0] is not None
    sample, answer = exchange(Scorer(), asked[0], "grpc", 0.0, Recorder())
    assert sample.is_complete and answer is not None
    assert (sample.num_input_tokens, sample.num_output_tokens) == (9, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocols": {"openai": 1}}, "protocols of form score must be of grpc, http, got openai"),
        ({"protocols": {"grpc-stream": 1}}, "protocols of form score must be of grpc, http, got grpc-stream"),
        ({"requests": scoring()["requests"] | {"form": "text"}}, "requests.answer_tokens is missing"),
    ],
)
def test_a_scoring_profile_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LoadProfileError, match=message):
        make_profile(**scoring() | changes)


def test_a_request_may_hold_several_texts_to_score(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("one\ntwo\nthree\n", encoding="utf-8")
    for changes, fewest in (({"texts": str(texts), "num_texts": 16}, 2), ({"num_texts": 16}, 4)):
        own = make_profile(**scoring(**changes))
        asked = [History(talk(own, n), own.requests, own.seed).request(talk(own, n).turns[0]) for n in range(2)]
        first, second = (request.texts for request in asked if isinstance(request, ScoreRequest))
        assert first is not None and second is not None
        assert len(first) == len(second) == 16 and len(set(first)) >= fewest and first != second
    with pytest.raises(LoadProfileError, match="num_texts is 2, which needs form score, got 'text'"):
        make_profile(requests={**PROFILE["requests"], "form": "text", "num_texts": 2})


def test_texts_that_are_not_there_are_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    text = (profile.DIRECTORY / "scoring.toml").read_text(encoding="utf-8")
    path.write_text(text.replace('form = "score"', 'form = "score"\ntexts = "no.txt"'), encoding="utf-8")
    with pytest.raises(LoadProfileError, match=r"must be a file with a text on each line, got .*no\.txt"):
        profile.load(str(path))


class Reporter:
    def stream_tensors(self, inputs: dict[TensorSpec, Any]) -> Iterator[Chunk]:
        assert inputs[IMAGE] == b"png"
        yield from (Chunk("{", "", 9, 1), Chunk("}", "stop", 9, 2))


def test_an_image_is_measured_as_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    text = (Path(examples.__file__).parent / "image_report" / "load.toml").read_text(encoding="utf-8")
    path.write_text(text.replace("../../build/image_report/tiles", "tiles"), encoding="utf-8")
    with pytest.raises(LoadProfileError, match=r"must be a folder of .jpg, .jpeg or .png files, got .*tiles"):
        profile.load(str(path))
    (tmp_path / "tiles").mkdir()
    (tmp_path / "tiles" / "a.PNG").write_bytes(b"png")
    own = profile.load(str(path))
    request = History(talk(own, 0), own.requests, own.seed).request(talk(own, 0).turns[0])
    assert request == ImageRequest(b"png")
    sample, answer = exchange(Reporter(), request, "grpc-stream", 0.0, Recorder())
    assert sample.is_complete and answer is not None and answer.text == "{}" and sample.first_s is not None
    with pytest.raises(LoadProfileError, match="images go with form report"):
        make_profile(**scoring(images="x"))


@pytest.mark.slow
def test_a_run_through_a_gateway(tmp_path: Path) -> None:
    own = write_profile(tmp_path, protocols="openai-stream = 3\nopenai = 1", seconds=3, level=5)
    with (
        fake_triton(Behaviour()) as ports,  # its counters alone are read: the gateway has a backend of its own
        gateway_process(tmp_path, num_chunks=4, pause_s=0.02) as gateway,
    ):
        _, result = run_on_fake(ports, own, "--gateway", gateway.url)
    assert result.errors == {}
    assert result.target.gateway_url == gateway.url
    streams = result.protocols["openai-stream"]
    assert streams.num_complete == streams.num_requests > 2
    assert streams.first_token_s.count == streams.num_requests and streams.inter_token_s.p50 is not None
    assert all(sample.num_output_tokens > 0 for sample in result.samples)
