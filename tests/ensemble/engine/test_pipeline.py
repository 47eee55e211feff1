"""Steps in flight: whatever happens, every sequence has the tokens that one step at a time gives it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_triton.ensemble.engine.pipeline import MAX_SHARE_LEFT_OUT
from deepseek_triton.ensemble.engine.runners.base import OutOfMemoryError
from deepseek_triton.ensemble.engine.sequence import Request
from deepseek_triton.ensemble.engine.thinking import Thinking, ThinkingTags
from tests.ensemble.engine.test_engine import Engine
from tests.support.fakes import FakeRunner, FakeSink, PipelinedFakeRunner, SamplingFakeRunner, expected_tokens
from tests.support.late_guides import late_guide

VOCAB_SIZE, MAX_SEQ_LEN = 40, 48
END_IDS = (3, 11)
TAGS = ThinkingTags(1, 2)
ROOT = list(range(5, 29))
# Requests that are sampled by the runner, by the host, or by the host for their first tokens.
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 9},
    "top_k": {"temperature": 1.0, "seed": 9, "top_k": 5},
    "penalised": {"presence_penalty": 1.5},
    "min_tokens": {"min_tokens": 4, "temperature": 1.0, "seed": 4},
    "log_probs": {"num_log_probs": 0},
    "thinking": {"thinking": lambda: Thinking(TAGS, is_open=True, budget=3)},
    "guided": {"guide": lambda: late_guide(VOCAB_SIZE, [0, 2, 0, 1, 5])},
    "guided late": {
        "guide": lambda: late_guide(VOCAB_SIZE, [9]),
        "thinking": lambda: Thinking(TAGS, is_open=True, budget=2),
    },
    "guided two": {
        "guide": lambda: late_guide(VOCAB_SIZE, [3, 0]),
        "temperature": 1.0,
        "seed": 3,
        "num_return_sequences": 2,
    },
    "two": {"temperature": 1.0, "seed": 2, "num_return_sequences": 2},
}


class OneAtATime(PipelinedFakeRunner):
    steps_in_flight = 1


class ThreeInFlight(PipelinedFakeRunner):
    steps_in_flight = 3


def make(runner: type[PipelinedFakeRunner] = PipelinedFakeRunner, max_num_seqs: int = 4, **more: Any) -> Engine:
    options: dict[str, Any] = {"max_num_batched_tokens": 6, "end_ids": END_IDS, "max_prefill_stall": 5.0, **more}
    return Engine(runner(max_num_seqs, MAX_SEQ_LEN, VOCAB_SIZE), **options)


@dataclass(frozen=True)
class Wanted:
    prompt: tuple[int, ...]
    kind: str
    max_tokens: int

    def submit(self, engine: Engine) -> FakeSink:
        max_tokens = max(self.max_tokens, KINDS[self.kind].get("min_tokens", 1))
        return engine.submit(list(self.prompt), max_tokens=max_tokens, **KINDS[self.kind])

    @property
    def num_sequences(self) -> int:
        return int(KINDS[self.kind].get("num_return_sequences", 1))


@cache
def alone(wanted: Wanted) -> tuple[list[int], ...]:
    """The tokens of each of its sequences, one step at a time, with no other request."""
    engine = make(OneAtATime)
    sink = wanted.submit(engine)
    engine.run()
    return tuple(sink.ids_of(index) for index in range(wanted.num_sequences))


prompts = st.tuples(st.integers(0, 24), st.lists(st.integers(4, 39), min_size=1, max_size=9)).map(
    lambda parts: (*ROOT[: parts[0]], *parts[1])
)
requests = st.builds(Wanted, prompts, st.sampled_from(sorted(KINDS)), st.integers(1, 20))
faults = st.sampled_from([
    (where, kind, error) for where in ("begin", "finish") for kind in ("decode", "prefill") for error in ("memory", "?")
])  # fmt: skip
actions = st.one_of(
    requests, requests, st.integers(1, 6), st.integers(1, 6), st.tuples(st.just("stop"), st.integers(0, 20)), faults
)


def act(engine: Engine, action: Any, sinks: list[tuple[Wanted, FakeSink]]) -> None:
    runner = engine.runner
    assert isinstance(runner, PipelinedFakeRunner)
    if isinstance(action, Wanted):
        sinks.append((action, action.submit(engine)))
    elif isinstance(action, int):
        engine.step(action)
    elif action[0] == "stop":
        while not engine.loop._inbox.empty():  # `_receive` would wait for more, were this the last request
            engine.loop._handle(engine.loop._inbox.get())
        engine.loop._stop(f"request-{action[1]}", "secret", lambda: None)
    else:
        where, kind, what = action
        error = OutOfMemoryError("no memory") if what == "memory" else RuntimeError("broken")
        if where == "begin":
            runner.fail_next = error
        else:
            runner.fail_finish[kind] = error


def run_script(engine: Engine, script: list[Any]) -> list[tuple[Wanted, FakeSink]]:
    """Do the actions, and run what was begun to its end."""
    sinks: list[tuple[Wanted, FakeSink]] = []
    for action in script:
        act(engine, action, sinks)
    if sinks:
        engine.run()
    return sinks


def check_tokens(sinks: list[tuple[Wanted, FakeSink]], script: list[Any]) -> None:
    for wanted, sink in sinks:
        for index, tokens in enumerate(alone(wanted)):
            found, updates = sink.ids_of(index), sink.updates(index)
            is_whole = sink.error is None and updates and updates[-1].finish_reason != "cancelled"
            assert found == (tokens if is_whole else tokens[: len(found)]), wanted
        assert sink.is_finished or sink.error in ("decode failed: broken", "decode failed: no memory",
                                                  "prefill failed: broken", "prefill failed: no memory")  # fmt: skip
        if not any(isinstance(action, tuple) for action in script):
            assert sink.error is None and sink.finish_reason in ("stop", "length")


@pytest.mark.slow
@settings(max_examples=300)
@given(
    st.lists(actions, min_size=1, max_size=30),
    st.sampled_from(["off", "prompt", "all"]),
    st.integers(1, 4),
    st.sampled_from([PipelinedFakeRunner, PipelinedFakeRunner, ThreeInFlight]),
)
def test_whatever_happens_the_tokens_are_those_of_one_step_at_a_time(
    script: list[Any], reuse: str, max_num_seqs: int, runner: type[PipelinedFakeRunner]
) -> None:
    engine = make(runner, max_num_seqs, prefix_reuse=reuse)
    check_tokens(run_script(engine, script), script)
    assert engine.num_free_slots == max_num_seqs


@pytest.mark.parametrize("runner", [PipelinedFakeRunner, ThreeInFlight])
def test_a_prefill_that_fails_takes_no_logits_from_a_sequence_that_waits_for_its_mask(
    runner: type[PipelinedFakeRunner],
) -> None:
    script = [Wanted((4,), "guided", 2), 2, Wanted((4,), "greedy", 1), ("finish", "prefill", "memory")]
    sinks = run_script(make(runner), script)
    assert [sink.error for _, sink in sinks] == [None, "prefill failed: no memory"]
    check_tokens(sinks, script)


class Watching(PipelinedFakeRunner):
    """Notes, whenever a decode is waited for, how many further calls keep the runner busy meanwhile."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.begun_meanwhile: list[int] = []

    def finish_decode(self) -> Any:
        self.begun_meanwhile.append(sum(map(len, self._in_flight.values())) - 1)
        return super().finish_decode()


