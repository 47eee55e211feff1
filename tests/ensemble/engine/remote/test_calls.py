"""What is kept of calls of other models, and for how long."""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from deepseek_triton.ensemble.engine.remote.calls import KEPT_S, LAST_KEPT_S, Calls


class Responses:
    """Three responses, taken one by one."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Responses:
        return self

    def __next__(self) -> int:
        if self.taken == 3:
            raise StopIteration
        self.taken += 1
        return self.taken


class Cancelled(Responses):
    """The same of a newer Triton, where a call can be cancelled."""

    cancelled_at: int | None = None

    def cancel(self) -> None:
        self.cancelled_at = self.taken


class Request:
    """Answers with three responses; `alive` has those that somebody keeps."""

    def __init__(self, kind: type[Responses] = Responses) -> None:
        self._kind = kind
        self.alive: weakref.WeakSet[Responses] = weakref.WeakSet()

    def exec(self, *, decoupled: bool) -> Responses:
        assert decoupled
        responses = self._kind()
        self.alive.add(responses)
        return responses


def test_responses_are_kept_for_a_while_after_their_call() -> None:
    now, request, slept = [100.0], Request(), list[tuple[float, int]]()
    calls = Calls(lambda: now[0], lambda seconds: slept.append((seconds, len(request.alive))))

    def call() -> list[int]:
        with calls.responses(request) as responses:
            return list(responses)

    assert [call(), call()] == [[1, 2, 3]] * 2
    assert len(request.alive) == 2
    now[0] += KEPT_S - 0.1
    call()
    assert len(request.alive) == 3
    now[0] += 0.2
    call()
    assert len(request.alive) == 2, "the first two were kept long enough"
    calls.close()
    assert len(request.alive) == 0
    call()  # of a thread that goes on after the end
    assert len(request.alive) == 0
    assert slept == [(LAST_KEPT_S, 2), (LAST_KEPT_S, 1)], "they live on until Triton has let go"


@pytest.mark.parametrize(("kind", "cancelled_at"), [(Responses, None), (Cancelled, 1)])
def test_of_a_call_that_is_broken_off_the_rest_is_taken(kind: type[Responses], cancelled_at: int | None) -> None:
    request, calls = Request(kind), Calls()
    with pytest.raises(RuntimeError, match="enough"), calls.responses(request) as responses:
        assert next(responses) == 1
        raise RuntimeError("enough")
    (kept,) = request.alive
    assert (kept.taken, getattr(kept, "cancelled_at", None)) == (3, cancelled_at)


def test_a_whole_call_is_not_cancelled() -> None:
    request, calls = Request(Cancelled), Calls()
    with calls.responses(request) as responses:
        assert list(responses) == [1, 2, 3]
    (kept,) = request.alive
    assert isinstance(kept, Cancelled) and kept.cancelled_at is None


def test_many_threads_call_at_once() -> None:
    times = iter(range(10_000_000))
    request, calls = Request(), Calls(lambda: next(times) / 100)

    def call(_: int) -> int:
        with calls.responses(request) as responses:
            return sum(responses)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(call, range(4000))) == {6}
    kept = 100 * KEPT_S  # a call each hundredth
    assert 0.9 * kept <= len(request.alive) <= 1.1 * kept
