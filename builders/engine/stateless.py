"""The decoder's graph without its cache: one pass over whole sequences, for scoring.

What enters is decoder.py's graph, quantised or not; what leaves is a graph over the same weight file. Each
sequence starts at position 0 and attends to itself, so causality is the graph's own `is_causal`: with as many
keys as queries every runtime reads it the same way. Ids after a sequence's end change nothing before it, so
rows may be padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from builders.engine.compile import read_graph
from builders.engine.errors import EngineError

DOC = """Decoder without a cache. Inputs: input_ids [batch, seq_len] token ids{num_tokens}.
Outputs: logits {logits}."""


def write_stateless(path: Path, output: Path) -> Path:
    """Write the cacheless version of the graph at `path` to `output`, beside it, sharing its weight file.

    Inputs: input_ids [batch, seq_len]; if the graph gives the last logits only, num_tokens [batch, 1] too:
    Triton batches no tensor without a dimension of its own.

    Raises:
        EngineError: `output` lies elsewhere, or the graph isn't decoder.py's in opset 24.
    """
    if path.parent.resolve() != output.parent.resolve():
        raise EngineError(f"{output} must lie beside {path}, whose weights it shares")
    model = read_graph(path)
    graph = model.graph
    scatters = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "TensorScatter"}
    names = {node.name for node in graph.node}
    if not scatters or not {"position_ids", "offsets"} <= names:
        raise EngineError(f"{path} is not a decoder's graph with a cache in opset 24; build it again with that opset")
    gives_last = "last_token_index" in names

    nodes = [node for node in graph.node if node.op_type != "TensorScatter"]
    for node in nodes:
        node.input[:] = [scatters.get(name, name) for name in node.input]
        if node.op_type == "Attention":
            del node.input[3:]
            node.attribute.append(helper.make_attribute("is_causal", 1))
        elif node.name == "position_ids":  # [batch, seq_len], as RotaryEmbedding wants it
            node.op_type = "Expand"
            node.input[:] = ["offsets", "input_ids_shape"]
    if gives_last:
        # num_tokens has the dimension already that this node would add.
        nodes = [node for node in nodes if node.name != "last_token_index"]
        for node in nodes:
            node.input[:] = ["last_token" if name == "last_token_index" else name for name in node.input]
    nodes.insert(0, helper.make_node("Shape", ["input_ids"], ["input_ids_shape"], "input_ids_shape"))

    inputs = [value for value in graph.input if value.name == "input_ids"]
    if gives_last:
        inputs.append(helper.make_tensor_value_info("num_tokens", TensorProto.INT64, ["batch", 1]))
    outputs = [value for value in graph.output if value.name == "logits"]
    _replace(graph.node, _reachable(nodes, [value.name for value in outputs]))
    _replace(graph.input, inputs)
    _replace(graph.output, outputs)
    used = {name for node in graph.node for name in node.input}
    _replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in used])
    del graph.value_info[:]
    model.doc_string = graph.doc_string = DOC.format(
        num_tokens="; num_tokens [batch, 1] how many of a row's ids are real" if gives_last else "",
        logits="[batch, vocab_size] of each row's last real token" if gives_last else "[batch, seq_len, vocab_size]",
    )
    onnx.save(model, output)
    onnx.checker.check_model(str(output), full_check=True)
    return output


def _reachable(nodes: list[onnx.NodeProto], outputs: list[str]) -> list[onnx.NodeProto]:
    """The nodes that `outputs` need, in their order; `nodes` are sorted topologically."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    return kept[::-1]


def _replace(field: Any, values: Sequence[Any]) -> None:
    """Make `values` the content of a repeated protobuf field, of which they may be part."""
    copies = [type(value).FromString(value.SerializeToString()) for value in values]
    del field[:]
    field.extend(copies)
