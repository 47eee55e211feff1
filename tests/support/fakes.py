"""Fakes of the expensive things: a runner whose next token is a function of everything in its slot's cache."""

from __future__ import annotations

import math
from collections.abc import Sequence as Ids
from zlib import crc32

import numpy as np

from deepseek_triton.ensemble.engine.runners.base import LAST_TOKEN, Decoded, DeviceSampling, Logits, PromptChunk
from deepseek_triton.ensemble.engine.runners.base import Ids as IdArray
from deepseek_triton.ensemble.engine.sequence import FailureKind, Request
from deepseek_triton.ensemble.protocol.progress import Update


class FakeRunner:
    """Deterministic: a wrong slot, position or cache content gives other tokens."""

    def __init__(self, max_num_seqs: int = 4, max_seq_len: int = 64, vocab_size: int = 100) -> None:
        self.max_num_seqs, self.max_seq_len, self.vocab_size = max_num_seqs, max_seq_len, vocab_size
        self.cache = np.full((max_num_seqs, max_seq_len), -1, np.int64)
        self.calls: list[tuple[str, int]] = []
        self.fail_next: Exception | None = None
        self.is_closed = False

    def prefill(self, slot: int, ids: IdArray, start: int) -> Logits:
        self._maybe_fail()
        self.calls.append(("prefill", len(ids)))
        self.cache[slot, start : start + len(ids)] = ids
        return self._logits(slot, start + len(ids))

    def decode(self, ids: IdArray, positions: IdArray) -> Logits:
        self._maybe_fail()
        self.calls.append(("decode", len(ids)))
        rows = []
        for slot, (token, position) in enumerate(zip(ids, positions, strict=True)):
            self.cache[slot, position] = token
            rows.append(self._logits(slot, int(position) + 1))
        return np.stack(rows)

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        self.calls.append(("copy_prefix", num_tokens))
        self.cache[target, :num_tokens] = self.cache[source, :num_tokens]

    def close(self) -> None:
        self.is_closed = True

    def _logits(self, slot: int, length: int) -> Logits:
        logits = np.zeros(self.vocab_size, np.float32)
        logits[next_token(self.cache[slot, :length].tolist(), self.vocab_size)] = 1.0
        return logits

    def _maybe_fail(self) -> None:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error


class SamplingFakeRunner(FakeRunner):
    """A FakeRunner that chooses greedy tokens itself, and computes only when the step is finished."""

    def __init__(self, max_num_seqs: int = 4, max_seq_len: int = 64, vocab_size: int = 100) -> None:
        super().__init__(max_num_seqs, max_seq_len, vocab_size)
        self.num_sampled = self.num_logits_rows = 0
        self._started: tuple[IdArray, IdArray, list[DeviceSampling | None], list[int]] | None = None

    def can_sample(self, sampling: DeviceSampling) -> bool:
        return sampling.temperature == 0

    def start_decode(
        self, ids: IdArray, positions: IdArray, samplings: Ids[DeviceSampling | None], logits_rows: Ids[int]
    ) -> None:
        assert self._started is None, "one step at a time"
        self._started = ids.copy(), positions.copy(), list(samplings), list(logits_rows)

    def finish_decode(self) -> Decoded:
        assert self._started is not None
        (ids, positions, samplings, logits_rows), self._started = self._started, None
        logits = self.decode(ids, positions)
        self.num_sampled += sum(sampling is not None for sampling in samplings)
        self.num_logits_rows += len(logits_rows)
        log_probs = logits.max(axis=1) - np.log(np.exp(logits).sum(axis=1))
        return Decoded(logits.argmax(axis=1), log_probs, logits[logits_rows])


