"""A mixture of experts' graph: the router in float32, a loop over the experts that any token has chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from deepseek_triton.builders.graph.blocks.experts import BlockExperts, joined
from deepseek_triton.builders.graph.blocks.linear import BlockLinear
from deepseek_triton.builders.graph.expert_loop import add_expert_loop
from deepseek_triton.builders.graph.float8 import Float8Linear
from deepseek_triton.builders.graph.nodes import DecoderNodes
from deepseek_triton.builders.graph.sequences import Sequences
from deepseek_triton.ensemble.decoder.moe import (
    BIAS,
    NORM,
    ROUTER,
    SHARED_DOWN,
    SHARED_GATE,
    SHARED_UP,
    MixtureOfExperts,
    expert_modules,
)
from deepseek_triton.ensemble.decoder.part import Linear
from deepseek_triton.ensemble.decoder.spec import layer_prefix

FLOAT, BOOL = TensorProto.FLOAT, TensorProto.BOOL
TINY = 1e-20  # added to a sum that divides


def add_experts(nodes: DecoderNodes, sequences: Sequences, part: MixtureOfExperts, layer: int, hidden: str) -> str:
    """hidden [batch, seq_len, hidden_size] plus the chosen and the shared experts' output."""
    g, prefix = nodes.g, layer_prefix(layer)
    normed = nodes.rms_norm(hidden, prefix + NORM)
    tokens = g.node("Reshape", [normed, nodes.int([-1, part.hidden_size])], f"{prefix}mlp.tokens")
    wide = g.node("Cast", [tokens], f"{prefix}mlp.wide_tokens", to=FLOAT)
    weights, chosen = add_router(nodes, part, prefix, wide)
    routed = _add_chosen(nodes, part, prefix, tokens, wide, weights, chosen)
    routed = g.node("Reshape", [routed, g.node("Shape", [normed], f"{prefix}mlp.shape")], f"{prefix}mlp.routed")
    output = routed
    if part.shared_size:
        output = g.node("Add", [routed, _add_shared(nodes, part, prefix, normed)], f"{prefix}mlp.output")
    return g.node("Add", [hidden, output], f"{prefix}mlp_residual")


def add_router(nodes: DecoderNodes, part: MixtureOfExperts, prefix: str, wide: str) -> tuple[str, str]:
    """wide [n, hidden_size] in float32 → weights [n, num_experts_per_tok] float32, and which experts, INT64."""
    g, ints, options, own = nodes.g, nodes.int, part.options, f"{prefix}mlp.router"
    weight = g.weight(prefix + ROUTER, nodes.read(prefix + ROUTER), np.dtype(np.float32), transpose=True)
    logits = g.node("MatMul", [wide, weight], f"{own}.logits")
    if options.scores == "softmax":
        scores = g.node("Softmax", [logits], f"{own}.scores", axis=-1)
    else:
        scores = g.node("Sigmoid", [logits], f"{own}.scores")
    ranked, excluded = scores, 0.0
    if options.choice == "group_top2":
        bias = g.weight(prefix + BIAS, nodes.read(prefix + BIAS), np.dtype(np.float32))
        ranked, excluded = g.node("Add", [scores, bias], f"{own}.biased"), -np.inf
    if options.choice != "greedy":
        ranked = _in_best_groups(nodes, part, own, ranked, excluded)
    chosen = f"{own}.chosen"
    count = ints([options.num_experts_per_tok])
    g.nodes("TopK", [ranked, count], [f"{own}.ranked", chosen], f"{own}.choice", axis=-1)
    weights = g.node("GatherElements", [scores, chosen], f"{own}.chosen_scores", axis=-1)
    if options.is_normalised:
        total = g.node("ReduceSum", [weights, ints([-1])], f"{own}.total", keepdims=1)
        total = g.node("Add", [total, _float(nodes, "tiny", TINY)], f"{own}.divisor")
        weights = g.node("Div", [weights, total], f"{own}.normalised")
    scale = _float(nodes, f"{own}.scale", options.scale)
    return g.node("Mul", [weights, scale], f"{own}.weights"), chosen