def test_the_runner_is_busy_while_a_step_is_waited_for_and_no_logits_travel() -> None:
    engine = make(Watching, max_num_batched_tokens=16, end_ids=())
    runner = engine.runner
    assert isinstance(runner, Watching)
    sinks = [engine.submit([n, n + 1], max_tokens=20) for n in (5, 6, 7)]
    engine.run()
    assert all(
        sink.ids == expected_tokens([n, n + 1], 20, VOCAB_SIZE) for n, sink in zip((5, 6, 7), sinks, strict=True)
    )
    # One prefill, then 19 decodes; only behind the last is there nothing to begin.
    assert runner.begun_meanwhile == [1] * 18 + [0]
    assert runner.num_ahead == 3 * 19 and runner.num_logits_rows == 0
    assert [count for call, count in runner.calls if call == "decode"] == [3] * 19, "nothing is computed in vain"


def test_prompts_are_computed_between_decodes_without_a_gap() -> None:
    engine = make(Watching, max_num_seqs=4, end_ids=(), max_num_batched_tokens=8)
    runner = engine.runner
    assert isinstance(runner, Watching)
    running = engine.submit([5], max_tokens=30)
    engine.step(4)
    prompt = list(range(4, 34))
    late = engine.submit(prompt, max_tokens=4)
    runner.calls.clear()
    runner.begun_meanwhile.clear()
    engine.step(4)
    assert [call for call, _ in runner.calls] == ["decode", "prefill"] * 4
    assert runner.begun_meanwhile == [2, 3, 3, 3], "a decode and a prefill, and the prefill of the step itself"
    engine.run()
    assert running.ids == expected_tokens([5], 30, VOCAB_SIZE) and late.ids == expected_tokens(prompt, 4, VOCAB_SIZE)


