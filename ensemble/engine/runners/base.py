"""What a runner is: the only thing the scheduler, the loop and their tests know of a model.

A runner owns `max_num_seqs` caches of `max_seq_len` positions. It knows nothing of requests, sampling or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
LAST_TOKEN = -1  # as an id: the token that the slot sampled last, which need not be known yet


class RunnerError(Exception):
    """The runner can't be loaded, or a step failed; the message is one line."""


class OutOfMemoryError(RunnerError):
    """A step doesn't fit into memory; the runner can go on with smaller ones."""


class Runner(Protocol):
    """A model with `max_num_seqs` KV caches."""

    max_num_seqs: int
    max_seq_len: int
    vocab_size: int

    def prefill(self, slot: int, ids: Ids, start: int) -> Logits:
        """Put `ids` [n] into `slot` at positions start, start + 1, … and return the last one's logits [vocab_size].

        The result is valid until the next call.
        """

    def decode(self, ids: Ids, positions: Ids) -> Logits:
        """Put ids[i] into slot i at positions[i], for slots 0 … n - 1, and return their logits [n, vocab_size].

        An idle slot within the range is written too: give it a position past what it must keep. The result is valid
        until the next call.
        """

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` positions of slot `source`'s cache into slot `target`'s."""

    def close(self) -> None:
        """Free the weights and the caches."""


@dataclass(frozen=True)
class PromptChunk:
    """Part of a prompt: `ids` [n] for `slot`, at positions start, start + 1, …."""

    slot: int
    ids: Ids
    start: int


@dataclass(frozen=True)
class DeviceSampling:
    """How a runner chooses one row's token where its logits are; fields as in SamplingParams, temperature 0 is greedy.

    The random number is a function of `seed` and `step`, the count of tokens that the sequence has generated, and of
    nothing else: a sequence gets the same tokens alone and in a full batch.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    step: int


@dataclass(frozen=True)
class Decoded:
    """What a step gave. Valid until the next call.

    tokens [n] and their log probabilities [n]: meaningful where a DeviceSampling was given. logits [k, vocab_size]: of
    the k rows that were asked for.
    """

    tokens: Ids
    log_probs: Logits
    logits: Logits


@runtime_checkable
class SamplingRunner(Runner, Protocol):
    """A runner that chooses tokens itself and computes while the caller does something else."""

    def can_sample(self, sampling: DeviceSampling) -> bool:
        """Whether this runner can choose a token that way; where it can't, ask for the row's logits."""

    def start_decode(
        self, ids: Ids, positions: Ids, samplings: Sequence[DeviceSampling | None], logits_rows: Sequence[int]
    ) -> None:
        """Begin a `decode` and return without waiting; samplings[i] is row i's, None for a row that samples nothing."""

    def finish_decode(self) -> Decoded:
        """Wait for the step that `start_decode` began; its `logits_rows`' logits are those of `Decoded`."""


@runtime_checkable
class PipelinedRunner(Protocol):
    """What `Pipeline` drives: calls that are begun now and finished later, each kind in the order of its beginning.

    Whatever is begun, and `copy_prefix` too, reads and writes the caches as if it had run when it was called: what a
    slot's last owner still writes lies before what its next owner writes.

    steps_in_flight: how many decodes, and how many prefills, may be begun before the first of them is finished.
    packs_prompts: whether `start_prefill` takes more than one chunk, and samples; else one chunk, for its logits.
    """

    steps_in_flight: int
    packs_prompts: bool

    def can_sample(self, sampling: DeviceSampling) -> bool:
        """See SamplingRunner."""

    def start_decode(
        self, ids: Ids, positions: Ids, samplings: Sequence[DeviceSampling | None], logits_rows: Sequence[int]
    ) -> None:
        """See SamplingRunner.

        An id may be LAST_TOKEN where the decode begun before this one samples a token for the slot, or a prefill begun
        since.
        """

    def finish_decode(self) -> Decoded:
        """See SamplingRunner: the decode that was begun first."""

    def start_prefill(
        self, chunks: Sequence[PromptChunk], samplings: Sequence[DeviceSampling | None], logits_rows: Sequence[int]
    ) -> None:
        """Begin a `prefill` of different slots' chunks; samplings[i] and the rows are those of the chunks' last tokens.

        The chunks together hold at most the `max_num_batched_tokens` tokens that the runner was made for.
        """

    def finish_prefill(self) -> Decoded:
        """Wait for the prefill that was begun first."""

    def abandon(self) -> None:
        """Forget every call that was begun and not finished; what these write is written when this returns."""
