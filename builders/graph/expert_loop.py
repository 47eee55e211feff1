"""The loop over the experts that any token has chosen: those that none chose aren't computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnx import TensorProto

from deepseek_triton.builders.graph.node_list import NodeList

Product = Callable[[str, str], str]


def add_expert_loop(
    g: NodeList,
    own: str,
    values: tuple[str, str, str],
    start: str,
    shape: Sequence[int | str],
    inner_of: Product,
    output_of: Product,
) -> str:
    """`start` [n, hidden] plus the weighted sum of each token's experts; float32, its shape is `shape`.

    own: begins the names of values. values: tokens [n, hidden], weights [n, k] float32, chosen [n, k] INT64. inner_of:
    adds what an expert's gate and up make of some tokens [m, hidden], by the names of these and of its number;
    output_of: what its down makes of that, in float32.
    """
    tokens, weights, chosen = values
    used = g.node("Reshape", [chosen, g.int([-1])], f"{own}.all_chosen")
    g.nodes("Unique", [used], [f"{own}.used"], f"{own}.unique", sorted=1)
    count = g.node("Size", [f"{own}.used"], f"{own}.num_used")

    def step(number: str, total: str) -> str:
        expert = g.node("Gather", [f"{own}.used", number], f"{own}.expert", axis=0)
        places = g.node("NonZero", [g.node("Equal", [chosen, expert], f"{own}.is_chosen")], f"{own}.places")
        places = g.node("Transpose", [places], f"{own}.pairs", perm=[1, 0])  # [m, 2]: token, place
        rows = g.node("Gather", [places, g.int(0)], f"{own}.rows", axis=1)
        inputs = g.node("Gather", [tokens, rows], f"{own}.inputs", axis=0)
        outputs = output_of(inner_of(inputs, expert), expert)
        scale = g.node("GatherND", [weights, places], f"{own}.scale")
        scaled = g.node("Mul", [outputs, g.node("Unsqueeze", [scale, g.int([1])], f"{own}.scale1")], f"{own}.scaled")
        index = g.node("Unsqueeze", [rows, g.int([1])], f"{own}.row_index")
        return g.node("ScatterND", [total, index, scaled], f"{own}.sum", reduction="add")

    return g.loop(count, start, TensorProto.FLOAT, shape, step, own)