def test_one_that_is_chosen_on_the_host_skips_a_beat_and_holds_nobody_up() -> None:
    engine = make(max_num_seqs=5, end_ids=())
    plain = [engine.submit([n], max_tokens=25) for n in (5, 6, 7, 8)]
    penalised = engine.submit([9], max_tokens=12, presence_penalty=0.1)
    engine.step(4)
    before = [len(sink.ids) for sink in (*plain, penalised)]
    engine.step(10)
    assert [len(sink.ids) - n for sink, n in zip((*plain, penalised), before, strict=True)] == [10] * 4 + [5]
    engine.run()
    assert [sink.ids for sink in plain] == [expected_tokens([n], 25, VOCAB_SIZE) for n in (5, 6, 7, 8)]


def test_where_many_are_chosen_on_the_host_all_go_step_by_step() -> None:
    engine = make(max_num_seqs=4, end_ids=())
    sinks = [engine.submit([n], max_tokens=20, **KINDS["greedy" if n % 2 else "penalised"]) for n in (5, 6, 7, 8)]
    assert MAX_SHARE_LEFT_OUT < 0.5
    engine.step(4)
    before = [len(sink.ids) for sink in sinks]
    engine.step(10)
    assert len({len(sink.ids) - n for sink, n in zip(sinks, before, strict=True)}) == 1
    engine.run()
    assert all(len(sink.ids) == 20 for sink in sinks)


def test_a_result_too_many_that_fails_concerns_nobody() -> None:
    tokens = expected_tokens([5], 6, VOCAB_SIZE)
    engine = make(end_ids=(tokens[4],))
    sink = engine.submit([5], max_tokens=20)
    while not engine.loop._requests or engine.loop._requests[1].sequences[0].finish_reason is None:
        engine.loop._receive()
        engine.loop.step()
    assert not engine.loop._pipeline.is_empty, "the step behind its end is in flight"
    assert isinstance(engine.runner, PipelinedFakeRunner)
    engine.runner.fail_finish["decode"] = RuntimeError("too late")
    engine.loop._finish_step()
    engine.loop._emit()
    assert sink.ids == tokens[:4] and sink.finish_reason == "stop"
    assert engine.loop.metrics.requests_failed_total == 0


def test_sending_is_hidden_behind_the_steps_in_flight() -> None:
    class SlowSink(FakeSink):
        def send(self, request: Request, updates: Any) -> None:
            engine.now += 0.001  # of the 0.01 that a step takes
            super().send(request, updates)

    class Steady(PipelinedFakeRunner):
        free_at = 0.0

        def start_decode(self, *arguments: Any) -> None:
            super().start_decode(*arguments)
            engine.now += 0.002  # the host's own work
            self.free_at = max(self.free_at, engine.now) + 0.01
            ends.append(self.free_at)

        def finish_decode(self) -> Any:
            engine.now = max(engine.now, ends.pop(0))
            finished.append(engine.now)
            return super().finish_decode()

    ends: list[float] = []
    finished: list[float] = []
    engine = make(Steady, max_num_seqs=24, end_ids=(), max_num_batched_tokens=64)
    sinks = [engine.submit([n], sink=SlowSink(), max_tokens=40) for n in range(5, 29)]
    engine.loop._receive()
    while engine.loop._requests:
        engine.loop.step()
    assert np.median(np.diff(finished)) == pytest.approx(0.01), "to send to all would take 0.024"
    for n, sink in enumerate(sinks, 5):
        assert sink.ids == expected_tokens([n], 40, VOCAB_SIZE) and len(sink.responses) > 8


@pytest.mark.parametrize("reuse", ["prompt", "all"])
def test_the_slot_of_one_that_has_ended_is_taken_while_its_last_step_is_in_flight(reuse: str) -> None:
    prompt = [*ROOT, 30]
    tokens = expected_tokens(prompt, 6, VOCAB_SIZE)
    engine = make(max_num_seqs=1, end_ids=(tokens[3],), max_num_batched_tokens=64, prefix_reuse=reuse)
    first = engine.submit(prompt, max_tokens=10)
    # Its prompt ends exactly where the step too many writes, and where the first one's answer ended.
    longer = [*prompt, *tokens[:3], 31]
    second = engine.submit(longer, max_tokens=5, end_id=-1)
    engine.run()
    assert first.ids == tokens[:3] and second.ids == expected_tokens(longer, 5, VOCAB_SIZE)
    assert engine.loop.metrics.prefix_hits_total == 1


