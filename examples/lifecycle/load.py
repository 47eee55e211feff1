"""Callers that ask a name without pause, and what their answers tell: which model gave them, whether they are whole."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

MODEL_HEADER = "x-deepseek-model"
MAX_TOKENS = 24
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class AskedAnswer:
    """model: which the gateway says gave it. seconds: until it was whole. at: when it was, on the monotonic clock."""

    question: str
    model: str
    text: str
    seconds: float
    at: float


class RequestFailedError(Exception):
    """A status other than 200, a stream that broke, or no connection."""


def ask(client: httpx.Client, name: str, question: str, *, streams: bool) -> AskedAnswer:
    """One greedy answer.

    Raises:
        RequestFailedError: there is no whole answer.
    """
    body = {
        "model": name, "messages": [{"role": "user", "content": question}], "max_tokens": MAX_TOKENS,
        "temperature": 0, "stream": streams,
    }  # fmt: skip
    began = time.monotonic()
    try:
        response = client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            raise RequestFailedError(f"status {response.status_code}: {response.text[:200]}")
        text = _streamed(response.text) if streams else response.json()["choices"][0]["message"]["content"]
        now = time.monotonic()
        return AskedAnswer(question, response.headers[MODEL_HEADER], text, now - began, now)
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise RequestFailedError(repr(error)) from error


def _streamed(body: str) -> str:
    """The text of an event stream that came to its end."""
    events = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        raise RequestFailedError("the stream broke")
    chunks: list[dict[str, Any]] = [json.loads(event) for event in events[:-1]]
    if failed := [chunk for chunk in chunks if "error" in chunk]:
        raise RequestFailedError(f"the stream ended with {failed[0]}")
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


class Load:
    """A context manager: `num_callers` threads ask in turn. answers, faults: what came so far."""

    def __init__(self, url: str, name: str, questions: Sequence[str], num_callers: int) -> None:
        self.answers: list[AskedAnswer] = []
        self.faults: list[str] = []
        self._url, self._name, self._questions = url, name, questions
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(num_callers)]
        self._began = time.monotonic()
        self.seconds = 0.0

    def __enter__(self) -> Load:
        self._began = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()
        self.seconds = time.monotonic() - self._began

    def _run(self, number: int) -> None:
        with httpx.Client(base_url=self._url, timeout=TIMEOUT_S) as client:
            turn = number
            while not self._is_over.is_set():
                turn += 1
                question = self._questions[turn % len(self._questions)]
                try:
                    self.answers.append(ask(client, self._name, question, streams=number % 2 == 0))
                except RequestFailedError as error:
                    self.faults.append(f"{question}: {error}")


@dataclass(frozen=True)
class LoadFigures:
    """What a load met. mixed_up: answers that are not the whole answer of the model which the gateway names.

    by_model: answers of each. median_s, worst_s: of all. faults: the first ones.
    """

    requests: int
    failed: int
    mixed_up: int
    by_model: dict[str, int]
    seconds: float
    per_s: float
    median_s: float
    worst_s: float
    faults: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def figures(load: Load, known: Mapping[str, Mapping[str, str]]) -> LoadFigures:
    """Judge a load that has ended. known: model → question → its whole answer, asked alone."""
    mixed = [one for one in load.answers if known.get(one.model, {}).get(one.question) != one.text]
    models = sorted({one.model for one in load.answers})
    times = [one.seconds for one in load.answers] or [0.0]
    told = [f"{one.question} {one.model} answered {one.text!r}" for one in mixed]
    return LoadFigures(
        requests=len(load.answers) + len(load.faults),
        failed=len(load.faults),
        mixed_up=len(mixed),
        by_model={model: sum(one.model == model for one in load.answers) for model in models},
        seconds=round(load.seconds, 1),
        per_s=round(len(load.answers) / max(load.seconds, 1e-9), 2),
        median_s=round(statistics.median(times), 3),
        worst_s=round(max(times), 3),
        faults=tuple([*load.faults, *told][:5]),
    )
