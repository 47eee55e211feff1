"""Sequence: one request on its way through the engine.

Holds what was asked, how far its prompt is in the cache and what was generated. It knows nothing of Triton; what goes
back to the client goes through its `Sink`.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ensemble.contract import FinishReason
from ensemble.sampling import Sampler, SamplingParams


class Sink(Protocol):
    """Where a sequence's output goes. Called from the engine's thread only."""

    def send(self, sequence: Sequence, ids: Ids[int]) -> None:
        """Deliver `ids`; final if `sequence.finish_reason` is set."""

    def fail(self, message: str) -> None:
        """End the request with an error."""

    def is_cancelled(self) -> bool:
        """Whether the client is known to have gone."""


@dataclass(eq=False)
class Sequence:
    """One request: `prompt_ids` [n] int64, and its state.

    num_computed counts the tokens in the cache; pending holds generated tokens that were not sent yet.
    """

    sequence_id: int
    request_id: str
    prompt_ids: NDArray[np.int64]
    params: SamplingParams
    sink: Sink
    stream: bool = False
    expects_acknowledgement: bool = False
    slot: int | None = None
    num_computed: int = 0
    max_new_tokens: int = 0
    output_ids: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    unacknowledged: list[float] = field(default_factory=list)  # when each was sent, oldest first, in seconds
    finish_reason: FinishReason | None = None
    sampler: Sampler = field(init=False)

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.params)

    @property
    def is_prefilled(self) -> bool:
        """Whether the whole prompt is in the cache."""
        return self.num_computed >= len(self.prompt_ids)

    def append(self, token: int, end_ids: frozenset[int]) -> None:
        """Take the next token; ends the sequence at an end token (which is no output) or at its length limit."""
        if token in end_ids:
            self.finish_reason = "stop"
            return
        self.output_ids.append(token)
        self.pending.append(token)
        if len(self.output_ids) >= self.max_new_tokens:
            self.finish_reason = "length"
