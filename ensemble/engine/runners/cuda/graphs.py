"""Captured steps: a CUDA graph for each size, none replayed when what it reads or writes has moved.

It knows sizes and addresses; what a step computes is its caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepseek_triton.ensemble.engine.runners.base import PromptChunk
from deepseek_triton.ensemble.engine.runners.cuda.attention import PREFILL_TILE
from deepseek_triton.ensemble.engine.runners.cuda.prompts import PackedPrompts, pack

FEWEST_TOKENS = 16  # that a captured prefill computes
EVEN_TOKENS = 128  # as many as a matrix product's tile has rows: sizes closer to each other would save nothing
# Chunks that a captured prefill may hold, if there are so many slots: one for each token up to the first, and one for
# so many tokens. Each has a row in the head's product, but of few rows reading its weights is what costs.
CHEAP_CHUNKS, TOKENS_A_CHUNK = 64, 16


@dataclass(frozen=True)
class Captured:
    """A graph, and what it reads and writes: none of it may move while the graph lives."""

    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor
    addresses: tuple[int, ...]

    def replay(self, addresses: tuple[int, ...]) -> torch.Tensor:
        """Run it: its logits. addresses: where those things are now."""
        assert self.addresses == addresses, "a captured graph's memory has moved"
        self.graph.replay()
        return self.logits


class Capturer:
    """Captures on `stream`, all graphs' scratch memory in one pool.

    Args:
        addresses: as `Captured` has them.
        has_collectives: other threads may call CUDA during a capture, as NCCL's watchdog does.
    """

    def __init__(
        self, stream: torch.cuda.Stream, addresses: Callable[[], tuple[int, ...]], *, has_collectives: bool = False
    ) -> None:
        self._stream, self._addresses = stream, addresses
        self._mode = "thread_local" if has_collectives else "global"
        self._pool: Any = torch.cuda.graph_pool_handle()

    def capture(self, runs: Sequence[Callable[[], torch.Tensor]]) -> list[Captured]:
        """Run each of `runs` once, which compiles its kernels, then capture them all; the largest should come first.

        What the first runs took is given back before the captures take the same again, for as long as they live.
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
    """The prefills that have a graph: so many tokens, in so many chunks at most, by tokens, smallest first.

    The tokens are 16, 32, 64, then two sizes for each doubling, from 1,024 on eight. The last holds
    `max_num_batched_tokens` tokens and a chunk of every slot, so that every prefill finds its graph.
    """

    chunks: dict[int, int]

    @classmethod
    def of(cls, max_num_batched_tokens: int, max_num_seqs: int) -> PromptSizes:
        """Those of a runner."""
        most = -(-max_num_batched_tokens // FEWEST_TOKENS) * FEWEST_TOKENS
        sizes, size = list[int](), FEWEST_TOKENS
        while size < most:
            sizes.append(size)
            doubling = 1 << (size.bit_length() - 1)
            size += size if size < 64 else min(doubling // 2, max(EVEN_TOKENS, doubling // 8))
        chunks = {size: max(min(size, CHEAP_CHUNKS), size // TOKENS_A_CHUNK) for size in sizes}
        return cls({size: min(max_num_seqs, count) for size, count in chunks.items()} | {most: max_num_seqs})

    def fitting(self, chunks: Sequence[PromptChunk]) -> int:
        """The smallest that holds `chunks`."""
        total = sum(len(chunk.ids) for chunk in chunks)
        return next(size for size, most in self.chunks.items() if size >= total and most >= len(chunks))

    def pack(self, chunks: Sequence[PromptChunk], size: int) -> PackedPrompts:
        """`chunks` in the arrays of that size."""
        most = self.chunks[size]
        return pack(chunks, tile=PREFILL_TILE, num_tokens=size, num_tiles=size // PREFILL_TILE + most, num_logits=most)
