"""The base class of runners that pack prompts and sample on the GPU, on one GPU or on several."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from deepseek_triton.ensemble.engine.runners.base import Decoded, DeviceSampling, Ids, Logits, PromptChunk
from deepseek_triton.ensemble.engine.runners.cuda.buffers import STEPS_IN_FLIGHT
from deepseek_triton.ensemble.engine.runners.cuda.caches import PAGE


class PackingRunner(ABC):
    """Implements `Runner`'s calls by those of a `PipelinedRunner` that packs several slots' prompts."""

    steps_in_flight = STEPS_IN_FLIGHT
    packs_prompts = True
    num_blocks, block_size = 0, PAGE

    def prefill(self, slot: int, ids: Ids, start: int) -> Logits:
        """See Runner."""
        first: Logits = self.prefill_many([PromptChunk(slot, ids, start)])[0]
        return first

    def decode(self, ids: Ids, positions: Ids) -> Logits:
        """See Runner."""
        self.start_decode(ids, positions, [None] * len(ids), range(len(ids)))
        return self.finish_decode().logits

    def can_sample(self, sampling: DeviceSampling) -> bool:
        """See SamplingRunner: always True."""
        return True

    @abstractmethod
    def prefill_many(self, chunks: Sequence[PromptChunk]) -> Logits:
        """`prefill` of several slots' chunks at once: the logits [len(chunks), vocab_size] of each one's last token."""

    @abstractmethod
    def start_decode(
        self, ids: Ids, positions: Ids, samplings: Sequence[DeviceSampling | None], logits_rows: Sequence[int]
    ) -> None:
        """See SamplingRunner; a second step may begin before the first is finished, ids −1 for the first's tokens."""

    @abstractmethod
    def finish_decode(self) -> Decoded:
        """See SamplingRunner: the earliest step that was begun."""
