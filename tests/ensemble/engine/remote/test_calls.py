"""What is kept of calls of other models, and for how long."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from deepseek_triton.ensemble.engine.remote.calls import KEPT_S, Calls


class Responses:
    """Three responses."""

    def __iter__(self) -> Iterator[int]:
        return iter((1, 2, 3))


class Request:
    """Answers with three responses; `alive` has those that somebody keeps."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[Responses] = weakref.WeakSet()

    def exec(self, *, decoupled: bool) -> Responses:
        assert decoupled
        responses = Responses()
        self.alive.add(responses)
        return responses


def test_responses_are_kept_for_a_while_after_their_call() -> None:
    now, request = [100.0], Request()
    calls = Calls(lambda: now[0])
    for _ in range(2):
        with calls.responses(request) as responses:
            assert list(responses) == [1, 2, 3]
        del responses
    assert len(request.alive) == 2
    now[0] += KEPT_S - 0.1
    with calls.responses(request):
        pass
    assert len(request.alive) == 3
    now[0] += 0.2
    with calls.responses(request):
        pass
    assert len(request.alive) == 2, "the first two were kept long enough"
    calls.close()
    assert len(request.alive) == 0


def test_a_call_that_was_broken_off_is_kept_too() -> None:
    request, calls = Request(), Calls()
    with pytest.raises(RuntimeError, match="enough"), calls.responses(request):
        raise RuntimeError("enough")
    assert len(request.alive) == 1


def test_many_threads_call_at_once() -> None:
    times = iter(range(10_000_000))
    request, calls = Request(), Calls(lambda: next(times) / 100)

    def call(_: int) -> int:
        with calls.responses(request) as responses:
            return sum(responses)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(call, range(4000))) == {6}
    assert 900 <= len(request.alive) <= 1100, "ten seconds, a call each hundredth"
