"""Sequences on a CPU whose attention isn't one node: it sees what of a cache is filled, not all of it under a mask."""

from __future__ import annotations

from deepseek_triton.builders.graph.forms.cached import CachedSequences
from deepseek_triton.ensemble.decoder.part import CacheTensor

# What is seen is a multiple of it: a position's sums are then the same however many positions stand behind it.
STEP = 128


class FilledSequences(CachedSequences):
    """Implements `Sequences`; inputs, outputs and caches are those of CachedSequences."""

    def remembered(self, layer: int, tensor: CacheTensor, rows: str) -> str:
        g, ints = self._nodes.g, self._nodes.int
        cache = super().remembered(layer, tensor, rows)
        return g.node("Slice", [cache, ints([0]), "num_seen_1d", ints([2])], f"{cache}.seen")

    def key_positions(self) -> str:
        """`num_seen`: enough for the longest row."""
        g, ints = self._nodes.g, self._nodes.int
        longest = g.node("Add", [g.node("ReduceMax", ["start"], "last_start", keepdims=0), "seq_len_scalar"], "longest")
        steps = g.node("Div", [g.node("Add", [longest, ints(STEP - 1)], "longest_up"), ints(STEP)], "num_steps")
        whole = g.node("Mul", [steps, ints(STEP)], "whole_steps")
        seen = g.node("Min", [whole, ints(self._nodes.max_seq_len)], "num_seen")
        g.node("Unsqueeze", [seen, ints([0])], "num_seen_1d")
        return g.node("Range", [ints(0), seen, ints(1)], "key_positions")
