"""The decoder's graph without its cache: one pass over whole rows that scores candidate continuations.

What enters is decoder.py's graph, quantised or not; what leaves is a graph over the same weight file. A row is a
prompt and, after it, branches: the tokens of each candidate but its last. A token sees the prompt and its own branch,
so the prompt is computed once for all candidates. Rows arrive unpadded, one behind the other, as Triton concatenates
ragged requests; the graph pads them to the longest of the batch and no further.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from builders.engine.compile import read_graph
from builders.engine.errors import EngineError
from ensemble.contract import (
    BRANCH_IDS,
    HIDDEN_STATE,
    LOGIT_POSITIONS,
    SCORE_IDS,
    TARGET_IDS,
    TARGET_LOGITS,
    TOKEN_LOG_PROBS,
)
from ensemble.scoring.rows import GRAPH_FILE, LOGIT_COUNTS, LONGEST_ROW, ROW_LENS, TARGET_COUNTS

__all__ = ["GRAPH_FILE", "stateless_widths", "write_stateless"]

DOC = f"""Scores candidate continuations, without a cache. All rows' values lie one behind the other.
Inputs: {SCORE_IDS.name} [tokens]; {BRANCH_IDS.name} [tokens] 0: prompt, 1 …: a candidate, -1: padding at a row's end;
{LOGIT_POSITIONS.name} [logits] where in its row a next token is predicted; {TARGET_LOGITS.name} [targets] which of its
row's predictions a target is read from; {TARGET_IDS.name} [targets] token ids; {ROW_LENS}, {LOGIT_COUNTS},
{TARGET_COUNTS} [batch, 1] how many of the values are each row's; {LONGEST_ROW} [seq_len]: its length alone counts.
Outputs: {TOKEN_LOG_PROBS.name} [targets]; {HIDDEN_STATE.name} [batch, hidden] where the first logits are."""

INT32, INT64 = TensorProto.INT32, TensorProto.INT64
# What the graph with a cache says about positions, masks and last tokens; the prelude says it anew.
REPLACED = frozenset(
    ("seq_len_1d", "seq_len_scalar", "offsets", "start_column", "position_ids", "query_positions", "mask", "last_token",
     "last_token_index", "last_hidden")
)  # fmt: skip
RENAMED = {"input_ids": "padded_ids"}


def write_stateless(path: Path, output: Path) -> Path:
    """Write the scoring version of the graph at `path` to `output`, beside it, sharing its weight file.

    Raises:
        EngineError: `output` lies elsewhere, or the graph isn't decoder.py's in opset 24 with the last logits alone.
    """
    if path.parent.resolve() != output.parent.resolve():
        raise EngineError(f"{output} must lie beside {path}, whose weights it shares")
    model = read_graph(path)
    graph = model.graph
    scatters = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "TensorScatter"}
    hidden = {node.name: node.input[0] for node in graph.node}.get("last_hidden")
    if not scatters or hidden is None:
        raise EngineError(
            f"{path} is not a decoder's graph with a cache in opset 24, giving the last logits; build it again so"
        )
    kept = [node for node in graph.node if node.op_type != "TensorScatter" and node.name not in REPLACED]
    for node in kept:
        node.input[:] = [scatters.get(name, RENAMED.get(name, name)) for name in node.input]
    nodes = _Nodes()
    _pad(nodes)
    num_prelude = len(nodes.nodes)
    _gather_logits(nodes, hidden)
    num_gathered = len(nodes.nodes)
    _read_targets(nodes)
    # The decoder's own nodes lie around those that pick the positions whose logits are wanted.
    head = next(index for index, node in enumerate(kept) if "last_hidden" in node.input)
    ordered = nodes.nodes[:num_prelude] + kept[:head] + nodes.nodes[num_prelude:num_gathered]
    ordered += kept[head:] + nodes.nodes[num_gathered:]

    hidden_size = _hidden_size(graph)
    outputs = [
        helper.make_tensor_value_info(TOKEN_LOG_PROBS.name, TensorProto.FLOAT, ["targets"]),
        helper.make_tensor_value_info(HIDDEN_STATE.name, TensorProto.FLOAT, ["batch", hidden_size]),
    ]
    _replace(graph.node, _reachable(ordered, [value.name for value in outputs]))
    _replace(graph.input, _inputs())
    _replace(graph.output, outputs)
    graph.initializer.extend(nodes.constants)
    used = {name for node in graph.node for name in node.input}
    _replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in used])
    del graph.value_info[:]
    model.doc_string = graph.doc_string = DOC
    onnx.save(model, output)
    onnx.checker.check_model(str(output), full_check=True)
    return output


def stateless_widths(path: Path) -> tuple[int, int]:
    """(max_seq_len, hidden_size) of the graph that `write_stateless` wrote."""
    graph = read_graph(path).graph
    positions = next((tensor.dims[0] for tensor in graph.initializer if tensor.name == "rope.cos"), 0)
    hidden = next(value for value in graph.output if value.name == HIDDEN_STATE.name)
    return positions, hidden.type.tensor_type.shape.dim[1].dim_value


class _Nodes:
    """Nodes with one output each, called like the node, and small integer constants."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self._names: set[str] = set()

    def add(self, op_type: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], name=name, **attributes))
        return name

    def int(self, value: int | list[int]) -> str:
        """A shared INT64 constant, a scalar or [n]."""
        name = f"score_int_{value}".replace("[", "v").replace("]", "").replace("-", "m").replace(", ", "_")
        if name not in self._names:
            self._names.add(name)
            self.constants.append(numpy_helper.from_array(np.asarray(value, np.int64), name))
        return name

    def row_of(self, values: str, counts: str) -> tuple[str, str]:
        """For a ragged input: each value's row [n], and where each row begins [batch]."""
        flat = self.add("Squeeze", [counts, self.int([1])], f"{counts}.flat")
        counts64 = self.add("Cast", [flat], f"{counts}.int64", to=INT64)
        ends = self.add("CumSum", [counts64, self.int(0)], f"{counts}.ends")
        starts = self.add("Sub", [ends, counts64], f"{counts}.starts")
        number = self.add("Squeeze", [self.add("Shape", [values], f"{values}.shape")], f"{values}.number")
        index = self.add("Range", [self.int(0), number, self.int(1)], f"{values}.index")
        column = self.add("Unsqueeze", [index, self.int([1])], f"{values}.column")
        line = self.add("Unsqueeze", [ends, self.int([0])], f"{counts}.line")
        is_past = self.add("GreaterOrEqual", [column, line], f"{values}.is_behind")
        past = self.add("Cast", [is_past], f"{values}.rows_before", to=INT64)
        return self.add("ReduceSum", [past, self.int([1])], f"{values}.row", keepdims=0), starts


