"""A guide whose masks come as late as a test says: each is asked for in vain so many times."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any
from zlib import crc32

import numpy as np

from deepseek_triton.ensemble.guided import BackgroundGuide, GuideError
from deepseek_triton.ensemble.guided.budget import GuideBudget, GuideLimits
from deepseek_triton.ensemble.guided.vocabulary import Mask


class LateMask(Future[Mask]):
    """A mask, or an error, that comes after `delay` questions."""

    def __init__(self, delay: int, outcome: Mask | Exception) -> None:
        super().__init__()
        self.delay = delay
        if isinstance(outcome, Exception):
            self.set_exception(outcome)
        else:
            self.set_result(outcome)

    def result(self, timeout: float | None = None) -> Mask:
        if self.delay:
            assert timeout is not None, "the loop waits for a mask without an end"
            self.delay -= 1
            raise FutureTimeoutError
        return super().result(timeout)


class FakeGuide:
    """Allows two of three tokens, which depend on those that it has taken; fails after `fails_after` of them."""

    def __init__(self, vocab_size: int, fails_after: int | None = None) -> None:
        self._vocab_size, self._fails_after = vocab_size, fails_after
        self.taken: list[int] = []

    def check(self, token: int) -> None:
        assert self._allows(token)

    def accept(self, token: int) -> None:
        self.check(token)
        self.taken.append(token)

    def mask(self) -> Mask:
        if len(self.taken) == self._fails_after:
            raise GuideError("it is too dear")
        bits = np.zeros(-(-self._vocab_size // 32) * 32, np.uint8)
        bits[: self._vocab_size] = [self._allows(token) for token in range(self._vocab_size)]
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def _allows(self, token: int) -> bool:
        return crc32(repr((self.taken, token)).encode()) % 3 > 0 or token == 1


class LateThreads:
    """Stands where MaskThreads does: masks are there at once, and are told late."""

    def __init__(self, delays: Iterable[int]) -> None:
        self._delays = itertools.cycle(delays)

    def start(self, guide: Any, token: int | None, budget: GuideBudget) -> LateMask:
        if token is not None:
            guide.accept(token)
        try:
            return LateMask(next(self._delays), guide.mask())
        except GuideError as error:
            return LateMask(next(self._delays), error)


def late_guide(vocab_size: int, delays: Iterable[int], fails_after: int | None = None) -> BackgroundGuide:
    """A guide whose masks come so late, over and over."""
    guide: Any = FakeGuide(vocab_size, fails_after)
    threads: Any = LateThreads(delays)
    return BackgroundGuide(threads, guide, GuideBudget(GuideLimits()))
