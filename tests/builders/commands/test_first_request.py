"""`serve` sends each ready model one request of its kind, and says which can't answer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deepseek_triton.builders.commands.first_request import send_first_requests
from deepseek_triton.builders.repository import check
from deepseek_triton.clients import connect
from deepseek_triton.clients.errors import RequestRejected


class FakeClient:
    """Records what it is asked; the model "broken" refuses."""

    def __init__(self, model: str, asked: list[tuple[str, str]]) -> None:
        self.model, self.asked = model, asked

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def generate(self, request: Any) -> None:
        assert request.max_tokens == 1
        self._ask("generate")

    def score(self, request: Any) -> None:
        assert request.labels == ("a", "b")
        self._ask("score")

    def _ask(self, kind: str) -> None:
        self.asked.append((self.model, kind))
        if self.model == "broken":
            raise RequestRejected("out of order")


def test_each_ready_model_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    said: list[str] = []
    monkeypatch.setattr(connect, "connect", lambda protocol, model, url, timeout_s: FakeClient(model, asked))
    monkeypatch.setattr(check, "is_scoring_model", lambda repository, name: name == "scorer")
    server = SimpleNamespace(is_ready=lambda model: model != "loading", grpc_url="localhost:1")
    send_first_requests(server, Path("models"), ["writer", "loading", "broken", "scorer"], said.append)
    assert asked == [("writer", "generate"), ("broken", "generate"), ("scorer", "score")]
    assert said == ["broken is ready, but can't answer: out of order"]
