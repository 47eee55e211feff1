"""What a runner was made for: what doesn't fit is refused before anything is launched or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_triton.ensemble.engine.runners.base import Ids, PromptChunk, RunnerError


@dataclass(frozen=True)
class Limits:
    """Slots, positions in each, and tokens of prompts at once."""

    max_num_seqs: int
    max_seq_len: int
    max_num_batched_tokens: int

    def check_prefill(self, chunks: Sequence[PromptChunk]) -> None:
        """Can they be computed at once?

        Raises:
            RunnerError: they are too many, or too many tokens, or end behind their slot.
        """
        if len(chunks) > self.max_num_seqs:
            raise RunnerError(f"{len(chunks)} chunks of prompts at once, there are {self.max_num_seqs} slots")
        total = sum(len(chunk.ids) for chunk in chunks)
        if not 0 < total <= self.max_num_batched_tokens:
            raise RunnerError(
                f"{total} prompt tokens at once, the runner was made for 1 … {self.max_num_batched_tokens}"
            )
        for chunk in chunks:
            if (end := chunk.start + len(chunk.ids)) > self.max_seq_len:
                raise RunnerError(
                    f"a chunk ends at position {end}, a slot holds {self.max_seq_len}; shorten the prompt"
                )

    def check_decode(self, ids: Ids, positions: Ids) -> None:
        """Are there so many slots, and are they so long?

        Raises:
            RunnerError: they aren't.
        """
        if not 0 < len(ids) <= self.max_num_seqs or int(positions.max()) >= self.max_seq_len:
            raise RunnerError(
                f"{len(ids)} rows up to position {int(positions.max(initial=-1))}: there are "
                f"{self.max_num_seqs} slots of {self.max_seq_len} positions"
            )
