"""The trained ResNet → an ONNX graph with a free batch size; batch normalisation is folded into the convolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from deepseek_triton.examples.image_report.contract import LOGITS, PIXELS
from deepseek_triton.examples.image_report.training.resnet import ConvNorm, ResNet

OPSET = 17


class _Graph:
    """The nodes and the weights that were added so far."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def add(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        output = name or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def weight(self, values: torch.Tensor) -> str:
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values.detach().float().numpy().copy(), name))
        return name

    def conv(self, layer: ConvNorm, x: str) -> str:
        weight, bias = layer.folded()
        kernel, stride = weight.shape[-1], layer[0].stride[0]  # type: ignore[index]
        return self.add(
            "Conv", x, self.weight(weight), self.weight(bias),
            kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[kernel // 2] * 4,
        )  # fmt: skip


def export(model: ResNet, path: Path) -> None:
    """Write `model` to `path`."""
    graph = _Graph()
    x = graph.add("Relu", graph.conv(model.stem, PIXELS.name))
    x = graph.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    for block in model.blocks:
        inner = graph.conv(block.second, graph.add("Relu", graph.conv(block.first, x)))  # type: ignore[arg-type]
        around = x if block.around is None else graph.conv(block.around, x)  # type: ignore[arg-type]
        x = graph.add("Relu", graph.add("Add", inner, around))
    x = graph.add("Flatten", graph.add("GlobalAveragePool", x))
    head = (graph.weight(model.head.weight), graph.weight(model.head.bias))
    graph.add("Gemm", x, *head, name=LOGITS.name, transB=1)

    def batch_of(dims: tuple[int, ...]) -> list[int | str]:
        return ["batch", *dims]

    proto = helper.make_graph(
        graph.nodes,
        "resnet",
        [helper.make_tensor_value_info(PIXELS.name, TensorProto.FLOAT, batch_of(PIXELS.dims))],
        [helper.make_tensor_value_info(LOGITS.name, TensorProto.FLOAT, batch_of(LOGITS.dims))],
        graph.weights,
    )
    written = helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(written, full_check=True)
    onnx.save(written, path)