class PipelinedFakeRunner(FakeRunner):
    """Computes what is begun at once, as a stream of kernels would in the end, and tells of it when it is finished.

    Strict about what a runner may rely on: how many calls are in flight, in order, contiguous positions, and that
    LAST_TOKEN stands for a token that was sampled for the slot since the decode before. Every row of a decode loses the
    token that it sampled before, sampling or not. A call that fails has written whatever it would have.
    """

    steps_in_flight = 2
    packs_prompts = True

    def __init__(self, max_num_seqs: int = 4, max_seq_len: int = 64, vocab_size: int = 100) -> None:
        super().__init__(max_num_seqs, max_seq_len, vocab_size)
        self.num_ahead = self.num_sampled = self.num_logits_rows = 0
        self.fail_finish: dict[str, Exception] = {}  # by kind of call
        self._last_tokens: list[int | None] = [None] * max_num_seqs
        self._ends: list[int | None] = [None] * max_num_seqs  # where a slot's next position is; None: unknown
        self._in_flight: dict[str, list[Decoded]] = {"decode": [], "prefill": []}

    def can_sample(self, sampling: DeviceSampling) -> bool:
        return sampling.top_k == 0

    def start_prefill(
        self, chunks: Ids[PromptChunk], samplings: Ids[DeviceSampling | None], logits_rows: Ids[int]
    ) -> None:
        slots = [chunk.slot for chunk in chunks]
        assert len(set(slots)) == len(chunks) == len(samplings)
        logits = []
        for chunk in chunks:
            self.calls.append(("prefill", len(chunk.ids)))
            self.cache[chunk.slot, chunk.start : chunk.start + len(chunk.ids)] = chunk.ids
            logits.append(self._logits(chunk.slot, chunk.start + len(chunk.ids)))
        self._begin("prefill", np.stack(logits), slots, samplings, logits_rows)
        for chunk in chunks:
            self._ends[chunk.slot] = chunk.start + len(chunk.ids)

    def start_decode(
        self, ids: IdArray, positions: IdArray, samplings: Ids[DeviceSampling | None], logits_rows: Ids[int]
    ) -> None:
        self.calls.append(("decode", len(ids)))
        logits = []
        for slot, (token, position) in enumerate(zip(ids.tolist(), positions.tolist(), strict=True)):
            if token == LAST_TOKEN:
                token = self._last_tokens[slot]
                assert token is not None, "LAST_TOKEN stands for nothing"
                assert self._in_flight["decode"] or self._in_flight["prefill"], "the token is known"
                self.num_ahead += 1
            if samplings[slot] is not None or slot in logits_rows:
                assert self._ends[slot] in (None, position), "a slot's positions are contiguous"
            self.cache[slot, position] = token
            logits.append(self._logits(slot, position + 1))
        self._begin("decode", np.stack(logits), range(len(ids)), samplings, logits_rows)
        for slot, position in enumerate(positions.tolist()):
            if samplings[slot] is not None or slot in logits_rows:
                self._ends[slot] = position + 1

    def finish_decode(self) -> Decoded:
        return self._finish("decode")

    def finish_prefill(self) -> Decoded:
        return self._finish("prefill")

    def abandon(self) -> None:
        for calls in self._in_flight.values():
            calls.clear()
        self._ends = [None] * self.max_num_seqs
        self._last_tokens = [None] * self.max_num_seqs

    def _begin(
        self, kind: str, logits: Logits, slots: Ids[int], samplings: Ids[DeviceSampling | None], logits_rows: Ids[int]
    ) -> None:
        assert len(self._in_flight[kind]) < self.steps_in_flight
        assert all(samplings[row] is None for row in logits_rows)
        tokens = [sampled_token(row, sampling) for row, sampling in zip(logits, samplings, strict=True)]
        for slot, token, sampling in zip(slots, tokens, samplings, strict=True):
            self._last_tokens[slot] = None if sampling is None else token
        if self.fail_next is not None:
            self._last_tokens = [None] * self.max_num_seqs
        self._maybe_fail()
        self.num_sampled += sum(sampling is not None for sampling in samplings)
        self.num_logits_rows += len(logits_rows)
        log_probs = logits.max(axis=1) - np.log(np.exp(logits).sum(axis=1))
        self._in_flight[kind].append(Decoded(np.array(tokens), log_probs, logits[list(logits_rows)]))

    def _finish(self, kind: str) -> Decoded:
        decoded = self._in_flight[kind].pop(0)
        if (error := self.fail_finish.pop(kind, None)) is not None:
            raise error
        return decoded


