"""A route through a real gateway: keys stay on their arm, answers tell it, and its ends are counted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from deepseek_triton.clients import RequestRejected
from deepseek_triton.gateway.backend.routing.shares import Arm, Route, write_routes
from deepseek_triton.gateway.backend.watched_file import LOOK_S
from tests.support.gateway import gateway
from tests.support.gateway_servers import FakeServer
from tests.support.waiting import until

CHAT: dict[str, Any] = {"model": "r1", "messages": [{"role": "user", "content": "Hello"}]}
PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "r1", "prompt": "Hello"},
    "/v1/responses": {"model": "r1", "input": "Hello"},
    "/v1/messages": {**CHAT, "max_tokens": 5},
}


def test_an_answer_tells_its_arm_in_every_api(tmp_path: Path) -> None:
    routes = tmp_path / "routes.json"
    write_routes(routes, {"r1": Route((Arm("old", 0), Arm("new", 1)))})
    with gateway(FakeServer(models_served=("old", "new")), routes=str(routes)) as url:
        for path, body in PATHS.items():
            for is_streamed in (False, True):
                answer = httpx.post(url + path, json={**body, "stream": is_streamed})
                assert answer.status_code == 200, answer.text
                assert answer.headers["x-deepseek-model"] == "new"
                assert "x-deepseek-degraded" not in answer.headers
        assert {model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]} == {"old", "new", "r1"}


@pytest.mark.slow
def test_a_share_changes_while_it_serves_and_is_rolled_back(tmp_path: Path) -> None:
    routes = tmp_path / "routes.json"
    server = FakeServer(models_served=("old", "new"))
    seen = []
    with gateway(server, routes=str(routes)) as url:
        for weight in (0, 100, 0):
            write_routes(routes, {"r1": Route((Arm("old", 100 - weight), Arm("new", weight)))})
            time.sleep(LOOK_S + 0.05)
            answers = [httpx.post(f"{url}/v1/chat/completions", json=CHAT) for _ in range(3)]
            seen.append({answer.headers["x-deepseek-model"] for answer in answers})
    assert seen == [{"old"}, {"new"}, {"old"}]


@pytest.mark.parametrize(("kind", "outcome"), [("invalid", "invalid"), ("internal", "failed"), (None, "answered")])
def test_each_end_of_an_arm_is_counted(tmp_path: Path, kind: str | None, outcome: str) -> None:
    routes = tmp_path / "routes.json"
    write_routes(routes, {"r1": Route((Arm("new", 1),))})
    error = RequestRejected("no", kind) if kind else None  # type: ignore[arg-type]
    with gateway(FakeServer(models_served=("new",), error=error), routes=str(routes)) as url:
        httpx.post(f"{url}/v1/chat/completions", json=CHAT)
        counted = f'gateway_arm_requests_total{{model="new",name="r1",outcome="{outcome}"}} 1.0'
        until(lambda: counted in httpx.get(f"{url}/metrics").text)