def test_a_fault_of_the_engine_s_own_leaves_nothing_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(end_ids=())
    sink = engine.submit([5], max_tokens=30)
    engine.step(5)

    def faulty() -> Any:
        monkeypatch.undo()
        engine.loop._inbox.put(None)
        raise AssertionError("the books don't balance")

    monkeypatch.setattr(engine.loop._scheduler, "schedule", faulty)
    engine.loop.run()
    assert sink.error == "the engine failed: the books don't balance"
    assert engine.loop._pipeline.is_empty and engine.num_free_slots == 4
    assert not np.any([len(calls) for calls in engine.runner._in_flight.values()])  # type: ignore[attr-defined]


# --- masks that come late ---------------------------------------------------------------------------------------------

EVERY_RUNNER = [FakeRunner, SamplingFakeRunner, PipelinedFakeRunner, ThreeInFlight]


def guided(runner: type[FakeRunner], **more: Any) -> Engine:
    return Engine(runner(5, MAX_SEQ_LEN, VOCAB_SIZE), end_ids=(), max_num_batched_tokens=16, **more)


@pytest.mark.parametrize("runner", EVERY_RUNNER)
def test_a_slow_mask_leaves_its_own_sequence_out_and_no_other(runner: type[FakeRunner]) -> None:
    engine = guided(runner)
    plain = [engine.submit([n], max_tokens=40) for n in (5, 6, 7)]
    quick = engine.submit([8], max_tokens=40, guide=lambda: late_guide(VOCAB_SIZE, [0]))
    slow = engine.submit([9], max_tokens=3, guide=lambda: late_guide(VOCAB_SIZE, [16]))
    engine.step(4)
    before = [len(sink.ids) for sink in (*plain, quick, slow)]
    engine.step(10)
    gained = [len(sink.ids) - n for sink, n in zip((*plain, quick, slow), before, strict=True)]
    steps_ahead = getattr(runner, "steps_in_flight", 1)
    assert gained[:3] == [10] * 3 and gained[3] >= 10 // steps_ahead and gained[4] == 0
    engine.run()
    assert len(slow.ids) == 3 and slow.finish_reason == "length"
    assert [sink.ids for sink in plain] == [expected_tokens([n], 40, VOCAB_SIZE) for n in (5, 6, 7)]


@pytest.mark.parametrize("runner", EVERY_RUNNER)
def test_a_request_ends_at_once_while_its_mask_is_computed(runner: type[FakeRunner]) -> None:
    engine = guided(runner)
    slow = engine.submit([9], guide=lambda: late_guide(VOCAB_SIZE, [10**9]), deadline=50.0)
    other = engine.submit([8], guide=lambda: late_guide(VOCAB_SIZE, [10**9]))
    engine.step(5)
    assert engine.num_free_slots == 3
    engine.now = 51.0
    engine.step()
    assert slow.error is not None and "timed out" in slow.error and engine.num_free_slots == 4
    engine.loop._stop("request-2", "secret", lambda: None)
    assert other.finish_reason == "cancelled" and engine.num_free_slots == 5
    engine.loop.step()
    assert not engine.loop._pipeline._undecided
    again = engine.submit([8], max_tokens=4, guide=lambda: late_guide(VOCAB_SIZE, [0]))
    engine.run()
    assert len(again.ids) == 4


@pytest.mark.parametrize("runner", EVERY_RUNNER)
@pytest.mark.parametrize("delay", [0, 3])
def test_a_guide_that_fails_is_its_client_s_fault_and_ends_no_other(runner: type[FakeRunner], delay: int) -> None:
    engine = guided(runner)
    plain = engine.submit([5], max_tokens=30)
    dear = engine.submit([9], max_tokens=30, guide=lambda: late_guide(VOCAB_SIZE, [delay], fails_after=4))
    engine.run()
    assert (dear.error, dear.error_kind, len(dear.ids)) == ("it is too dear", "invalid", 4)
    assert plain.ids == expected_tokens([5], 30, VOCAB_SIZE) and engine.num_free_slots == 5
