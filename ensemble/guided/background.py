"""Guides whose masks are computed on other threads, so that a slow one delays its own sequence only.

A mask takes 0.02 ms as a rule, and an ambiguous grammar's takes a second. It depends on the tokens so far and not on
logits: it is computed while the runner computes the next step. What knows logits and sequences is the engine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeoutError

from deepseek_triton.ensemble.guided.budget import GuideBudget, GuideLimits
from deepseek_triton.ensemble.guided.guide import Guide
from deepseek_triton.ensemble.guided.vocabulary import Mask
from deepseek_triton.ensemble.processes.low_priority import lower_priority

MAX_THREADS = 512  # one for each sequence: threads are started as they are needed, and nobody waits for another's mask
MAX_SLOW_THREADS = 2  # slow guides wait for each other, so that they take no more than this of the CPU


class MaskThreads:
    """The threads of one engine that compute masks.

    llguidance holds Python's lock while a guide takes a token, for up to a quarter of the time of its mask, which it
    computes without the lock. So tokens are taken at normal priority, and slow masks alone are computed at a low one: a
    thread of low priority that held the lock would hold up the engine.
    """

    def __init__(self, limits: GuideLimits | None = None) -> None:
        self._limits = limits or GuideLimits()
        self._quick = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="masks")
        self._slow = ThreadPoolExecutor(MAX_SLOW_THREADS, thread_name_prefix="slow masks", initializer=lower_priority)

    def guides(self, guide: Guide, count: int) -> list[BackgroundGuide]:
        """Return one request's guides, for `count` sequences that begin as `guide`; computes their first masks."""
        budget = GuideBudget(self._limits)
        return [BackgroundGuide(self, guide.copy(), budget) for _ in range(count)]

    def start(self, guide: Guide, token: int | None, budget: GuideBudget) -> Future[Mask]:
        """Let `guide` take `token`, if there is one, and compute its mask."""
        mask: Future[Mask] = Future()
        self._quick.submit(self._take, guide, token, budget, mask)
        return mask

    def close(self) -> None:
        """Drop what waits; masks that are being computed are computed to their end."""
        for pool in (self._quick, self._slow):
            pool.shutdown(wait=False, cancel_futures=True)

    def _take(self, guide: Guide, token: int | None, budget: GuideBudget, mask: Future[Mask]) -> None:
        if mask.cancelled():
            return
        began = time.thread_time()
        try:
            if token is not None:
                guide.accept(token)
            taken_s = time.thread_time() - began
            if budget.is_slow:
                self._slow.submit(self._compute, guide, budget, mask, taken_s)
                return
        except Exception as error:  # raised where the mask is asked for
            if mask.set_running_or_notify_cancel():
                mask.set_exception(error)
            return
        self._compute(guide, budget, mask, taken_s)

    def _compute(self, guide: Guide, budget: GuideBudget, mask: Future[Mask], taken_s: float) -> None:
        if not mask.set_running_or_notify_cancel():
            return
        began = time.thread_time()
        try:
            found = guide.mask()
            budget.charge(taken_s + time.thread_time() - began)
        except Exception as error:
            mask.set_exception(error)
        else:
            mask.set_result(found)


class BackgroundGuide:
    """One sequence's guide, used by one thread; `threads` advance it. See MaskThreads.guides."""

    def __init__(self, threads: MaskThreads, guide: Guide, budget: GuideBudget) -> None:
        self._threads = threads
        self._guide = guide
        self._budget = budget
        self._mask = threads.start(guide, None, budget)

    def accept(self, token: int) -> None:
        """Advance by `token`, which was chosen by the last mask; the next mask is computed from now on.

        Raises:
            GuideError: the guide allows no such token, or there was no mask. What llguidance finds wrong with it is
                told by `mask`.
        """
        self._mask.result()
        self._guide.check(token)
        self._mask = self._threads.start(self._guide, token, self._budget)

    def mask(self, timeout_s: float = 0.0) -> Mask | None:
        """Return which tokens may come next, uint32 [ceil(vocab_size / 32)]; None: it isn't computed yet.

        timeout_s: for how long to wait; a slow guide isn't waited for.

        Raises:
            GuideError: the guide can't go on, or has taken too much CPU time.
        """
        try:
            return self._mask.result(0.0 if self._budget.is_slow else timeout_s)
        except FutureTimeoutError:
            return None

    def close(self) -> None:
        """Give up the mask that may still wait for a thread: nobody asks for it."""
        self._mask.cancel()


def wait_for_any(guides: Sequence[BackgroundGuide], timeout_s: float) -> None:
    """Wait until one of `guides` has its mask; returns at once if there are none."""
    if guides:
        wait([guide._mask for guide in guides], timeout_s, FIRST_COMPLETED)
