"""Breaker: what opens it, what doesn't, and how it closes again."""

from __future__ import annotations

import asyncio

import pytest

from deepseek_triton.clients import (
    ProtocolError,
    RequestRejected,
    RequestTimeout,
    ServerOverloaded,
    ServerUnavailable,
)
from deepseek_triton.gateway.backend.base import OverloadedError
from deepseek_triton.gateway.backend.routing.breaker import Breaker, BreakerSettings, State
from deepseek_triton.gateway.backend.verdict import Verdict, verdict_of


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def told() -> list[State]:
    return []


@pytest.fixture
def breaker(clock: Clock, told: list[State]) -> Breaker:
    return Breaker("m at a", BreakerSettings(5, 30.0, 1), clock, told.append)


def state_of(breaker: Breaker) -> State:
    return breaker.state


def end(breaker: Breaker, *verdicts: Verdict, times: int = 1) -> None:
    for verdict in verdicts * times:
        assert breaker.wait_s() == 0
        breaker.take().ended(verdict)


def test_failures_in_a_row_open_it_and_a_trial_closes_it(breaker: Breaker, clock: Clock, told: list[State]) -> None:
    end(breaker, "failed", times=4)
    end(breaker, "answered")
    end(breaker, "failed", times=5)
    assert state_of(breaker) == "open" and breaker.wait_s() == 30
    clock.now += 30
    assert breaker.wait_s() == 0
    trial = breaker.take()
    assert state_of(breaker) == "half_open" and breaker.wait_s() > 0, "one trial at a time"
    trial.works()
    trial.ended("answered")
    assert state_of(breaker) == "closed"
    assert told == ["open", "half_open", "closed"]


def test_a_failed_trial_opens_it_again(breaker: Breaker, clock: Clock) -> None:
    end(breaker, "failed", times=5)
    clock.now += 31
    end(breaker, "failed")
    assert state_of(breaker) == "open" and breaker.wait_s() == 30


@pytest.mark.parametrize("verdict", ["invalid", "busy", "given_up"])
def test_neither_clients_nor_load_change_it(breaker: Breaker, clock: Clock, verdict: Verdict) -> None:
    end(breaker, verdict, times=100)
    assert state_of(breaker) == "closed"
    end(breaker, "failed", verdict, times=4)
    assert state_of(breaker) == "closed"
    end(breaker, "failed")
    assert state_of(breaker) == "open", "they don't count as successes either"
    clock.now += 30
    end(breaker, verdict)
    assert state_of(breaker) == "half_open" and breaker.wait_s() == 0, "the next one is a trial too"


def test_a_server_that_was_started_again_is_tried_at_once(breaker: Breaker) -> None:
    end(breaker, "failed", times=5)
    breaker.try_now()
    end(breaker, "answered")
    assert state_of(breaker) == "closed"


def test_requests_of_an_earlier_time_do_not_count(breaker: Breaker, clock: Clock) -> None:
    early = [breaker.take() for _ in range(10)]
    end(breaker, "failed", times=5)
    clock.now += 30
    trial = breaker.take()
    for permit in early[:5]:
        permit.ended("failed")
    for permit in early[5:]:
        permit.works()
        permit.ended("answered")
    assert state_of(breaker) == "half_open"
    trial.ended("answered")
    assert state_of(breaker) == "closed"


def test_a_trial_that_hangs_is_followed_by_another(breaker: Breaker, clock: Clock) -> None:
    end(breaker, "failed", times=5)
    clock.now += 30
    breaker.take()
    assert breaker.wait_s() == 30
    clock.now += 30
    end(breaker, "answered")
    assert state_of(breaker) == "closed"


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (RequestRejected("temperature must be at least 0", "invalid"), "invalid"),
        (ValueError("min_tokens must be at most max_tokens"), "invalid"),
        (ServerOverloaded("queue is full (max_queue_size=1); retry later", "unavailable"), "busy"),
        (RequestRejected("the request timed out in the queue", "unavailable"), "busy"),
        (RequestRejected("Exceeds maximum queue size".lower()), "busy"),
        (OverloadedError("enough"), "busy"),
        (asyncio.CancelledError(), "given_up"),
        (GeneratorExit(), "given_up"),
        (RequestRejected("the engine timed out", "internal"), "failed"),
        (RequestRejected("the engine is shutting down", "unavailable"), "failed"),
        (ServerUnavailable("nothing there"), "failed"),
        (RequestTimeout("600 s"), "failed"),
        (ProtocolError("no finish_reason"), "failed"),
    ],
)
def test_verdicts(error: BaseException, verdict: Verdict) -> None:
    assert verdict_of(error) == verdict
