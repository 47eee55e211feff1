"""A runner's limits: calls that exceed them are refused before anything is launched or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_triton.ensemble.engine.runners.base import Ids, PromptChunk, RunnerError


@dataclass(frozen=True)
class Limits:
    """Number of slots, positions of a slot, and prompt tokens of one prefill."""

    max_num_seqs: int
    max_seq_len: int
    max_num_batched_tokens: int

    def check_prefill(self, chunks: Sequence[PromptChunk]) -> None:
        """Check that `chunks` fit into one prefill.

        Raises:
            RunnerError: too many chunks, too many tokens, or a chunk that ends past its slot.
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
        """Check a decode's slots and positions.

        Raises:
            RunnerError: there are fewer slots, or they are shorter.
        """
        if not 0 < len(ids) <= self.max_num_seqs or int(positions.max()) >= self.max_seq_len:
            raise RunnerError(
                f"{len(ids)} rows up to position {int(positions.max(initial=-1))}: there are "
                f"{self.max_num_seqs} slots of {self.max_seq_len} positions"
            )
