"""Experts in blocks of integers: two stacks of matrices in the graph's file, and one node that computes with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.errors import CheckpointError
from deepseek_triton.builders.graph.blocks import functions
from deepseek_triton.builders.graph.blocks.linear import BlockLinear, Float32
from deepseek_triton.builders.graph.builder import GraphBuilder

FLOAT, UINT8 = np.dtype(np.float32), np.dtype(np.uint8)


class BlockExperts:
    """Adds one layer's experts; own: begins the names of its weights, and is the node's."""

    def __init__(self, graph: GraphBuilder, own: str, num_experts: int) -> None:
        self.g, self._own, self._count = graph, own, num_experts

    def add(self, values: Sequence[str], inputs: Iterator[BlockLinear], outputs: Iterator[BlockLinear]) -> str:
        """The weighted sum of each token's experts: [n, hidden].

        values: tokens [n, hidden], weights [n, k] float32, chosen [n, k] INT64. inputs: each expert's gate and up,
        joined; outputs: each one's down; both are read once, and the codes of one are in memory at a time.

        Raises:
            CheckpointError: experts of one layer are stored in different forms.
        """
        g = self.g
        first, stacks = self._stack("in", inputs)
        last, more = self._stack("out", outputs)
        g.function(functions.experts)
        hidden, inner = last.shape
        return g.node(
            "BlockExperts", [*values, *stacks, *more], self._own, domain=functions.DOMAIN,
            num_experts=self._count, hidden_size=hidden, intermediate_size=inner, gate_up_size=first.shape[0],
            in_bits=first.bits, in_block_size=first.block_size, in_blocks=[0, -1, first.block_size],
            out_bits=last.bits, out_block_size=last.block_size, out_blocks=[0, -1, last.block_size],
        )  # fmt: skip

    def _stack(self, side: str, linears: Iterator[BlockLinear]) -> tuple[BlockLinear, list[str]]:
        """Write codes, scales and minima; returns the first matrix and their names."""
        first = next(linears)
        scales: list[Float32] = []
        minima: list[Float32] = []

        def codes() -> Iterator[NDArray[np.uint8]]:
            for linear in chain([first], linears):
                if (linear.bits, linear.block_size, linear.minimum is None) != (
                    first.bits, first.block_size, first.minimum is None,
                ):  # fmt: skip
                    raise CheckpointError(f"{self._own}: experts are stored in different forms; try --precision int8")
                scales.append(linear.scale)
                if linear.minimum is not None:
                    minima.append(np.ascontiguousarray(linear.minimum.T))
                yield linear.codes

        name, blocks = f"{self._own}.{side}", first.scale.shape[1]
        minimum = (blocks, first.shape[0] if first.minimum is not None else 1)
        names = [
            self.g.stack(f"{name}.codes", codes(), (self._count, *first.codes.shape), UINT8),
            self.g.stack(f"{name}.scale", scales, (self._count, *first.scale.shape), FLOAT),
        ]
        none = (np.zeros(minimum, np.float32) for _ in range(self._count))
        return first, [*names, self.g.stack(f"{name}.minimum", minima or none, (self._count, *minimum), FLOAT)]


def joined(gate: BlockLinear, up: BlockLinear) -> BlockLinear:
    """Both as one layer; blocks that differ become bytes, in the smaller blocks."""
    whole = BlockLinear.joined([gate, up])
    if whole is None:
        size = min(gate.block_size, up.block_size)
        whole = BlockLinear.joined([gate.in_bytes(size), up.in_bytes(size)])
    assert whole is not None
    return whole
