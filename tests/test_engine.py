"""The engine's loop and scheduler on a fake runner, stepped by hand: no thread, no clock."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ensemble.engine.loop import MAX_UNACKNOWLEDGED, EngineLoop
from ensemble.engine.sequence import Sequence
from ensemble.sampling import SamplingParams
from tests.fakes import FakeAcknowledgements, FakeRunner, FakeSink, expected_tokens

END = 0


class Engine:
    """An EngineLoop driven step by step."""

    def __init__(
        self, runner: FakeRunner | None = None, prefill_chunk: int = 8, end_ids: tuple[int, ...] = (END,)
    ) -> None:
        self.runner = runner or FakeRunner()
        self.acknowledgements = FakeAcknowledgements()
        self.now = 0.0
        self.loop = EngineLoop(
            self.runner,
            end_ids=end_ids,
            prefill_chunk=prefill_chunk,
            acknowledgements=self.acknowledgements,
            cancel_after_s=1.0,
            clock=lambda: self.now,
        )
        self._ids = itertools.count(1)

    def submit(self, prompt: list[int], stream: bool = True, acknowledge: bool = False, **params: object) -> FakeSink:
        sink = FakeSink()
        number = next(self._ids)
        self.loop.submit(
            Sequence(
                sequence_id=number,
                request_id=f"request-{number}",
                prompt_ids=np.array(prompt, np.int64),
                params=SamplingParams(**params),  # type: ignore[arg-type]
                sink=sink,
                stream=stream,
                expects_acknowledgement=acknowledge,
            )
        )
        return sink

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.loop._inbox.put(lambda: None)  # so that an idle loop doesn't wait
            self.loop._receive()
            step = self.loop._scheduler.schedule()
            if step:
                self.loop._run(step)
                self.loop._emit()

    def run(self, limit: int = 1000) -> None:
        for _ in range(limit):
            self.step()
            if not self.loop._scheduler.sequences:
                return
        raise AssertionError("the engine did not come to an end")

    @property
    def num_free_slots(self) -> int:
        return self.loop._scheduler.num_free_slots


@pytest.mark.parametrize("prompt_len", [1, 7, 8, 9, 30])
def test_tokens_are_those_of_the_model_whatever_the_chunk(prompt_len: int) -> None:
    engine = Engine(prefill_chunk=8)
    prompt = list(range(1, prompt_len + 1))
    sink = engine.submit(prompt, max_tokens=10)
    engine.run()
    assert sink.ids == expected_tokens(prompt, 10)
    assert sink.finish_reason == "length"


def test_many_sequences_give_what_each_gives_alone() -> None:
    rng = np.random.default_rng(0)
    engine = Engine(FakeRunner(num_slots=3), prefill_chunk=4)
    prompts = [rng.integers(1, 100, rng.integers(1, 20)).tolist() for _ in range(25)]
    lengths = rng.integers(1, 30, 25).tolist()
    sinks = []
    for prompt, length in zip(prompts, lengths, strict=True):
        sinks.append(engine.submit(prompt, max_tokens=length))
        engine.step(int(rng.integers(0, 4)))
    engine.run()
    for prompt, length, sink in zip(prompts, lengths, sinks, strict=True):
        assert sink.ids == expected_tokens(prompt, length)
    assert engine.num_free_slots == 3


def test_a_new_request_joins_at_the_next_step() -> None:
    engine = Engine()
    first = engine.submit([1], max_tokens=20)
    engine.step(5)
    second = engine.submit([2], max_tokens=20)
    engine.step(2)
    assert len(first.ids) == 7
    assert len(second.ids) == 2


def test_more_requests_than_slots_wait_in_order_and_take_a_freed_slot_at_once() -> None:
    engine = Engine(FakeRunner(num_slots=1))
    sinks = [engine.submit([n], max_tokens=3) for n in (1, 2, 3)]
    for done in range(3):
        engine.step(3)
        assert [bool(sink.finish_reason) for sink in sinks] == [n <= done for n in range(3)]


def test_a_long_prompt_delays_a_running_stream_by_one_chunk_a_token() -> None:
    engine = Engine(FakeRunner(max_seq_len=200), prefill_chunk=8)
    running = engine.submit([1], max_tokens=50)
    engine.step(2)
    engine.submit(list(range(1, 81)), max_tokens=2)
    engine.runner.calls.clear()
    before = len(running.ids)
    engine.step(10)
    assert engine.runner.calls == [("prefill", 8), ("decode", 1)] * 9 + [("prefill", 8), ("decode", 1)]
    assert len(running.ids) == before + 10


def test_an_end_token_stops_and_is_no_output() -> None:
    prompt = [5, 6]
    tokens = expected_tokens(prompt, 10)
    engine = Engine(end_ids=(tokens[4],))
    sink = engine.submit(prompt)
    engine.run()
    assert sink.ids == tokens[: tokens.index(tokens[4])]
    assert sink.finish_reason == "stop"


def test_without_stream_one_response_carries_everything() -> None:
    engine = Engine()
    sink = engine.submit([3], stream=False, max_tokens=12)
    engine.run()
    assert sink.responses == [expected_tokens([3], 12)]


def test_the_context_limit_ends_a_sequence() -> None:
    engine = Engine(FakeRunner(max_seq_len=16))
    sink = engine.submit([1] * 10)
    engine.run()
    assert sink.ids == expected_tokens([1] * 10, 6)
    assert sink.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([1] * 64, "the prompt has 64 tokens, the context holds 64"),
        ([1, 100], "must lie in 0 … 99, got 100"),
        ([-1], "must lie in 0 … 99, got -1"),
    ],
)
def test_a_prompt_that_cannot_run_is_refused(prompt: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine().submit(prompt)


def test_stop_frees_the_slot_and_the_others_go_on() -> None:
    engine = Engine(FakeRunner(num_slots=2))
    stopped, other = engine.submit([1], max_tokens=50), engine.submit([2], max_tokens=20)
    engine.step(5)
    answers: list[str] = []
    engine.loop.stop("request-1", lambda: answers.append("done"))
    engine.step()
    assert stopped.finish_reason == "cancelled" and answers == ["done"]
    assert engine.num_free_slots == 1
    engine.run()
    assert other.ids == expected_tokens([2], 20)


def test_stop_ends_a_waiting_request_too() -> None:
    engine = Engine(FakeRunner(num_slots=1))
    engine.submit([1], max_tokens=5)
    waiting = engine.submit([2], max_tokens=5)
    engine.step()
    engine.loop.stop("request-2", lambda: None)
    engine.run()
    assert waiting.responses == [[]] and waiting.finish_reason == "cancelled"


def test_a_stream_nobody_acknowledges_is_cancelled_and_its_slot_freed() -> None:
    engine = Engine()
    sink = engine.submit([1], acknowledge=True)
    engine.step(6)
    assert len(sink.responses) == MAX_UNACKNOWLEDGED
    engine.now = 0.9
    engine.step()
    assert sink.finish_reason is None
    engine.now = 1.1
    engine.step()
    assert sink.finish_reason == "cancelled"
    assert engine.num_free_slots == 4


def test_tokens_wait_for_a_lagging_consumer_and_travel_together() -> None:
    engine = Engine()
    sink = engine.submit([1], acknowledge=True, max_tokens=20)
    engine.step(10)
    assert [len(response) for response in sink.responses] == [1, 1]
    engine.acknowledgements.received.append(1)
    engine.step()
    assert [len(response) for response in sink.responses] == [1, 1, 9]
    engine.run()
    assert sink.ids == expected_tokens([1], 20)


def test_a_direct_client_that_has_gone_is_noticed() -> None:
    engine = Engine()
    sink = engine.submit([1])
    engine.step(3)
    sink.has_gone = True
    engine.step()
    assert sink.finish_reason == "cancelled"


@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_failing_step_ends_its_own_requests_and_the_engine_goes_on(steps_before: int) -> None:
    engine = Engine()
    sink = engine.submit([1], max_tokens=10)
    engine.step(steps_before)
    engine.runner.fail_next = RuntimeError("out of memory")
    engine.step()
    assert sink.error is not None and "out of memory" in sink.error
    assert engine.num_free_slots == 4
    healthy = engine.submit([2], max_tokens=5)
    engine.run()
    assert healthy.ids == expected_tokens([2], 5)


def test_logits_that_are_not_finite_are_an_error_for_that_sequence() -> None:
    class NaNRunner(FakeRunner):
        def _logits(self, slot: int, length: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
            logits = super()._logits(slot, length)
            return logits * np.float32("nan") if self.cache[slot, 0] == 13 else logits

    engine = Engine(NaNRunner())
    broken, healthy = engine.submit([13], max_tokens=5), engine.submit([2], max_tokens=5)
    engine.run()
    assert broken.error is not None and "not finite" in broken.error
    assert healthy.ids == expected_tokens([2], 5)


def test_close_ends_what_runs_and_closes_the_runner() -> None:
    engine = Engine()
    engine.loop.start()
    sink = engine.submit([1])
    engine.loop.close()
    assert engine.runner.is_closed
    assert sink.error == "the engine is shutting down" or sink.finish_reason == "length"


def test_the_same_seed_gives_the_same_tokens_alone_and_in_a_batch() -> None:
    alone = Engine(end_ids=())
    reference = alone.submit([1, 2], temperature=1.5, seed=7, max_tokens=15)
    alone.run()
    crowd = Engine(end_ids=())
    others = [crowd.submit([n], temperature=0.7, seed=n, max_tokens=9) for n in (3, 4)]
    sink = crowd.submit([1, 2], temperature=1.5, seed=7, max_tokens=15)
    crowd.run()
    assert sink.ids == reference.ids
    assert all(other.finish_reason == "length" for other in others)
