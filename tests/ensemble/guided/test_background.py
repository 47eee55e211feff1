"""Masks on other threads: nobody waits for another's, slow ones yield the CPU, and CPU time has limits."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from deepseek_triton.ensemble.guided import Guide, GuideError, MaskThreads, wait_for_any
from deepseek_triton.ensemble.guided.background import MAX_SLOW_THREADS
from deepseek_triton.ensemble.guided.budget import GuideBudget, GuideLimits
from deepseek_triton.ensemble.guided.vocabulary import Mask
from deepseek_triton.ensemble.processes.low_priority import MAX_NICENESS, NICENESS
from tests.ensemble.guided.test_guided import model

WAIT_S = 30.0
SLOW_S = 0.05  # of CPU time; on a busy machine a quick mask takes more than the 5 ms that are slow by default
OWN_NICENESS = os.getpriority(os.PRIO_PROCESS, 0)
AMBIGUOUS = 'start: a\na: a a a a | "x" |'


@pytest.fixture
def threads() -> Iterator[MaskThreads]:
    made = MaskThreads(GuideLimits(slow=SLOW_S))
    yield made
    made.close()


def niceness() -> int:
    """This thread's."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def choice(text: str) -> Guide:
    return model("smollm2").compiler.compile("choice", f'["{text}"]')


class Held:
    """A guide whose masks, from the second on, are computed when `release` is set; notes the threads' niceness."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.release, self.began = threading.Event(), threading.Semaphore(0)
        self.is_held = False
        self.niceness: list[int] = []
        self.taken: list[int] = []
        self._seconds, self._inner = seconds, choice("yes")
        self._inner_is_free = threading.Lock()  # the copies have one

    def copy(self) -> Held:
        return self

    def check(self, token: int) -> None:
        pass

    def accept(self, token: int) -> None:
        self.taken.append(token)
        assert niceness() == OWN_NICENESS, "it holds Python's lock"

    def mask(self) -> Mask:
        self.niceness.append(niceness())
        end = time.thread_time() + self._seconds
        while time.thread_time() < end:
            pass
        if self.taken:
            self.is_held = True
            self.began.release()
            assert self.release.wait(WAIT_S)
        with self._inner_is_free:
            return self._inner.mask()


def held(threads: MaskThreads, guide: Held) -> Any:
    one: Any = guide
    (made,) = threads.guides(one, 1)
    assert made.mask(WAIT_S) is not None or guide._seconds
    wait_for_any([made], WAIT_S)
    return made


@pytest.mark.slow
def test_a_mask_that_takes_long_holds_up_no_other(threads: MaskThreads) -> None:
    guides = [Held() for _ in range(20)]
    slow = [held(threads, guide) for guide in guides]
    for guide, background in zip(guides, slow, strict=True):
        background.accept(1)
        assert guide.began.acquire(timeout=WAIT_S), "all are computed at once"
        assert background.mask() is None and background.mask(0.001) is None
    (quick,) = threads.guides(choice("no"), 1)
    mask = quick.mask(WAIT_S)
    assert mask is not None and (mask == choice("no").mask()).all()
    for guide, background in zip(guides, slow, strict=True):
        guide.release.set()
        assert background.mask(WAIT_S) is not None


@pytest.mark.slow
def test_slow_guides_yield_the_cpu_and_wait_for_each_other_alone(threads: MaskThreads) -> None:
    guides = [Held(seconds=2 * SLOW_S) for _ in range(MAX_SLOW_THREADS + 2)]
    slow = [held(threads, guide) for guide in guides]
    for background in slow:
        background.accept(1)
        assert background.mask(WAIT_S) is None, "a slow guide isn't waited for"
    until = time.monotonic() + WAIT_S
    while sum(guide.is_held for guide in guides) < MAX_SLOW_THREADS and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.05)
    waiting = [number for number, guide in enumerate(guides) if not guide.is_held]
    assert len(waiting) == 2
    (quick,) = threads.guides(choice("no"), 1)
    assert quick.mask(WAIT_S) is not None
    slow[waiting[0]].close()  # its client has gone: what waits isn't computed
    for guide in guides:
        guide.release.set()
    for number in set(range(len(guides))) - {waiting[0]}:
        wait_for_any([slow[number]], WAIT_S)
        assert guides[number].niceness == [OWN_NICENESS, min(OWN_NICENESS + NICENESS, MAX_NICENESS)]
    assert guides[waiting[0]].niceness == [OWN_NICENESS]


@pytest.mark.slow
def test_copies_share_what_they_may_take() -> None:
    threads = MaskThreads(GuideLimits(total=0.05, more_per_token=0.0))
    two: Any = Held(seconds=0.03)
    first, second = threads.guides(two, 2)
    wait_for_any([first], WAIT_S)
    wait_for_any([second], WAIT_S)
    errors = []
    for guide in (first, second):
        try:
            guide.mask()
        except GuideError as error:
            errors.append(str(error))
    assert len(errors) == 1 and "CPU time for 2 tokens, more than 0.05 s and 0 ms a token: simplify it" in errors[0]
    threads.close()


def test_an_ambiguous_grammar_ends_with_an_error_that_says_why() -> None:
    the, limits = model("smollm2"), GuideLimits(total=0.05, more_per_token=0.0001)
    threads = MaskThreads(limits)
    (guide,) = threads.guides(the.compiler.compile("grammar", AMBIGUOUS), 1)
    began, num_tokens = time.process_time(), 0
    with pytest.raises(GuideError, match=r"the guide has taken 0\.\d s of CPU time for \d+ tokens, more than 0\.05 s"):
        while num_tokens < 2000:
            wait_for_any([guide], WAIT_S)
            assert guide.mask() is not None
            guide.accept(the.token("x"))
            num_tokens += 1
    assert 20 < num_tokens < 400 and time.process_time() - began < 5
    threads.close()


def test_one_token_has_a_limit_of_its_own() -> None:
    budget = GuideBudget(GuideLimits(per_token=0.5, total=100.0))
    budget.charge(0.4)
    assert budget.is_slow
    with pytest.raises(GuideError, match=r"the guide has taken 0\.6 s of CPU time for one token, more than 0\.5 s"):
        budget.charge(0.6)


def test_what_a_good_guide_takes_is_far_from_the_limits(threads: MaskThreads) -> None:
    budget = GuideBudget(GuideLimits())
    for _ in range(100_000):
        budget.charge(0.0015)
    assert not budget.is_slow


def test_errors_of_a_guide_come_where_the_mask_is_asked_for(threads: MaskThreads) -> None:
    the = model("smollm2")
    (guide,) = threads.guides(the.compiler.compile("choice", '["yes"]'), 1)
    assert guide.mask(WAIT_S) is not None
    with pytest.raises(GuideError, match="neither text nor an end"):
        guide.accept(the.vocab_size - 1)
    with pytest.raises(GuideError, match="before the guide was satisfied"):
        guide.accept(the.end_ids[0])
    guide.accept(the.token("n"))
    with pytest.raises(GuideError, match="is not allowed by the guide"):
        guide.mask(WAIT_S)


def test_a_model_s_masks_end_with_its_threads(threads: MaskThreads) -> None:
    guide = Held()
    background = held(threads, guide)
    background.accept(1)
    assert guide.began.acquire(timeout=WAIT_S)
    threads.close()
    guide.release.set()
    mask = background.mask(WAIT_S)
    assert isinstance(mask, np.ndarray)
    with pytest.raises(RuntimeError):
        background.accept(1)
