"""The interface of a runner, which is all that the scheduler, the loop and their tests know about a model.

A runner owns `max_num_seqs` caches of `max_seq_len` positions. It knows nothing about requests or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
LAST_TOKEN = -1  # in place of a token id: the token that the slot sampled last, which the host may not know yet


class RunnerError(Exception):
    """The runner can't be loaded, or a step failed; one line."""


class OutOfMemoryError(RunnerError):
    """A step doesn't fit into memory; smaller steps still run."""


class Runner(Protocol):
    """A model with `max_num_seqs` KV caches."""

    max_num_seqs: int
    max_seq_len: int
    vocab_size: int

    def prefill(self, slot: int, ids: Ids, start: int) -> Logits:
        """Compute `ids` [n] in `slot` at positions start, start + 1, … and return the last one's logits [vocab_size].

        The result is valid until the next call.
        """

    def decode(self, ids: Ids, positions: Ids) -> Logits:
        """Compute ids[i] in slot i at positions[i], for slots 0 … n - 1, and return their logits [n, vocab_size].

        An idle slot within the range is written too: give it a position after the ones that it must keep. The result is
        valid until the next call.
        """

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` positions of slot `source`'s cache into slot `target`'s."""

    def close(self) -> None:
        """Free the weights and the caches."""


@runtime_checkable
class PagedRunner(Protocol):
    """A runner whose caches are blocks, which a table for each slot names; `Runner.copy_prefix` isn't called.

    num_blocks: blocks 1 … num_blocks can be in tables; 0: this runner has whole slots. block_size: in positions.
    A decode writes nothing for a row whose position is negative. A table begins with zeros, for block 0, which may be
    written and isn't read.
    """

    num_blocks: int
    block_size: int

    def set_blocks(self, slot: int, first: int, blocks: Sequence[int]) -> None:
        """Set entries first, first + 1, … of the table of `slot`, for the calls that begin later."""


@dataclass(frozen=True)
class PromptChunk:
    """Part of a prompt: `ids` [n] for `slot`, at positions start, start + 1, …."""

    slot: int
    ids: Ids
    start: int


@dataclass(frozen=True)
class DeviceSampling:
    """How a runner samples one row's token on the device; the fields are SamplingParams', temperature 0 is greedy.

    The random number is a function of `seed` and `step`, the number of tokens that the sequence has generated. So a
    sequence has the same tokens alone and in a full batch.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    step: int


@dataclass(frozen=True)
class Decoded:
    """The result of a step, valid until the next call.

    tokens [n] and log_probs [n]: meaningful for rows that had a DeviceSampling. logits [k, vocab_size]: of the k rows
    whose logits were asked for.
    """

    tokens: Ids
    log_probs: Logits
    logits: Logits


@runtime_checkable
class SamplingRunner(Runner, Protocol):
    """A runner that samples on the device, and computes while the caller does something else."""

    def can_sample(self, sampling: DeviceSampling) -> bool:
        """Whether this runner can sample that way; if it can't, ask for the row's logits."""

    def start_decode(
        self, ids: Ids, positions: Ids, samplings: Sequence[DeviceSampling | None], logits_rows: Sequence[int]
    ) -> None:
        """Begin a `decode` and return without waiting; samplings[i] is row i's sampling, None for a row without."""

    def finish_decode(self) -> Decoded:
        """Wait for the step that `start_decode` began; `Decoded` has the logits of its `logits_rows`."""


@runtime_checkable
class PipelinedRunner(Protocol):
    """A runner for `Pipeline`: calls are begun now and finished later, decodes in order and prefills in order.

    Every call, `copy_prefix` included, reads and writes the caches as if it had run when it was made. So the last
    writes of a slot's old owner come before the writes of its new owner.

    steps_in_flight: how many decodes, and how many prefills, may be begun before the first of them is finished.
    packs_prompts: whether `start_prefill` takes several chunks and samples; otherwise it takes one, for its logits.
    """

    steps_in_flight: int
    packs_prompts: bool

    def can_sample(self, sampling: DeviceSampling) -> bool:
        """See SamplingRunner."""

    def start_decode(
        self, ids: Ids, positions: Ids, samplings: Sequence[DeviceSampling | None], logits_rows: Sequence[int]
    ) -> None:
        """See SamplingRunner.

        An id may be LAST_TOKEN if the decode begun before this one, or a prefill begun since, samples a token for the
        slot.
        """

    def finish_decode(self) -> Decoded:
        """Wait for the decode that was begun first; see SamplingRunner."""

    def start_prefill(
        self, chunks: Sequence[PromptChunk], samplings: Sequence[DeviceSampling | None], logits_rows: Sequence[int]
    ) -> None:
        """Begin a `prefill` of chunks of different slots; samplings[i] and the rows belong to the chunks' last tokens.

        All chunks together hold at most the `max_num_batched_tokens` tokens that the runner was made for.
        """

    def finish_prefill(self) -> Decoded:
        """Wait for the prefill that was begun first."""

    def abandon(self) -> None:
        """Drop every call that was begun and not finished; their writes are complete when this returns."""
