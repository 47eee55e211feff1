"""CUDA graphs of steps, one for each size; replay checks that the graph's inputs and outputs haven't moved.

It knows sizes and addresses; the caller defines what a step computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepseek_triton.ensemble.engine.runners.base import PromptChunk
from deepseek_triton.ensemble.engine.runners.cuda.attention import PREFILL_TILE
from deepseek_triton.ensemble.engine.runners.cuda.prompts import PackedPrompts, pack

FEWEST_TOKENS = 16  # of the smallest captured prefill
EVEN_TOKENS = 128  # rows of a matrix product's tile: sizes closer to each other would save nothing
# Maximum number of chunks in a captured prefill: one a token up to CHEAP_CHUNKS, beyond that one for TOKENS_A_CHUNK
# tokens, and at most one a slot. Each chunk is a row of the head's product; reading the head costs more than few rows.
CHEAP_CHUNKS, TOKENS_A_CHUNK = 64, 16


@dataclass(frozen=True)
class Captured:
    """A graph, its output, and the addresses that it reads and writes; these may not move while the graph lives."""

    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor
    addresses: tuple[int, ...]

    def replay(self, addresses: tuple[int, ...]) -> torch.Tensor:
        """Run the graph: its logits. addresses: today's, to compare."""
        assert self.addresses == addresses, "a captured graph's memory has moved"
        self.graph.replay()
        return self.logits


class Capturer:
    """Captures graphs on `stream`; their scratch memory is one pool.

    Args:
        addresses: as `Captured` has them.
        has_collectives: NCCL's watchdog thread may call CUDA during a capture.
    """

    def __init__(
        self, stream: torch.cuda.Stream, addresses: Callable[[], tuple[int, ...]], *, has_collectives: bool = False
    ) -> None:
        self._stream, self._addresses = stream, addresses
        self._mode = "thread_local" if has_collectives else "global"
        self._pool: Any = torch.cuda.graph_pool_handle()

    def capture(self, runs: Sequence[Callable[[], torch.Tensor]]) -> list[Captured]:
        """Run each of `runs` once, which compiles its kernels, then capture them all; the largest should come first.

        The memory of the first runs is freed before the captures allocate theirs, which they keep while they live.
        """
        for run in runs:
            run()
        torch.cuda.current_stream().synchronize()
        torch.cuda.empty_cache()
        return [self._capture(run) for run in runs]

    def _capture(self, run: Callable[[], torch.Tensor]) -> Captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=self._mode):
            logits = run()
        return Captured(graph, logits, self._addresses())


def captured_sizes(max_num_seqs: int) -> list[int]:
    """The batch sizes that have a graph: 1, 2, 4, 8, then two for each doubling, at most all slots."""
    sizes = {1, 2, 4} | {base * factor for factor in (1, 2, 4, 8, 16, 32, 64, 128) for base in (8, 12)}
    return sorted({min(size, max_num_seqs) for size in sizes})


def captured_size(n: int, max_num_seqs: int) -> int:
    """The captured batch size that runs `n` rows."""
    return next(size for size in captured_sizes(max_num_seqs) if size >= n)


@dataclass(frozen=True)
class PromptSizes:
    """The captured prefills: number of tokens → maximum number of chunks, smallest first.

    The tokens are 16, 32, 64, then two sizes for each doubling, from 1,024 on eight. The last holds
    `max_num_batched_tokens` tokens and a chunk of every slot, so that every prefill finds its graph.
    """

    chunks: dict[int, int]

    @classmethod
    def of(cls, max_num_batched_tokens: int, max_num_seqs: int) -> PromptSizes:
        """The sizes that a runner captures."""
        most = -(-max_num_batched_tokens // FEWEST_TOKENS) * FEWEST_TOKENS
        sizes, size = list[int](), FEWEST_TOKENS
        while size < most:
            sizes.append(size)
            doubling = 1 << (size.bit_length() - 1)
            size += size if size < 64 else min(doubling // 2, max(EVEN_TOKENS, doubling // 8))
        chunks = {size: max(min(size, CHEAP_CHUNKS), size // TOKENS_A_CHUNK) for size in sizes}
        return cls({size: min(max_num_seqs, count) for size, count in chunks.items()} | {most: max_num_seqs})

    def fitting(self, chunks: Sequence[PromptChunk]) -> int:
        """Number of tokens of the smallest graph that holds `chunks`."""
        return self.fitting_counts(sum(len(chunk.ids) for chunk in chunks), len(chunks))

    def fitting_counts(self, num_tokens: int, num_chunks: int) -> int:
        """Likewise, of so many."""
        return next(size for size, most in self.chunks.items() if size >= num_tokens and most >= num_chunks)

    def pack(self, chunks: Sequence[PromptChunk], size: int) -> PackedPrompts:
        """Pack `chunks` into the arrays of the graph for `size` tokens."""
        most = self.chunks[size]
        return pack(chunks, tile=PREFILL_TILE, num_tokens=size, num_tiles=size // PREFILL_TILE + most, num_logits=most)
