"""The engine's loop and scheduler on a fake runner, stepped by hand: no thread, no clock."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from deepseek_triton.ensemble.engine.liveness import MAX_UNACKNOWLEDGED
from deepseek_triton.ensemble.engine.loop import EngineLoop
from deepseek_triton.ensemble.engine.request_loop import QueueFullError
from deepseek_triton.ensemble.engine.runners.base import OutOfMemoryError
from deepseek_triton.ensemble.engine.sequence import NEVER, Request, Sequence
from deepseek_triton.ensemble.engine.thinking import Thinking
from deepseek_triton.ensemble.guided import BackgroundGuide
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from deepseek_triton.ensemble.sampling import Sampler, SamplingParams
from tests.support.fakes import (
    FakeAcknowledgements,
    FakeRunner,
    FakeSink,
    PipelinedFakeRunner,
    SamplingFakeRunner,
    expected_tokens,
)

END = 0


class Engine:
    """An EngineLoop driven step by step; after each step, what is ready has been sent."""

    def __init__(
        self,
        runner: FakeRunner | None = None,
        max_num_batched_tokens: int = 8,
        end_ids: tuple[int, ...] = (END,),
        **settings: Any,
    ) -> None:
        self.runner = runner or FakeRunner()
        self.acknowledgements = FakeAcknowledgements()
        self.now = 0.0
        self.end_ids = frozenset(end_ids)
        self.loop = EngineLoop(
            self.runner,
            settings=EngineSettings(max_num_batched_tokens=max_num_batched_tokens, **settings),
            acknowledgements=self.acknowledgements,
            clock=lambda: self.now,
        )
        self._ids = itertools.count(1)

    def submit(
        self,
        prompt: list[int],
        stream: bool = True,
        acknowledge: bool = False,
        priority: int = 1,
        queue_deadline: float = NEVER,
        deadline: float = NEVER,
        sink: FakeSink | None = None,
        thinking: Callable[[], Thinking] | None = None,
        guide: Callable[[], BackgroundGuide] | None = None,
        **params: Any,
    ) -> FakeSink:
        sink = sink or FakeSink()
        number = next(self._ids)
        request = Request(
            stream_id=number,
            request_id=f"request-{number}",
            stop_key="secret",
            prompt_ids=np.array(prompt, np.int64),
            params=SamplingParams(**params),
            sink=sink,
            is_streamed=stream,
            expects_acknowledgement=acknowledge,
            priority=priority,
            arrived_at=self.now,
            queue_deadline=queue_deadline,
            deadline=deadline,
        )
        for index in range(request.params.num_return_sequences):
            sampler = Sampler(request.params, prompt, self.end_ids, index)
            sequence = Sequence(request, index, sampler, guide=guide and guide(), thinking=thinking and thinking())
            request.sequences.append(sequence)
        self.loop.submit(request)
        return sink

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            if self.loop._requests or not self.loop._inbox.empty():  # an idle loop would wait
                self.loop._receive()
            self.loop.step()
            self.loop._emit()

    def run(self, limit: int = 1000) -> None:
        for _ in range(limit):
            self.step()
            if not self.loop._requests:
                return
        raise AssertionError("the engine did not come to an end")

    @property
    def num_free_slots(self) -> int:
        return self.loop._scheduler.num_free_slots


@pytest.mark.parametrize("prompt_len", [1, 7, 8, 9, 30])
def test_tokens_are_those_of_the_model_whatever_the_chunk(prompt_len: int) -> None:
    engine = Engine(max_num_batched_tokens=8)
    prompt = list(range(1, prompt_len + 1))
    sink = engine.submit(prompt, max_tokens=10)
    engine.run()
    assert sink.ids == expected_tokens(prompt, 10)
    assert sink.finish_reason == "length"


def test_many_sequences_give_what_each_gives_alone() -> None:
    rng = np.random.default_rng(0)
    engine = Engine(FakeRunner(max_num_seqs=3), max_num_batched_tokens=4)
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
    engine = Engine(FakeRunner(max_num_seqs=1))
    sinks = [engine.submit([n], max_tokens=3) for n in (1, 2, 3)]
    for done in range(3):
        engine.step(3)
        assert [bool(sink.finish_reason) for sink in sinks] == [n <= done for n in range(3)]


def test_a_long_prompt_delays_a_running_stream_by_one_chunk_a_token() -> None:
    engine = Engine(FakeRunner(max_seq_len=200), max_num_batched_tokens=8)
    running = engine.submit([1], max_tokens=50)
    engine.step(2)
    engine.submit(list(range(1, 81)), max_tokens=2)
    engine.runner.calls.clear()
    before = len(running.ids)
    engine.step(10)
    assert engine.runner.calls == [("decode", 1), ("prefill", 8)] * 10
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
    assert len(sink.responses) == 1 and sink.ids == expected_tokens([3], 12)


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
    engine = Engine(FakeRunner(max_num_seqs=2))
    stopped, other = engine.submit([1], max_tokens=50), engine.submit([2], max_tokens=20)
    engine.step(5)
    answers: list[str] = []
    engine.loop.stop("request-1", "secret", lambda: answers.append("done"))
    engine.step()
    assert stopped.finish_reason == "cancelled" and answers == ["done"]
    assert engine.num_free_slots == 1
    engine.run()
    assert other.ids == expected_tokens([2], 20)


def test_stop_ends_a_waiting_request_too() -> None:
    engine = Engine(FakeRunner(max_num_seqs=1))
    engine.submit([1], max_tokens=5)
    waiting = engine.submit([2], max_tokens=5)
    engine.step()
    engine.loop.stop("request-2", "secret", lambda: None)
    engine.run()
    assert len(waiting.responses) == 1 and waiting.ids == [] and waiting.finish_reason == "cancelled"


def test_a_stream_nobody_acknowledges_is_cancelled_and_its_slot_freed() -> None:
    engine = Engine()
    sink = engine.submit([1], acknowledge=True)
    engine.step(6)
    assert len(sink.responses) == MAX_UNACKNOWLEDGED
    engine.now = 0.7
    engine.step()
    assert sink.finish_reason is None
    engine.now = 0.8
    engine.step()
    assert sink.finish_reason == "cancelled"
    assert engine.num_free_slots == 4


def test_tokens_wait_for_a_lagging_consumer_and_travel_together() -> None:
    engine = Engine()
    sink = engine.submit([1], acknowledge=True, max_tokens=20)
    engine.step(10)
    assert [len(update.ids) for update in sink.updates()] == [1, 1]
    engine.acknowledgements.received.append(1)
    engine.step()
    assert [len(update.ids) for update in sink.updates()] == [1, 1, 8]
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


def test_a_request_that_says_nothing_sends_heartbeats_and_is_cancelled_when_nobody_answers() -> None:
    engine = Engine(FakeRunner(max_seq_len=200))
    sink = engine.submit([1], stream=False, acknowledge=True, max_tokens=150)
    engine.step(3)
    assert sink.num_heartbeats == 0
    engine.now = 0.3
    engine.step(2)
    assert sink.num_heartbeats == 1, "one at a time"
    engine.acknowledgements.received.append(1)
    engine.now = 0.6
    engine.step()
    assert sink.num_heartbeats == 2 and sink.finish_reason is None
    engine.now = 1.4
    engine.step()
    assert sink.finish_reason == "cancelled" and engine.num_free_slots == 4


def test_a_request_that_ends_after_a_silence_gets_nothing_behind_its_end() -> None:
    engine = Engine()
    sink = engine.submit([1], stream=False, acknowledge=True, max_tokens=3)
    engine.step(2)
    engine.now = 0.9
    engine.step(2)
    assert sink.is_finished and len(sink.responses) == 1 and sink.ids == expected_tokens([1], 3)


def test_an_answer_that_cannot_be_sent_does_not_stop_the_engine() -> None:
    class BrokenSink(FakeSink):
        def send(self, request: Request, updates: object) -> None:
            raise RuntimeError("the sender has been closed")

        fail = send  # type: ignore[assignment]

    engine = Engine()
    engine.loop.start()
    done = threading.Event()
    for sink in (BrokenSink(), BrokenSink()):
        engine.submit([1], sink=sink)
    engine.loop.stop("nobody", "secret", done.set)
    assert done.wait(60)
    healthy = engine.submit([2], max_tokens=5)
    deadline = time.monotonic() + 60
    while not healthy.is_finished and time.monotonic() < deadline:
        time.sleep(0.01)
    engine.loop.close()
    assert healthy.ids == expected_tokens([2], 5)
    assert engine.num_free_slots == 4


def test_a_waiting_stream_whose_client_has_gone_leaves_the_queue() -> None:
    engine = Engine(FakeRunner(max_num_seqs=1, max_seq_len=200))
    engine.submit([1], max_tokens=150)
    waiting = engine.submit([2], acknowledge=True)
    for now in (0.0, 0.3, 0.6, 1.2):
        engine.now = now
        engine.step()
    assert waiting.finish_reason == "cancelled" and engine.loop.metrics.requests_cancelled_total == 1


def test_slow_acknowledgements_are_no_lost_client() -> None:
    engine = Engine(FakeRunner(max_seq_len=1000))
    sink = engine.submit([1], acknowledge=True, max_tokens=900)
    for step in range(200):  # each takes longer to be acknowledged than the one before
        engine.step()
        engine.now += 0.004 * step
        engine.acknowledgements.received.append(1)
    assert sink.finish_reason is None


@pytest.mark.parametrize("runner", [FakeRunner, SamplingFakeRunner, PipelinedFakeRunner])
def test_samples_of_one_prompt_share_its_prefill_and_the_first_is_the_single_one(runner: type[FakeRunner]) -> None:
    prompt = list(range(1, 31))
    options: dict[str, Any] = {"temperature": 2.0, "seed": 3, "max_tokens": 12}
    alone = Engine(runner(max_num_seqs=3), end_ids=())
    single = alone.submit(prompt, **options)
    alone.run()
    engine = Engine(runner(max_num_seqs=3), end_ids=())
    sink = engine.submit(prompt, num_return_sequences=5, stream=False, **options)
    engine.run()
    assert len(sink.responses) == 1 and len(sink.responses[0]) == 5
    assert sink.ids == single.ids
    assert len({tuple(sink.ids_of(index)) for index in range(5)}) == 5
    assert sum(count for call, count in engine.runner.calls if call == "prefill") == len(prompt) + 4
    assert engine.num_free_slots == 3


def test_one_of_several_samples_may_fail_alone() -> None:
    class NaNRunner(FakeRunner):
        def _logits(self, slot: int, length: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
            logits = super()._logits(slot, length)
            return logits * np.float32("nan") if slot == 1 and length > 33 else logits

    engine = Engine(NaNRunner(), end_ids=())
    sink = engine.submit(list(range(1, 31)), num_return_sequences=3, temperature=2.0, seed=1, max_tokens=9)
    engine.run()
    assert sorted(str(sink.updates(index)[-1].finish_reason) for index in range(3)) == ["error", "length", "length"]
    assert sink.error is None


def test_a_prompt_that_begins_like_an_earlier_one_continues_from_its_slot() -> None:
    engine = Engine(FakeRunner(max_seq_len=200), prefix_reuse="prompt")
    shared = list(range(1, 41))
    engine.submit([*shared, 50, 51], max_tokens=4)
    engine.run()
    engine.runner.calls.clear()
    sink = engine.submit([*shared, 60, 61], max_tokens=6)
    engine.run()
    assert sink.ids == expected_tokens([*shared, 60, 61], 6)
    assert [call for call in engine.runner.calls if call[0] == "prefill"] == [("prefill", 2)]
    metrics = engine.loop.metrics
    assert (metrics.prefix_hits_total, metrics.prefix_hit_tokens_total, metrics.prompt_tokens_total) == (1, 40, 84)


@pytest.mark.parametrize(("reuse", "num_computed"), [("off", 56), ("prompt", 16), ("all", 7)])
def test_how_much_of_a_chat_turn_is_reused(reuse: str, num_computed: int) -> None:
    engine = Engine(FakeRunner(max_seq_len=200), prefix_reuse=reuse)
    first = list(range(1, 41))
    answer = engine.submit(first, max_tokens=10)
    engine.run()
    engine.runner.calls.clear()
    second = [*first, *answer.ids, 90, 91, 92, 93, 94, 95]
    sink = engine.submit(second, max_tokens=5)
    engine.run()
    assert sink.ids == expected_tokens(second, 5)
    assert sum(count for call, count in engine.runner.calls if call == "prefill") == num_computed


def test_two_chats_in_turn_both_find_what_they_left() -> None:
    engine = Engine(FakeRunner(max_seq_len=200))
    chats = [[n] * 20 for n in (1, 2, 3)]
    for chat in chats * 3:
        sink = engine.submit(list(chat), max_tokens=2)
        engine.run()
        assert sink.ids == expected_tokens(chat, 2)
        chat.append(9)
    assert engine.loop.metrics.prefix_hits_total == 6


@pytest.mark.slow
def test_random_traffic_with_shared_prefixes_gives_what_each_gives_alone() -> None:
    rng = np.random.default_rng(4)
    for reuse in ("prompt", "all"):
        engine = Engine(FakeRunner(max_num_seqs=3, max_seq_len=120), max_num_batched_tokens=7, prefix_reuse=reuse)
        roots = [rng.integers(1, 100, 30).tolist() for _ in range(3)]
        expected, sinks = [], []
        for _ in range(60):
            root = roots[rng.integers(3)]
            prompt = root[: rng.integers(10, 31)] + rng.integers(1, 100, rng.integers(0, 20)).tolist()
            length = int(rng.integers(1, 25))
            sinks.append(engine.submit(prompt, max_tokens=length))
            expected.append(expected_tokens(prompt, length))
            engine.step(int(rng.integers(0, 6)))
        engine.run()
        assert [sink.ids for sink in sinks] == expected
        assert engine.loop.metrics.prefix_hits_total > 10


def test_the_urgent_are_served_first() -> None:
    engine = Engine(FakeRunner(max_num_seqs=1))
    engine.submit([1], max_tokens=3)
    engine.step()
    late, normal, urgent = (engine.submit([n], max_tokens=2, priority=p) for n, p in ((2, 3), (3, 2), (4, 1)))
    order = []
    for _ in range(12):
        engine.step()
        order += [name for name, sink in (("late", late), ("normal", normal), ("urgent", urgent)) if sink.is_finished]
    assert list(dict.fromkeys(order)) == ["urgent", "normal", "late"]


def test_a_full_queue_refuses_at_once() -> None:
    engine = Engine(FakeRunner(max_num_seqs=1), max_queue_size=2)
    running = engine.submit([1], max_tokens=5)
    engine.step()
    engine.submit([2], max_tokens=5)
    engine.submit([3], max_tokens=5)
    with pytest.raises(QueueFullError, match=r"queue is full \(max_queue_size=2\); retry later"):
        engine.submit([4])
    engine.run()
    assert running.is_finished and engine.loop.metrics.requests_refused_total == 1
    engine.submit([5], max_tokens=1)
    engine.run()


def test_an_urgent_request_is_not_refused_because_ordinary_ones_wait() -> None:
    engine = Engine(FakeRunner(max_num_seqs=1), max_queue_size=2)
    engine.submit([1], max_tokens=5)
    engine.step()
    waiting = [engine.submit([2 + number], max_tokens=5, priority=2) for number in range(2)]
    engine.loop._receive()
    with pytest.raises(QueueFullError):
        engine.submit([9], priority=2)
    urgent = [engine.submit([7 + number], max_tokens=5, priority=1) for number in range(2)]
    engine.loop._receive()
    for priority in (1, 2):  # as many urgent ones wait as may; in all there are never more than twice as many
        with pytest.raises(QueueFullError):
            engine.submit([9], priority=priority)
    engine.run()
    assert all(sink.is_finished and sink.error is None for sink in (*waiting, *urgent))


def test_waiting_too_long_is_an_error_and_so_is_running_too_long() -> None:
    engine = Engine(FakeRunner(max_num_seqs=1, max_seq_len=500))
    running = engine.submit([1], max_tokens=400, deadline=2.0)
    waiting = engine.submit([2], queue_deadline=1.0)
    engine.step(3)
    assert waiting.error is None
    engine.now = 1.5
    engine.step()
    assert waiting.error == "the request timed out after 1500 ms, waiting for a slot"
    assert waiting.error_kind == "unavailable" and running.error is None
    engine.now = 2.5
    engine.step()
    assert running.error is not None and "after 2500 ms, having generated 4 tokens" in running.error
    assert engine.num_free_slots == 1 and engine.loop.metrics.requests_expired_total == 2


def test_out_of_memory_ends_the_newest_request_and_the_others_go_on() -> None:
    engine = Engine()
    first, second = engine.submit([1], max_tokens=8), engine.submit([2], max_tokens=8)
    engine.step(3)
    engine.runner.fail_next = OutOfMemoryError("no memory for 2 rows")
    engine.run()
    assert second.error == "decode failed: no memory for 2 rows"
    assert first.ids == expected_tokens([1], 8)


def test_a_drawing_runner_gives_the_same_tokens() -> None:
    prompts = [[n, n + 1, n + 2] * 4 for n in range(1, 9)]
    ids = []
    for runner in (FakeRunner(max_num_seqs=4), SamplingFakeRunner(max_num_seqs=4)):
        engine = Engine(runner)
        sinks = [
            engine.submit(prompt, max_tokens=9, repetition_penalty=1.0 if n % 2 else 1.3, num_log_probs=0)
            for n, prompt in enumerate(prompts)
        ]
        engine.run()
        ids.append([sink.ids for sink in sinks])
        log_probs = [value for sink in sinks for u in sink.updates() if u.log_probs for value in u.log_probs.tokens]
        assert len(log_probs) == 8 * 9 and max(log_probs) < 0
    assert ids[0] == ids[1]
    assert isinstance(runner, SamplingFakeRunner) and runner.num_sampled > 0 and runner.num_logits_rows > 0


def test_what_is_ready_is_sent_while_the_runner_computes() -> None:
    sent: list[int] = []

    class WatchingRunner(SamplingFakeRunner):
        def finish_decode(self) -> Any:
            sent.append(sum(len(update.ids) for update in sink.updates()))
            return super().finish_decode()

    engine = Engine(WatchingRunner())
    sink = engine.submit([1], max_tokens=4)
    for _ in range(4):
        engine.loop._receive()
        engine.loop.step()
    assert sent == [1, 2, 3], "before each step ends, the tokens of those before have gone out"


def test_sending_never_takes_longer_than_the_step_that_runs_meanwhile() -> None:
    class SlowSink(FakeSink):
        def send(self, request: Request, updates: Any) -> None:
            engine.now += 0.001  # of the 0.01 that a step takes
            super().send(request, updates)

    class SteadyRunner(SamplingFakeRunner):
        def finish_decode(self) -> Any:
            engine.now = max(engine.now, started[-1] + 0.01)
            return super().finish_decode()

        def start_decode(self, *arguments: Any) -> None:
            started.append(engine.now)
            super().start_decode(*arguments)

    started: list[float] = []
    engine = Engine(SteadyRunner(max_num_seqs=24, max_seq_len=200))
    sinks = [engine.submit([n], sink=SlowSink(), max_tokens=100) for n in range(1, 25)]
    engine.loop._receive()
    while engine.loop._requests:
        engine.loop.step()
    intervals = np.diff(started[30:])
    assert np.median(intervals) < 0.0115, "sending to all would take 0.024"
    for n, sink in enumerate(sinks, 1):
        assert sink.ids == expected_tokens([n], 100)
        assert len(sink.responses) > 20, "nobody is left out"


def test_cancelling_while_a_step_runs_leaves_the_others_alone() -> None:
    class CancellingRunner(SamplingFakeRunner):
        def start_decode(self, *arguments: Any) -> None:
            super().start_decode(*arguments)
            gone.has_gone = len(stays.ids) > 2

    engine = Engine(CancellingRunner())
    gone, stays = engine.submit([1], max_tokens=20), engine.submit([2], max_tokens=10)
    engine.run()
    assert gone.finish_reason == "cancelled" and len(gone.ids) < 8
    assert stays.ids == expected_tokens([2], 10)


def test_log_probs_and_times_are_told_as_asked() -> None:
    engine = Engine()
    sink = engine.submit([1, 2], max_tokens=3, num_log_probs=2)
    request = next(iter(engine.loop._requests.values()), None)
    assert request is None
    engine.run()
    updates = sink.updates()
    log_probs = [update.log_probs for update in updates if update.log_probs]
    tokens = [value for lp in log_probs for value in lp.tokens]
    assert len(tokens) == 3
    np.testing.assert_allclose(tokens, 1 - np.log(np.exp(1) + 99), rtol=1e-6)
    assert log_probs[-1].total == pytest.approx(sum(tokens))
    assert [row[0][0] for lp in log_probs for row in lp.top] == expected_tokens([1, 2], 3)