def _pad(nodes: _Nodes) -> None:
    """`padded_ids` and `position_ids` [batch, seq_len], `mask` [batch, 1, seq_len, seq_len]."""
    add, ints = nodes.add, nodes.int
    flat = add("Squeeze", [ROW_LENS, ints([1])], f"{ROW_LENS}.flat")
    lens = add("Cast", [flat], f"{ROW_LENS}.int64", to=INT64)
    starts = add("Sub", [add("CumSum", [lens, ints(0)], f"{ROW_LENS}.ends"), lens], f"{ROW_LENS}.starts")
    longest = add("Squeeze", [add("Shape", [LONGEST_ROW], "seq_len_1d")], "seq_len")
    line = add("Unsqueeze", [add("Range", [ints(0), longest, ints(1)], "offsets"), ints([0])], "offset_line")
    is_real = add("Less", [line, add("Unsqueeze", [lens, ints([1])], f"{ROW_LENS}.column")], "is_real")
    places = add("Add", [add("Unsqueeze", [starts, ints([1])], f"{ROW_LENS}.starts_column"), line], "places")
    places = add("Where", [is_real, places, ints(0)], "real_places")
    add("Gather", [SCORE_IDS.name, places], "padded_ids")
    branches = add("Cast", [add("Gather", [BRANCH_IDS.name, places], "gathered_branches")], "branches64", to=INT64)
    branches = add("Where", [is_real, branches, ints(-1)], "branches")
    keys = add("Unsqueeze", [branches, ints([1])], "key_branches")  # [batch, 1, seq_len]
    queries = add("Unsqueeze", [branches, ints([2])], "query_branches")
    is_prompt = add("Equal", [keys, ints(0)], "is_prompt_key")
    is_own = add("Equal", [keys, queries], "is_own_branch")
    key_line = add("Unsqueeze", [line, ints([0])], "key_offsets")  # [1, 1, seq_len]
    query_column = add("Unsqueeze", [line, ints([2])], "query_offsets")
    is_before = add("LessOrEqual", [key_line, query_column], "is_before")
    seen = add("And", [add("Or", [is_prompt, is_own], "is_related"), is_before], "seen")
    add("Unsqueeze", [seen, ints([1])], "mask")
    # A token's position is how many tokens it sees before itself.
    count = add("ReduceSum", [add("Cast", [seen], "seen64", to=INT64), ints([2])], "num_seen", keepdims=0)
    add("Sub", [count, ints(1)], "position_ids")


