"""The mask of the positions that an indexer chooses: nodes behind its scores."""

from __future__ import annotations

import numpy as np
from onnx import numpy_helper

from deepseek_triton.builders.graph.node_list import Body
from deepseek_triton.builders.graph.nodes import DecoderNodes


def chosen_mask(nodes: DecoderNodes, scores: Body, topk: int, name: str) -> str:
    """Of `mask`, BOOL [batch, 1, seq_len, kv_len], the `topk` positions with the highest scores, in a value `name`.

    The scores are computed only where there are more positions than that. Of equal ones the first positions are chosen.

    Args:
        scores: adds the nodes that give float32 [batch, seq_len, kv_len].
        topk: at most the cache's positions.
    """
    g, ints = nodes.g, nodes.int

    def every() -> str:
        return g.node("Identity", ["mask"], f"{name}.every")

    def best() -> str:
        visible = g.node("Squeeze", ["mask", ints([1])], f"{name}.visible")
        lowest = g.constant(f"{name}.lowest", np.array(-np.inf, np.float32))
        ranked = g.node("Where", [visible, scores(), lowest], f"{name}.ranked")
        outputs = [f"{name}.scores", positions := f"{name}.positions"]
        g.nodes("TopK", [ranked, ints([topk])], outputs, f"{name}.topk", axis=-1, sorted=0)
        update = [filled(ranked, False), positions, filled(positions, True)]
        best = g.node("ScatterElements", update, f"{name}.of_all", axis=-1)
        # Where fewer are visible, hidden ones are among the best: they stay hidden.
        return g.node("Unsqueeze", [g.node("And", [best, visible], f"{name}.seen"), ints([1])], f"{name}.best")

    def filled(like: str, value: bool) -> str:
        shape, one = g.node("Shape", [like], f"{like}_shape"), numpy_helper.from_array(np.array([value]))
        return g.node("ConstantOfShape", [shape], f"{like}_filled", value=one)

    num_keys = g.node("Size", ["key_positions"], f"{name}.num_keys")
    return g.branch(g.node("LessOrEqual", [num_keys, ints(topk)], f"{name}.is_every"), every, best, name)
