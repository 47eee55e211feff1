"""Faults outside the loop never cost the loop's thread, a slot, or the answer of another request."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from deepseek_triton.ensemble.engine.runners.base import Ids, Logits
from tests.ensemble.engine.test_engine import Engine
from tests.support.fakes import FakeRunner, FakeSink, PipelinedFakeRunner, SamplingFakeRunner, expected_tokens

SHARED = list(range(1, 31))


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)


def test_no_heartbeat_follows_the_last_response() -> None:
    engine = Engine()
    sink = engine.submit([1], stream=False, acknowledge=True, max_tokens=3)
    engine.step(2)
    engine.loop.step()  # the last token
    engine.now = 0.3  # a heartbeat is due when it goes out
    engine.loop._emit()
    assert sink.is_finished and sink.num_heartbeats == 0  # FakeSink refuses what comes after the end


@pytest.mark.parametrize("runner", [FakeRunner, SamplingFakeRunner, PipelinedFakeRunner])
def test_a_copy_that_fails_costs_the_reuse_alone(runner: type[FakeRunner]) -> None:
    engine = Engine(runner(max_seq_len=200))
    running = engine.submit([*SHARED, 50], max_tokens=60)
    engine.step(8)
    failures = []

    def fail(source: int, target: int, num_tokens: int) -> None:
        engine.runner.cache[target, : num_tokens // 2] = 77  # half done
        failures.append((source, target))
        raise RuntimeError("no memory to copy")

    copy_prefix, engine.runner.copy_prefix = engine.runner.copy_prefix, fail  # type: ignore[method-assign]
    sink = engine.submit([*SHARED, 60], max_tokens=5)
    engine.step()
    engine.runner.copy_prefix = copy_prefix  # type: ignore[method-assign]
    again = engine.submit([*SHARED, 60, 61], max_tokens=5)
    engine.run()
    assert failures == [(0, 1)]
    assert sink.ids == expected_tokens([*SHARED, 60], 5)
    assert again.ids == expected_tokens([*SHARED, 60, 61], 5)
    assert running.ids == expected_tokens([*SHARED, 50], 60)
    assert engine.num_free_slots == 4


class BrokenSink(FakeSink):
    """Raises where it is told to."""

    def __init__(self, broken: str) -> None:
        super().__init__()
        self._broken = broken.split()

    def send(self, request: Any, updates: Any) -> None:
        if "send" in self._broken:
            raise RuntimeError("no way\nthrough")
        super().send(request, updates)

    def fail(self, message: str, kind: Any) -> None:
        if "fail" in self._broken:
            raise RuntimeError("not even that")
        super().fail(message, kind)

    def is_cancelled(self) -> bool:
        if "is_cancelled" in self._broken:
            raise RuntimeError("nobody knows")
        return False


@pytest.mark.parametrize("broken", ["send", "is_cancelled", "send fail"])
@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_sink_that_raises_ends_its_own_request(broken: str, is_streamed: bool) -> None:
    engine = Engine()
    healthy = engine.submit([2], max_tokens=9)
    engine.submit([1], stream=is_streamed, max_tokens=4)
    engine.loop._receive()
    request = engine.loop._requests[2]
    sink = request.sink = BrokenSink(broken)
    engine.run()
    assert healthy.ids == expected_tokens([2], 9)
    assert engine.num_free_slots == 4 and engine.loop.metrics.requests_failed_total == 1
    if "fail" not in broken:
        assert sink.error is not None and sink.error.startswith("the response could not be sent: n")
        assert "\n" not in sink.error


def test_a_stop_whose_sinks_raise_is_still_the_end() -> None:
    engine = Engine()
    engine.submit([1], max_tokens=50)
    other = engine.submit([2], max_tokens=8)
    engine.step(2)
    engine.loop._requests[1].sink = BrokenSink("send fail")

    def done() -> None:
        raise RuntimeError("the caller has gone")

    engine.loop.stop("request-1", "secret", done)
    engine.run()
    assert other.ids == expected_tokens([2], 8) and engine.num_free_slots == 4


def test_stopping_what_has_just_ended_is_no_cancellation() -> None:
    engine = Engine()
    sink = engine.submit([1], max_tokens=1)
    engine.loop._receive()
    engine.loop.step()  # ended, but not sent yet
    engine.loop.stop("request-1", "secret", lambda: None)
    engine.loop._inbox.put(None)
    assert not engine.loop._receive()
    assert sink.finish_reason == "length" and engine.loop.metrics.requests_cancelled_total == 0


def test_siblings_fail_together_and_nothing_is_computed_for_them_afterwards() -> None:
    class Runner(FakeRunner):
        def prefill(self, slot: int, ids: Ids, start: int) -> Logits:
            assert slot is not None
            if slot == 1:
                raise RuntimeError("slot 1 is broken")
            return super().prefill(slot, ids, start)

    engine = Engine(Runner())
    sink = engine.submit(SHARED, num_return_sequences=3, temperature=1.0, seed=1, max_tokens=9)
    engine.run()
    assert sink.error == "prefill failed: slot 1 is broken"
    assert engine.num_free_slots == 4


@pytest.mark.parametrize("where", ["stop_matcher", "bad_words"])
def test_whatever_a_client_s_words_do_concerns_its_sequence_alone(where: str) -> None:
    class Odd:
        def push(self, token: int) -> None:
            raise KeyError(token)

        def is_allowed(self, token: int) -> bool:
            raise KeyError(token)

    engine = Engine()
    odd, healthy = engine.submit([1], max_tokens=9), engine.submit([2], max_tokens=9)
    engine.loop._receive()
    setattr(engine.loop._requests[1].sequences[0], where, Odd())
    engine.run()
    assert odd.error is not None and healthy.ids == expected_tokens([2], 9)
    assert engine.num_free_slots == 4


class TestOnAThread:
    def test_a_fault_of_the_engine_s_own_ends_all_requests_and_the_next_is_served(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = Engine(FakeRunner(max_seq_len=5000), prefix_reuse="off")
        schedule = engine.loop._scheduler.schedule
        is_faulty = False

        def faulty() -> Any:
            if is_faulty:
                raise AssertionError("the books don't balance")
            return schedule()

        monkeypatch.setattr(engine.loop._scheduler, "schedule", faulty)
        sinks = [engine.submit([n], max_tokens=4900) for n in (1, 2)]
        engine.loop.start()
        wait_until(lambda: all(sink.ids for sink in sinks))
        is_faulty = True
        wait_until(lambda: all(sink.error for sink in sinks))
        is_faulty = False
        assert sinks[0].error == "the engine failed: the books don't balance"
        later = engine.submit([3], max_tokens=5)
        wait_until(lambda: later.is_finished)
        engine.loop.close()
        assert later.ids == expected_tokens([3], 5) and engine.num_free_slots == 4

    def test_the_gauges_of_an_idle_engine_are_zero_whatever_ended_its_last_request(self) -> None:
        engine = Engine(FakeRunner(max_seq_len=5000), prefix_reuse="off")
        sink = engine.submit([1], max_tokens=4900)
        engine.loop.start()
        wait_until(lambda: engine.loop.metrics.slots_used == 1)
        engine.loop.stop("request-1", "secret", lambda: None)
        wait_until(lambda: sink.is_finished)
        wait_until(lambda: engine.loop.metrics.slots_used == 0)
        engine.loop.close()

    def test_what_comes_after_close_has_an_answer_too(self) -> None:
        engine = Engine()
        engine.loop._inbox.put(None)
        late, answers = engine.submit([1]), []
        engine.loop.stop("nobody", "secret", lambda: answers.append("done"))
        engine.loop.run()
        assert late.error == "the engine is shutting down" and late.error_kind == "unavailable"
        assert answers == ["done"] and engine.runner.is_closed