class PagedCache:
    """Cells [slot, position] in blocks that tables name; a negative position isn't written."""

    def __init__(self, max_num_seqs: int, max_seq_len: int, num_blocks: int, block_size: int) -> None:
        self.blocks = np.full((num_blocks + 1, block_size), -1, np.int64)
        self.tables = np.zeros((max_num_seqs, -(-max_seq_len // block_size)), np.int64)

    def __setitem__(self, where: tuple[int, int | slice], ids: IdArray | int) -> None:
        slot, positions = where
        if isinstance(positions, slice):
            assert not isinstance(ids, int)
            for position, token in enumerate(ids.tolist(), positions.start):
                self[slot, position] = token
        elif positions >= 0:
            size = self.blocks.shape[1]
            self.blocks[self.tables[slot, positions // size], positions % size] = ids

    def __getitem__(self, where: tuple[int, slice]) -> IdArray:
        slot, positions = where
        tokens: IdArray = self.blocks[self.tables[slot]].reshape(-1)[positions]
        return tokens


class PagedFakeRunner(PipelinedFakeRunner):
    """A PipelinedFakeRunner whose cells are in blocks."""

    def __init__(
        self, max_num_seqs: int = 4, max_seq_len: int = 64, vocab_size: int = 100, num_blocks: int = 20,
        block_size: int = 4,
    ) -> None:  # fmt: skip
        super().__init__(max_num_seqs, max_seq_len, vocab_size)
        self.num_blocks, self.block_size = num_blocks, block_size
        self.cache = PagedCache(max_num_seqs, max_seq_len, num_blocks, block_size)  # type: ignore[assignment]

    def set_blocks(self, slot: int, first: int, blocks: Ids[int]) -> None:
        assert all(0 < block <= self.num_blocks for block in blocks)
        if first == 0:
            self._ends[slot] = None  # another sequence's
        self.cache.tables[slot, first : first + len(blocks)] = blocks  # type: ignore[attr-defined]

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        raise AssertionError("blocks are shared, not copied")


def sampled_token(logits: Logits, sampling: DeviceSampling | None) -> int:
    """What PipelinedFakeRunner samples: the likeliest, or a function of it, seed and step.

    Nonsense without a DeviceSampling.
    """
    if sampling is None:
        return -7
    best = int(logits.argmax())
    if sampling.temperature == 0:
        return best
    return 1 + crc32(repr((best, sampling.seed, sampling.step)).encode()) % (len(logits) - 1)


def next_token(history: Ids[int], vocab_size: int = 100) -> int:
    """What FakeRunner makes of a history; 0 never comes, so that it can serve as the end token."""
    return 1 + crc32(repr(list(history)).encode()) % (vocab_size - 1)


def expected_tokens(prompt: Ids[int], count: int, vocab_size: int = 100) -> list[int]:
    """The `count` tokens FakeRunner generates after `prompt`."""
    history = list(prompt)
    for _ in range(count):
        history.append(next_token(history, vocab_size))
    return history[len(prompt) :]


class FakeSink:
    """Stores what was sent."""

    def __init__(self) -> None:
        self.responses: list[list[Update]] = []
        self.num_heartbeats = 0
        self.is_finished = False
        self.error: str | None = None
        self.error_kind: FailureKind | None = None
        self.has_gone = False

    def send(self, request: Request, updates: Ids[Update]) -> None:
        assert not self.is_finished and self.error is None, "sent after the end"
        if not updates:
            self.num_heartbeats += 1
            return
        self.responses.append(list(updates))
        self.is_finished = request.is_finished

    def fail(self, message: str, kind: FailureKind) -> None:
        assert not self.is_finished and self.error is None, "failed after the end"
        self.error, self.error_kind = message, kind

    def is_cancelled(self) -> bool:
        return self.has_gone

    def updates(self, index: int = 0) -> list[Update]:
        """What was sent of one sequence."""
        return [update for response in self.responses for update in response if update.index == index]

    def ids_of(self, index: int) -> list[int]:
        return [token for update in self.updates(index) for token in update.ids]

    @property
    def ids(self) -> list[int]:
        return self.ids_of(0)

    @property
    def finish_reason(self) -> str | None:
        updates = self.updates()
        return updates[-1].finish_reason if updates else None


class FakeAcknowledgements:
    """Acknowledges what the test puts into it."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def drain(self) -> list[int]:
        received, self.received = self.received, []
        return received

    def life_since(self, began: float) -> float:
        return math.inf


class FakeMetricFamilies:
    """Stands where pb_utils.MetricFamily does: a family is made once, and a counter never falls."""

    COUNTER, GAUGE = "counter", "gauge"

    def __init__(self) -> None:
        self.kinds: dict[str, str] = {}
        self.values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def __call__(self, name: str, description: str, kind: str) -> FakeMetricFamily:
        assert name not in self.kinds and description and kind in ("counter", "gauge")
        self.kinds[name] = kind
        return FakeMetricFamily(self, name)

    def value(self, name: str, **labels: str) -> float:
        """The value of one series."""
        return self.values[name, tuple(sorted(labels.items()))]

    def series(self, name: str) -> dict[str, float]:
        """The values of a family, by their label `le`, in order of their making."""
        return {dict(labels).get("le", ""): value for (own, labels), value in self.values.items() if own == name}


class FakeMetricFamily:
    def __init__(self, families: FakeMetricFamilies, name: str) -> None:
        self._families, self._name = families, name

    def Metric(self, labels: dict[str, str]) -> FakeMetric:  # noqa: N802 - Triton's name
        return FakeMetric(self._families, self._name, labels)


class FakeMetric:
    def __init__(self, families: FakeMetricFamilies, name: str, labels: dict[str, str]) -> None:
        self._values, self._kind = families.values, families.kinds[name]
        self._key = (name, tuple(sorted(labels.items())))
        assert self._key not in self._values
        self._values[self._key] = 0.0

    def increment(self, value: float) -> None:
        assert self._kind == "gauge" or value >= 0
        self._values[self._key] += value

    def set(self, value: float) -> None:
        assert self._kind == "gauge"
        self._values[self._key] = value
