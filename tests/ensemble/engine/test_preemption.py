"""An engine whose memory is too small for what it has admitted: nobody is lost, and everybody's tokens are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepseek_triton.ensemble.engine.runners.base import DeviceSampling, PromptChunk
from deepseek_triton.ensemble.engine.runners.base import Ids as IdArray
from tests.ensemble.engine.test_engine import Engine
from tests.ensemble.engine.test_pipeline import (
    END_IDS,
    MAX_SEQ_LEN,
    VOCAB_SIZE,
    Wanted,
    actions,
    check_tokens,
    run_script,
)
from tests.support.fakes import FakeSink, PagedFakeRunner, expected_tokens


class OneAtATime(PagedFakeRunner):
    steps_in_flight = 1


class ThreeInFlight(PagedFakeRunner):
    steps_in_flight = 3


def make(
    runner: type[PagedFakeRunner] = PagedFakeRunner, max_num_seqs: int = 4, num_blocks: int = 14, **more: Any
) -> Engine:
    options: dict[str, Any] = {"max_num_batched_tokens": 6, "end_ids": END_IDS, "max_prefill_stall": 5.0, **more}
    return Engine(runner(max_num_seqs, MAX_SEQ_LEN, VOCAB_SIZE, num_blocks), **options)


# The first of two sequences is preempted before its first token: it computes the prompt again.
BEFORE_ITS_TOKEN = [
    Wanted((4,), "greedy", 2), Wanted((4,), "greedy", 1), Wanted((4,), "guided two", 4),
    ("begin", "decode", "memory"), ("finish", "decode", "memory"),
]  # fmt: skip


@pytest.mark.slow
@settings(max_examples=150)
@example(BEFORE_ITS_TOKEN, "off", 2, 12, OneAtATime)
@given(
    st.lists(actions, min_size=1, max_size=30),
    st.sampled_from(["off", "prompt", "all"]),
    st.integers(1, 5),
    st.integers(MAX_SEQ_LEN // 4, 20),
    st.sampled_from([OneAtATime, PagedFakeRunner, ThreeInFlight]),
)
def test_whatever_happens_the_tokens_are_those_that_each_has_alone(
    script: list[Any], reuse: str, max_num_seqs: int, num_blocks: int, runner: type[PagedFakeRunner]
) -> None:
    engine = make(runner, max_num_seqs, num_blocks, prefix_reuse=reuse)
    sinks = run_script(engine, script)
    check_tokens(sinks, script)
    assert engine.num_free_slots == max_num_seqs
    assert engine.loop._scheduler.cache.num_free_blocks == num_blocks, "no block is lost"
    assert engine.loop._scheduler.num_waiting == engine.loop._scheduler.num_running == 0


def crowd(engine: Engine, count: int = 6) -> list[FakeSink]:
    return [engine.submit([n, n + 1, n + 2], max_tokens=40, priority=1 + n % 2) for n in range(5, 5 + count)]


def test_all_end_with_their_own_tokens_when_memory_runs_out() -> None:
    engine = make(max_num_seqs=6, num_blocks=13, end_ids=())
    sinks = crowd(engine)
    engine.run()
    for n, sink in enumerate(sinks, 5):
        assert sink.ids == expected_tokens([n, n + 1, n + 2], 40, VOCAB_SIZE) and sink.finish_reason == "length"
    metrics = engine.loop.metrics
    assert metrics.preemptions_total > 0 and metrics.requests_failed_total == 0
    assert metrics.cache_blocks == engine.loop._scheduler.cache.num_free_blocks == 13
    assert metrics.prompt_tokens_total == 18, "a prompt counts once"


def test_the_newest_of_the_lowest_priority_gives_way() -> None:
    engine = make(max_num_seqs=3, num_blocks=13, end_ids=())
    urgent = engine.submit([5, 6, 7], max_tokens=40, priority=1)
    older, newer = (engine.submit([n, n + 1, n + 2], max_tokens=40, priority=2) for n in (8, 11))
    later = engine.submit([14, 15], max_tokens=2, priority=2)
    ended: list[FakeSink] = []
    while len(ended) < 4:
        engine.step()
        ended += [sink for sink in (urgent, older, newer, later) if sink.is_finished and sink not in ended]
    assert ended[:2] == [urgent, older], "who came later waits, however short"
    scheduler = engine.loop._scheduler
    assert 0 < scheduler.num_preempted < 20


def test_one_that_is_preempted_is_told_nothing_twice_and_may_be_cancelled_meanwhile() -> None:
    engine = make(max_num_seqs=6, num_blocks=13, end_ids=())
    sinks = crowd(engine)
    scheduler = engine.loop._scheduler
    while not scheduler.num_preempted:
        engine.step()
    waiting = [r for r in engine.loop._requests.values() if r.sequences[0].slot is None and r.sequences[0].output_ids]
    assert waiting
    victim = waiting[0].request_id
    engine.loop._stop(victim, "secret", lambda: None)
    engine.run()
    cancelled = sinks[int(victim.removeprefix("request-")) - 1]
    assert cancelled.finish_reason == "cancelled"
    for n, sink in enumerate(sinks, 5):
        tokens = expected_tokens([n, n + 1, n + 2], 40, VOCAB_SIZE)
        assert sink.ids == (tokens[: len(sink.ids)] if sink is cancelled else tokens)
    assert scheduler.cache.num_free_blocks == 13


class Counting(PagedFakeRunner):
    """Counts the prompt tokens that are computed."""

    num_prompt_tokens = 0

    def start_prefill(self, chunks: Any, samplings: Any, logits_rows: Any) -> None:
        self.num_prompt_tokens += sum(len(chunk.ids) for chunk in chunks)
        super().start_prefill(chunks, samplings, logits_rows)


@pytest.mark.parametrize("budget", [6, 64])
def test_a_new_prefix_of_many_requests_is_computed_once(budget: int) -> None:
    engine = make(Counting, 8, 60, max_num_batched_tokens=budget, end_ids=())
    root = list(range(4, 20))
    sinks = [engine.submit([*root, n], max_tokens=6) for n in range(20, 28)]
    engine.run()
    assert isinstance(engine.runner, Counting) and engine.runner.num_prompt_tokens == len(root) + 8
    for n, sink in enumerate(sinks, 20):
        assert sink.ids == expected_tokens([*root, n], 6, VOCAB_SIZE)
    assert engine.loop.metrics.prefix_hits_total == 7 and engine.loop.metrics.prefix_hit_tokens_total == 7 * 16


def test_after_a_failed_step_nothing_is_found_that_it_should_have_computed() -> None:
    engine = make(max_num_seqs=3, num_blocks=40, max_num_batched_tokens=64, end_ids=())
    root = list(range(4, 20))
    failing = engine.submit([*root, 20], max_tokens=4)
    assert isinstance(engine.runner, PagedFakeRunner)

    class BrokenError(Exception):
        pass

    def broken(chunks: list[PromptChunk], samplings: list[DeviceSampling | None], logits_rows: list[int]) -> None:
        del engine.runner.start_prefill  # type: ignore[attr-defined]
        raise BrokenError

    engine.runner.start_prefill = broken  # type: ignore[method-assign, assignment]
    engine.step()
    assert failing.error is not None
    sink = engine.submit([*root, 21], max_tokens=4)
    engine.run()
    assert sink.ids == expected_tokens([*root, 21], 4, VOCAB_SIZE)
    assert engine.loop.metrics.prefix_hits_total == 0
    assert np.count_nonzero(engine.runner.cache.tables) > 0  # type: ignore[attr-defined]


class Rows(PagedFakeRunner):
    """Counts the rows of each decode step."""

    num_rows = 0

    def start_decode(
        self, ids: IdArray, positions: IdArray, samplings: Sequence[DeviceSampling | None], logits_rows: Sequence[int]
    ) -> None:
        self.num_rows = len(ids)
        super().start_decode(ids, positions, samplings, logits_rows)


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_the_last_of_many_move_to_the_first_rows(monkeypatch: pytest.MonkeyPatch, steps_in_flight: int) -> None:
    """A step computes every row up to the highest in use."""
    monkeypatch.setattr(Rows, "steps_in_flight", steps_in_flight)
    runner = Rows(12, MAX_SEQ_LEN, VOCAB_SIZE, 120)
    engine = Engine(runner, max_num_batched_tokens=100, end_ids=())
    lengths = {n: 40 if n % 6 == 4 else 2 + n for n in range(5, 17)}  # the two long ones have slots 5 and 11
    sinks = {n: engine.submit([n, n + 1, n + 2], max_tokens=length) for n, length in lengths.items()}
    seen: list[tuple[int, int]] = []
    while not all(sink.is_finished for sink in sinks.values()):
        engine.step()
        seen.append((sum(not sink.is_finished for sink in sinks.values()), runner.num_rows))
    assert max(rows for _, rows in seen) == 12 and seen[-3] == (2, 2)
    late = [rows for left, rows in seen if left == 2]
    assert late.count(2) > len(late) - 4, "within a few steps"
    for n, sink in sinks.items():
        assert sink.ids == expected_tokens([n, n + 1, n + 2], lengths[n], VOCAB_SIZE)
    assert engine.loop._scheduler.cache.num_free_blocks == 120


@pytest.mark.parametrize("steps_in_flight", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 4])
def test_nobody_waits_to_move_where_a_newcomer_takes_the_place(
    monkeypatch: pytest.MonkeyPatch, length: int, steps_in_flight: int
) -> None:
    monkeypatch.setattr(Rows, "steps_in_flight", steps_in_flight)
    engine = Engine(Rows(2, MAX_SEQ_LEN, VOCAB_SIZE, 60), max_num_batched_tokens=100, end_ids=())
    engine.submit([3, 4], max_tokens=length)
    long = engine.submit([5, 6, 7], max_tokens=40)
    for n in range(60):
        engine.submit([8, 9, n % 30], max_tokens=length)
    num_steps = 0
    while not long.is_finished:
        engine.step()
        num_steps += 1
    assert num_steps <= 40 + 2 * steps_in_flight
    assert long.ids == expected_tokens([5, 6, 7], 40, VOCAB_SIZE)


def test_a_prompt_stays_short_beside_a_text_that_waits_to_move() -> None:
    """The decoding text would wait for the whole prompt."""
    engine = make(max_num_seqs=4, num_blocks=60, max_num_batched_tokens=24, end_ids=(), max_prefill_stall=0.01)
    budget = engine.loop._scheduler._budget
    asked: list[bool] = []
    tokens = budget.tokens
    budget.tokens = lambda *, is_decoding: asked.append(is_decoding) or tokens(is_decoding=is_decoding)  # type: ignore
    for n in range(5, 8):
        engine.submit([n, n + 1], max_tokens=2)
    long = engine.submit([3, 4, 5], max_tokens=12)
    while not long.is_finished:
        engine.step()
    assert asked.count(False) == 1 and not asked[0], "before the first token"
