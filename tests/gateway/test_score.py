"""`/v1/score`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from deepseek_triton.clients import Score, ScoreRequest
from deepseek_triton.gateway.backend.base import UpstreamCall
from tests.support.gateway import MODEL, FakeBackend, gateway

SCORE = Score("yes", {"yes": 0.75, "no": 0.25}, {"yes": -0.5, "no": -1.6}, is_calibrated=True, num_input_tokens=7)


@dataclass
class Judge(FakeBackend):
    asked: list[ScoreRequest] = field(default_factory=list)

    async def score(self, model: str, request: ScoreRequest, call: UpstreamCall) -> tuple[Score, ...]:
        self.asked.append(request)
        return (SCORE,) * len(request.texts or request.chats or ())


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


@pytest.fixture(scope="module")
def client(judge: Judge) -> Iterator[httpx.Client]:
    with gateway(judge) as url, httpx.Client(base_url=url) as client:
        yield client


def test_each_text_gets_its_label(client: httpx.Client, judge: Judge) -> None:
    body = {"model": "judge", "input": ["one", "two"], "labels": ["yes", "no"]}
    answer = client.post("/v1/score", json=body).json()
    row = {
        "object": "score", "label": "yes", "probabilities": SCORE.probabilities, "log_probs": SCORE.log_probs,
        "is_calibrated": True,
    }  # fmt: skip
    assert answer["data"] == [{**row, "index": 0}, {**row, "index": 1}]
    assert answer["usage"] == {"prompt_tokens": 14, "total_tokens": 14}
    assert (judge.asked[-1].texts, judge.asked[-1].labels) == (("one", "two"), ("yes", "no"))


def test_chats_go_through_the_models_template(client: httpx.Client, judge: Judge) -> None:
    chat = [{"role": "user", "content": "Is it?"}]
    assert client.post("/v1/score", json={"model": "judge", "chats": [chat]}).status_code == 200
    assert len(judge.asked[-1].chats or ()) == 1 and judge.asked[-1].labels is None


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "input"),
        ({"input": "x", "chats": [[{"role": "user", "content": "x"}]]}, "input"),
        ({"input": []}, "input"),
        ({"input": [1]}, "input[0]"),
        ({"input": "x", "labels": []}, "labels"),
        ({"input": "x", "label": ["a"]}, "label"),
    ],
)
def test_a_wrong_body_is_refused_by_name(client: httpx.Client, body: Any, named: str) -> None:
    answer = client.post("/v1/score", json={"model": "judge", **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, named)


def test_a_model_that_generates_does_not_score() -> None:
    with gateway(FakeBackend()) as url:
        answer = httpx.post(f"{url}/v1/score", json={"model": MODEL, "input": "x"})
    assert answer.status_code == 404 and "score" in answer.json()["error"]["message"]