def _gather_logits(nodes: _Nodes, hidden: str) -> None:
    """`last_hidden` [logits, hidden]: the last layer's output where a next token is predicted."""
    add = nodes.add
    rows, _ = nodes.row_of(LOGIT_POSITIONS.name, LOGIT_COUNTS)
    positions = add("Cast", [LOGIT_POSITIONS.name], "logit_positions64", to=INT64)
    add("GatherND", [hidden, _pairs(nodes, rows, positions, "logit_places")], "last_hidden")


def _read_targets(nodes: _Nodes) -> None:
    """The outputs, from `model.norm` [logits, hidden] and `logits` [logits, vocab_size]."""
    add = nodes.add
    log_probs = add("LogSoftmax", ["logits"], "vocabulary_log_probs", axis=-1)
    rows, _ = nodes.row_of(TARGET_IDS.name, TARGET_COUNTS)
    firsts = add("Gather", [f"{LOGIT_COUNTS}.starts", rows], "first_logits")
    own = add("Cast", [TARGET_LOGITS.name], "target_logits64", to=INT64)
    logits = add("Add", [firsts, own], "target_rows")
    ids = add("Cast", [TARGET_IDS.name], "target_ids64", to=INT64)
    add("GatherND", [log_probs, _pairs(nodes, logits, ids, "target_places")], TOKEN_LOG_PROBS.name)
    first = add("Gather", ["model.norm", f"{LOGIT_COUNTS}.starts"], "first_hidden")
    add("Cast", [first], HIDDEN_STATE.name, to=TensorProto.FLOAT)


def _pairs(nodes: _Nodes, first: str, second: str, name: str) -> str:
    """Two vectors [n] side by side: [n, 2]."""
    columns = [
        nodes.add("Unsqueeze", [value, nodes.int([1])], f"{name}.{i}") for i, value in enumerate((first, second))
    ]
    return nodes.add("Concat", columns, name, axis=1)


def _inputs() -> list[onnx.ValueInfoProto]:
    ragged = {
        SCORE_IDS.name: "tokens", BRANCH_IDS.name: "tokens", LOGIT_POSITIONS.name: "logits",
        TARGET_LOGITS.name: "targets", TARGET_IDS.name: "targets", LONGEST_ROW: "seq_len",
    }  # fmt: skip
    inputs = [helper.make_tensor_value_info(name, INT32, [dim]) for name, dim in ragged.items()]
    counts = (ROW_LENS, LOGIT_COUNTS, TARGET_COUNTS)
    return inputs + [helper.make_tensor_value_info(name, INT32, ["batch", 1]) for name in counts]


def _hidden_size(graph: onnx.GraphProto) -> int:
    embedding = next(tensor for tensor in graph.initializer if tensor.name == "model.embed_tokens.weight")
    return int(embedding.dims[1])


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
