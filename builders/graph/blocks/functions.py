"""Operators of a domain of our own, defined by ONNX's and ONNX Runtime's: a session without our kernels runs those."""

from __future__ import annotations

import numpy as np
import onnx

from deepseek_triton.builders.graph.expert_loop import add_expert_loop
from deepseek_triton.builders.graph.node_list import MICROSOFT, FunctionNodes, pass_on

DOMAIN = "deepseek_triton"
ACTIVATIONS = 4  # MatMulNBits' accuracy_level: activations are rounded to eight bits in each block
SIZES = {"K": "K", "N": "N", "bits": "bits", "block_size": "block_size"}
IN_SIZES = {"K": "hidden_size", "N": "gate_up_size", "bits": "in_bits", "block_size": "in_block_size"}
OUT_SIZES = {"K": "intermediate_size", "N": "hidden_size", "bits": "out_bits", "block_size": "out_block_size"}


def product(opset: int) -> onnx.FunctionProto:
    """BlockMatMul: x [..., K], codes [N, blocks, bytes], scale [N, blocks] → [..., N]."""
    g = FunctionNodes()
    y = _product(g, "x", "codes", "scale", "y", SIZES)
    return g.function(DOMAIN, "BlockMatMul", ["x", "codes", "scale"], y, [*SIZES], opset)


def shifted_product(opset: int) -> onnx.FunctionProto:
    """ShiftedBlockMatMul: as `product`, plus block sums of x times minimum [blocks, N].

    block_shape: x's, with the blocks as an axis.
    """
    g = FunctionNodes()
    inputs = ["x", "codes", "scale", "minimum"]
    y = _shifted_product(g, inputs, "y", SIZES, g.attribute("block_shape"))
    return g.function(DOMAIN, "ShiftedBlockMatMul", inputs, y, [*SIZES, "block_shape"], opset)


def experts(opset: int) -> onnx.FunctionProto:
    """BlockExperts: each token's sum over the gated MLPs that it has chosen.

    tokens [n, hidden_size], weights [n, k] float32, chosen [n, k] INT64; in_codes, in_scale [experts, gate_up_size, …]
    of gate and up one behind the other, out_codes, out_scale [experts, hidden_size, …] of down; in_minimum and
    out_minimum [experts, blocks, outputs], or [experts, blocks, 1] zeros where there are none.
    """
    g = FunctionNodes()
    inputs = ["tokens", "weights", "chosen"]
    stacks = {side: [f"{side}_codes", f"{side}_scale", f"{side}_minimum"] for side in ("in", "out")}
    start = g.node("Mul", ["tokens", g.constant("zero", np.zeros((), np.float32))], "start")

    def of_expert(value: str, expert: str, side: str, sizes: dict[str, str]) -> str:
        own = [g.node("Gather", [stack, expert], f"own_{stack}", axis=0) for stack in stacks[side]]
        return _shifted_product(g, [value, *own], f"{side}_product", sizes, g.attribute(f"{side}_blocks"))

    def inner(value: str, expert: str) -> str:
        g.nodes("Split", [of_expert(value, expert, "in", IN_SIZES)], ["gate", "up"], "halves", axis=-1, num_outputs=2)
        activated = g.node("Mul", ["gate", g.node("Sigmoid", ["gate"], "sigmoid")], "act")
        return g.node("Mul", [activated, "up"], "inner")

    def outer(value: str, expert: str) -> str:
        return of_expert(value, expert, "out", OUT_SIZES)

    y = add_expert_loop(g, "experts", ("tokens", "weights", "chosen"), start, ["tokens", "hidden"], inner, outer)
    attributes = dict.fromkeys([*IN_SIZES.values(), *OUT_SIZES.values(), "in_blocks", "out_blocks", "num_experts"])
    inputs += [*stacks["in"], *stacks["out"]]
    return g.function(DOMAIN, "BlockExperts", inputs, y, [*attributes], opset)


def _product(g: FunctionNodes, x: str, codes: str, scale: str, name: str, sizes: dict[str, str]) -> str:
    g.node("MatMulNBits", [x, codes, scale], name, domain=MICROSOFT, accuracy_level=ACTIVATIONS)
    pass_on(g.last, **sizes)
    return name


def _shifted_product(g: FunctionNodes, inputs: list[str], name: str, sizes: dict[str, str], block_shape: str) -> str:
    """inputs: x, codes, scale, minimum."""
    x, codes, scale, minimum = inputs
    centred = _product(g, x, codes, scale, f"{name}_centred", sizes)
    blocks = g.node("Reshape", [x, block_shape], f"{name}_blocks")
    sums = g.node("ReduceSum", [blocks, g.int([-1])], f"{name}_sums", keepdims=0)
    return g.node("Add", [centred, g.node("MatMul", [sums, minimum], f"{name}_minima")], name)