def _in_best_groups(nodes: DecoderNodes, part: MixtureOfExperts, own: str, ranked: str, excluded: float) -> str:
    """`ranked` [n, num_experts], `excluded` in place of the scores outside the best groups."""
    g, ints, options = nodes.g, nodes.int, part.options
    grouped = ints([-1, options.num_groups, options.num_experts // options.num_groups])
    groups = g.node("Reshape", [ranked, grouped], f"{own}.groups")
    if options.choice == "group_maximum":
        best = g.node("ReduceMax", [groups, ints([-1])], f"{own}.group_scores", keepdims=0)
    else:
        top, places = f"{own}.group_top", f"{own}.group_places"
        g.nodes("TopK", [groups, ints([2])], [top, places], f"{own}.group_top2", axis=-1)
        best = g.node("ReduceSum", [top, ints([-1])], f"{own}.group_scores", keepdims=0)
    values, numbers = f"{own}.best_scores", f"{own}.best_groups"
    g.nodes("TopK", [best, ints([options.topk_group])], [values, numbers], f"{own}.group_choice", axis=-1)
    is_best = g.node("Mul", [best, _float(nodes, "zero", 0.0)], f"{own}.no_groups")
    ones = g.node("Add", [g.node("Mul", [values, _float(nodes, "zero", 0.0)], f"{own}.zeros"), _float(nodes, "one", 1)],
                  f"{own}.ones")  # fmt: skip
    is_best = g.node("ScatterElements", [is_best, numbers, ones], f"{own}.marked", axis=-1)
    is_best = g.node("Cast", [is_best], f"{own}.is_best", to=BOOL)
    is_best = g.node("Unsqueeze", [is_best, ints([-1])], f"{own}.is_best_group")
    limited = g.node("Where", [is_best, groups, _float(nodes, f"{own}.excluded", excluded)], f"{own}.limited_groups")
    return g.node("Reshape", [limited, ints([-1, options.num_experts])], f"{own}.limited")


def _add_chosen(
    nodes: DecoderNodes, part: MixtureOfExperts, prefix: str, tokens: str, wide: str, weights: str, chosen: str
) -> str:
    """The weighted sum of each token's experts [n, hidden_size]; an expert that no token chose isn't computed."""
    g, ints, own, options = nodes.g, nodes.int, f"{prefix}mlp.experts", part.options
    hidden, inner = part.hidden_size, options.intermediate_size
    names = [expert_modules(expert) for expert in range(options.num_experts)]
    first = nodes.quantized(prefix + names[0][0])
    if isinstance(first, BlockLinear):
        return _add_blocks(nodes, prefix, own, (tokens, weights, chosen), names, first)
    begun = iter([first])

    def matrices(flags: list[bool], *places: int) -> Iterator[NDArray[np.generic]]:
        for expert in names:
            layers = [
                next(begun) if expert[place] == names[0][0] else nodes.quantized(f"{prefix}{expert[place]}")
                for place in places
            ]
            float8 = [layer for layer in layers if isinstance(layer, Float8Linear)]
            flags.append(len(float8) == len(places))
            for number, place in enumerate(places):
                # The float that each code stands for: the loop takes one expert of many, which no compiler makes FP8.
                yield float8[number].dequantized().T if flags[-1] else nodes.read(f"{prefix}{expert[place]}.weight").T

    def rounded(value: str, flags: list[bool], kind: str, expert: str) -> tuple[str, str | None]:
        """value [m, n] in E4M3 where the expert's matrices are, and each token's scale [m, 1]; None: it has none."""
        if not any(flags):
            return value, None
        quantized, scale = nodes.float8.token_scaled(value)
        if all(flags):
            return quantized, scale
        known, one = f"{own}.{kind}_is_float8", f"{own}.{kind}_one"
        is_float8 = g.node("Gather", [g.constant(known, np.array(flags)), expert], f"{known}_here", axis=0)
        quantized = g.node("Where", [is_float8, quantized, value], f"{value}.mixed")
        return quantized, g.node(
            "Where", [is_float8, scale, g.constant(one, np.ones(1, nodes.dtype))], f"{value}.scale"
        )

    def unscaled(value: str, scale: str | None) -> str:
        return value if scale is None else g.node("Mul", [value, scale], f"{value}.unscaled")

    # Two matrices an expert, gate and up one behind the other: [2, hidden, inner].
    in_flags: list[bool] = []
    out_flags: list[bool] = []
    inputs = g.stack(f"{own}.gate_up", matrices(in_flags, 0, 1), (options.num_experts, 2, hidden, inner), nodes.dtype)
    outputs = g.stack(f"{own}.down", matrices(out_flags, 2), (options.num_experts, inner, hidden), nodes.dtype)
    # The sum is float32 in any precision, as in transformers; ONNX Runtime adds up no float16 there.
    start = g.node("Mul", [wide, _float(nodes, "zero", 0.0)], f"{own}.start")

    def inner_of(values: str, expert: str) -> str:
        both = g.node("Gather", [inputs, expert], f"{own}.own_gate_up", axis=0)  # [2, hidden, inner]
        values, token_scale = rounded(values, in_flags, "input", expert)
        both = unscaled(g.node("MatMul", [values, both], f"{own}.products"), token_scale)  # [2, m, inner]
        gate, up = (g.node("Gather", [both, ints(i)], f"{own}.product{i}", axis=0) for i in (0, 1))
        return g.node("Mul", [nodes.swish(gate, f"{own}.act"), up], f"{own}.product")

    def output_of(values: str, expert: str) -> str:
        down = g.node("Gather", [outputs, expert], f"{own}.own_down", axis=0)
        values, token_scale = rounded(values, out_flags, "inner", expert)
        values = unscaled(g.node("MatMul", [values, down], f"{own}.outputs"), token_scale)
        return g.node("Cast", [values], f"{own}.wide", to=FLOAT)

    total = add_expert_loop(g, own, (tokens, weights, chosen), start, ["tokens", hidden], inner_of, output_of)
    return g.node("Cast", [total], f"{own}.total", to=nodes.onnx_dtype)


def _add_blocks(
    nodes: DecoderNodes,
    prefix: str,
    own: str,
    values: tuple[str, str, str],
    names: Sequence[tuple[str, str, str]],
    first: BlockLinear,
) -> str:
    """As `_add_chosen` with all experts in blocks; first: the first one's gate."""

    def matrix(module: str) -> BlockLinear:
        linear = nodes.quantized(prefix + module)
        assert isinstance(linear, BlockLinear), module
        return linear

    gates = chain([first], (matrix(gate) for gate, _, _ in names[1:]))
    inputs = (joined(gate, matrix(up)) for gate, (_, up, _) in zip(gates, names, strict=True))
    return BlockExperts(nodes.g, own, len(names)).add(values, inputs, (matrix(down) for _, _, down in names))


def _add_shared(nodes: DecoderNodes, part: MixtureOfExperts, prefix: str, normed: str) -> str:
    linears = {module.module: module for module in part.modules if isinstance(module, Linear)}
    shared = linears[SHARED_GATE], linears[SHARED_UP], linears[SHARED_DOWN]
    return nodes.gated_mlp(normed, prefix, "mlp.shared_experts", shared)


def _float(nodes: DecoderNodes, name: str, value: float) -> str:
    name = f"float_{name}"
    return name if nodes.g.has(name) else nodes.g.constant(name, np.asarray(value, np.float32))
