"""Captured steps: a CUDA graph for each size, none replayed when what it reads or writes has moved.

It knows sizes and addresses; what a step computes is its caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ensemble.engine.runners.base import PromptChunk
from ensemble.engine.runners.cuda.attending import PREFILL_TILE
from ensemble.engine.runners.cuda.prompts import PackedPrompts, pack

PREFILL_SIZES = (16, 32, 64, 128, 256, 512)  # captured: there launching would take longer than computing
CAPTURED_CHUNKS = 8  # chunks that one captured prefill may hold


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

    def capture(self, run: Callable[[], torch.Tensor]) -> Captured:
        """Run `run` once, which compiles its kernels, and capture it."""
        run()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.current_stream().synchronize()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=self._mode):
            logits = run()
        return Captured(graph, logits, self._addresses())


def captured_sizes(num_slots: int) -> list[int]:
    """The batch sizes that have a graph: 1, 2, 4, 8, then two for each doubling, at most all slots."""
    sizes = {1, 2, 4} | {base * factor for factor in (1, 2, 4, 8, 16, 32, 64, 128) for base in (8, 12)}
    return sorted({min(size, num_slots) for size in sizes})


def captured_size(n: int, num_slots: int) -> int:
    """The captured batch size that runs `n` rows."""
    return next(size for size in captured_sizes(num_slots) if size >= n)


def padded_size(num_tokens: int) -> int:
    """Tokens that a prefill of `num_tokens` computes: few different shapes, and whole tiles."""
    return max(16, -(-num_tokens // 64) * 64)


def pack_for_graph(chunks: Sequence[PromptChunk], size: int) -> PackedPrompts:
    """At most `CAPTURED_CHUNKS` chunks, in the arrays of a captured prefill of `size` tokens."""
    return pack(
        chunks, tile=PREFILL_TILE, num_tokens=size, num_tiles=size // PREFILL_TILE + CAPTURED_CHUNKS,
        num_logits=CAPTURED_CHUNKS,
    )  # fmt: skip
