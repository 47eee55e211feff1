"""The decoder's graph without its cache: one pass over whole rows that scores candidate continuations.

What enters is decoder.py's graph, quantised or not; what leaves is a graph over the same weight file. A row is a
prompt and, after it, branches: the tokens of each candidate but its last. A token sees the prompt and its own branch,
so the prompt is computed once for all candidates. Rows arrive unpadded, one behind the other, as Triton concatenates
ragged requests, and stay so: attention alone pads them, to the longest of the batch and no further. A graph for a CPU
also takes the keys and values of a beginning that all rows share, and gives those of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deepseek_triton.builders.tensorrt.compile import read_graph
from deepseek_triton.builders.tensorrt.errors import EngineError
from deepseek_triton.ensemble.protocol.contract import (
    BRANCH_IDS,
    HIDDEN_STATE,
    LOGIT_POSITIONS,
    SCORE_IDS,
    TARGET_IDS,
    TARGET_LOGITS,
    TOKEN_LOG_PROBS,
)
from deepseek_triton.ensemble.scoring.rows import (
    GRAPH_FILE,
    LOGIT_COUNTS,
    LONGEST_ROW,
    OWN,
    PREFIX,
    ROW_LENS,
    TARGET_COUNTS,
)

__all__ = ["GRAPH_FILE", "stateless_widths", "write_stateless"]

DOC = f"""Scores candidate continuations, without a cache. All rows' values lie one behind the other.
Inputs: {SCORE_IDS.name} [tokens]; {BRANCH_IDS.name} [tokens] 0: prompt, 1 …: a candidate, -1: padding at a row's end;
{LOGIT_POSITIONS.name} [logits] where in its row a next token is predicted; {TARGET_LOGITS.name} [targets] which of its
row's predictions a target is read from; {TARGET_IDS.name} [targets] token ids; {ROW_LENS}, {LOGIT_COUNTS},
{TARGET_COUNTS} [batch, 1] how many of the values are each row's; {LONGEST_ROW} [seq_len]: its length alone counts.
Outputs: {TOKEN_LOG_PROBS.name} [targets]; {HIDDEN_STATE.name} [batch, hidden] where the first logits are."""
PREFIX_DOC = f"""
For each layer, inputs {PREFIX["keys"]}n, {PREFIX["values"]}n [1, kv_heads, prefix_len, head_dim] of a beginning that
all rows share and that isn't among their tokens; outputs {OWN["keys"]}n, {OWN["values"]}n [batch, kv_heads, seq_len,
head_dim]."""

INT32, INT64 = TensorProto.INT32, TensorProto.INT64
# What the graph with a cache says about positions, masks and last tokens; the prelude says it anew.
REPLACED = frozenset(
    ("seq_len_1d", "seq_len_scalar", "offsets", "start_column", "position_ids", "query_positions", "mask", "last_token",
     "last_token_index", "last_hidden")
)  # fmt: skip
RENAMED = {"input_ids": "token_line"}


def write_stateless(path: Path, output: Path, *, takes_prefix: bool = False) -> Path:
    """Write the scoring version of the graph at `path` to `output`, beside it, sharing its weight file.

    takes_prefix: with the inputs and outputs of PREFIX_DOC; Triton's own backends can't feed them.

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
    nodes = _Nodes()
    prefix = _Prefix(nodes, graph) if takes_prefix else None
    _layout(nodes, prefix)
    for node in graph.node:
        if node.op_type == "TensorScatter" or node.name in REPLACED:
            continue
        node.input[:] = [scatters.get(name, RENAMED.get(name, name)) for name in node.input]
        if node.op_type == "Attention":
            _attend(nodes, node, _head_shape(graph, "q"), prefix)
            continue
        if node.op_type == "RotaryEmbedding":
            # Padded already: its tables are no longer than one row may be, and a batch's tokens are more.
            node.input[0] = _padded(nodes, node.input[0])
        if "last_hidden" in node.input:
            _gather_logits(nodes, hidden)
        nodes.nodes.append(node)
    _read_targets(nodes)

    hidden_size = _hidden_size(graph)
    outputs = [
        helper.make_tensor_value_info(TOKEN_LOG_PROBS.name, TensorProto.FLOAT, ["targets"]),
        helper.make_tensor_value_info(HIDDEN_STATE.name, TensorProto.FLOAT, ["batch", hidden_size]),
    ]
    inputs = _inputs()
    if prefix is not None:
        inputs, outputs = inputs + prefix.inputs, outputs + prefix.outputs
    _replace(graph.node, _reachable(nodes.nodes, [value.name for value in outputs]))
    _replace(graph.input, inputs)
    _replace(graph.output, outputs)
    graph.initializer.extend(nodes.constants)
    used = {name for node in graph.node for name in node.input}
    _replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in used])
    del graph.value_info[:]
    model.doc_string = graph.doc_string = DOC if prefix is None else DOC + PREFIX_DOC
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

    def rows(self, values: str, counts: str) -> None:
        """Of a ragged input: `values`.row [n] each value's row, `counts`.starts and .sizes [batch] where rows lie."""
        flat = self.add("Squeeze", [counts, self.int([1])], f"{counts}.flat")
        sizes = self.add("Cast", [flat], f"{counts}.sizes", to=INT64)
        ends = self.add("CumSum", [sizes, self.int(0)], f"{counts}.ends")
        self.add("Sub", [ends, sizes], f"{counts}.starts")
        number = self.add("Squeeze", [self.add("Shape", [values], f"{values}.shape")], f"{values}.number")
        index = self.add("Range", [self.int(0), number, self.int(1)], f"{values}.index")
        column = self.add("Unsqueeze", [index, self.int([1])], f"{values}.column")
        line = self.add("Unsqueeze", [ends, self.int([0])], f"{counts}.line")
        is_behind = self.add("GreaterOrEqual", [column, line], f"{values}.is_behind")
        rows_before = self.add("Cast", [is_behind], f"{values}.rows_before", to=INT64)
        self.add("ReduceSum", [rows_before, self.int([1])], f"{values}.row", keepdims=0)

    def placed(self, own: str, rows: str, starts: str, name: str) -> str:
        """Places [n] within rows, `own`, as places among all rows' values."""
        first = self.add("Gather", [starts, rows], f"{name}.first")
        return self.add("Add", [first, self.add("Cast", [own], f"{name}.own", to=INT64)], name)


class _Prefix:
    """A beginning that all rows share: its keys and values stand before a row's own, and a row's own are given."""

    def __init__(self, nodes: _Nodes, graph: onnx.GraphProto) -> None:
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._nodes = nodes
        self._dtype = next(tensor.data_type for tensor in graph.initializer if tensor.name == "rope.cos")
        self._heads, self._head_dim = _head_shape(graph, "k")
        self._num_layers = 0
        self._count = nodes.add("Shape", [f"{PREFIX['keys']}0"], "prefix_len_1d", start=2, end=3)

    def positions(self, own: str) -> None:
        """`position_ids`: places among the rows' own tokens, behind the prefix."""
        self._nodes.add("Add", [own, self._count], "position_ids")

    def mask(self, seen: str) -> None:
        """`mask` [batch, 1, seq_len, prefix_len + seq_len]: every token sees the whole prefix."""
        add, ints = self._nodes.add, self._nodes.int
        batch = add("Shape", [ROW_LENS], "batch_1d", start=0, end=1)
        self._one_for_each = add("Concat", [batch, ints([1]), ints([1]), ints([1])], "one_for_each_row", axis=0)
        shape = add("Concat", [batch, ints([1]), "seq_len_1d", self._count], "prefix_mask_shape", axis=0)
        always = add("Equal", [ints(0), ints(0)], "always")
        add("Concat", [add("Expand", [always, shape], "prefix_mask"), seen], "mask", axis=3)

    def before(self, keys: str, values: str) -> tuple[str, str]:
        """The layer's keys and values [batch, kv_heads, prefix_len + seq_len, head_dim]."""
        layer, found = self._num_layers, []
        self._num_layers += 1
        for kind, own in (("keys", keys), ("values", values)):
            name, given = f"{PREFIX[kind]}{layer}", f"{OWN[kind]}{layer}"
            self._nodes.add("Identity", [own], given)
            rows = self._nodes.add("Expand", [name, self._one_for_each], f"{name}.rows")
            found.append(self._nodes.add("Concat", [rows, own], f"{name}.joined", axis=2))
            for value, tensors, sizes in (
                (name, self.inputs, (1, "prefix_len")),
                (given, self.outputs, ("batch", "seq_len")),
            ):
                shape = [sizes[0], self._heads, sizes[1], self._head_dim]
                tensors.append(helper.make_tensor_value_info(value, self._dtype, shape))
        return found[0], found[1]


def _layout(nodes: _Nodes, prefix: _Prefix | None) -> None:
    """Where each token lies, packed and padded, and what it sees.

    `token_line` [1, tokens]; `padded_places` [batch, seq_len] of packed tokens; `packed_places` [tokens] of padded
    ones; `position_ids` [batch, seq_len]; `mask` [batch, 1, seq_len, seq_len], behind a prefix's if there is one.
    """
    add, ints = nodes.add, nodes.int
    add("Unsqueeze", [SCORE_IDS.name, ints([0])], "token_line")
    nodes.rows(SCORE_IDS.name, ROW_LENS)
    lens, starts = f"{ROW_LENS}.sizes", f"{ROW_LENS}.starts"
    longest = add("Squeeze", [add("Shape", [LONGEST_ROW], "seq_len_1d")], "seq_len")
    line = add("Unsqueeze", [add("Range", [ints(0), longest, ints(1)], "offsets"), ints([0])], "offset_line")
    is_real = add("Less", [line, add("Unsqueeze", [lens, ints([1])], f"{ROW_LENS}.of_row")], "is_real")
    places = add("Add", [add("Unsqueeze", [starts, ints([1])], f"{ROW_LENS}.starts_column"), line], "places")
    places = add("Where", [is_real, places, ints(0)], "padded_places")
    rows = f"{SCORE_IDS.name}.row"
    columns = add("Sub", [f"{SCORE_IDS.name}.index", add("Gather", [starts, rows], "row_starts")], "columns")
    add("Add", [add("Mul", [rows, longest], "row_places"), columns], "packed_places")

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
    # A token's position is how many tokens it sees before itself.
    count = add("ReduceSum", [add("Cast", [seen], "seen64", to=INT64), ints([2])], "num_seen", keepdims=0)
    if prefix is None:
        add("Unsqueeze", [seen, ints([1])], "mask")
        add("Sub", [count, ints(1)], "position_ids")
    else:
        prefix.mask(add("Unsqueeze", [seen, ints([1])], "own_mask"))
        prefix.positions(add("Sub", [count, ints(1)], "own_positions"))


def _padded(nodes: _Nodes, heads: str) -> str:
    """heads [1, heads, tokens, d] laid out row by row: [batch, heads, seq_len, d]."""
    tokens = nodes.add("Squeeze", [heads, nodes.int([0])], f"{heads}.tokens")
    rows = nodes.add("Gather", [tokens, "padded_places"], f"{heads}.rows", axis=1)  # [heads, batch, seq_len, d]
    return nodes.add("Transpose", [rows], f"{heads}.padded", perm=[1, 0, 2, 3])


def _attend(nodes: _Nodes, attention: onnx.NodeProto, shape: tuple[int, int], prefix: _Prefix | None) -> None:
    """One attention: queries and keys are padded, the values not yet; what comes back is packed again."""
    add, ints = nodes.add, nodes.int
    num_heads, head_dim = shape
    queries, keys, values = attention.input[:3]
    (name,) = attention.output
    values = _padded(nodes, values)
    if prefix is not None:
        keys, values = prefix.before(keys, values)
    rows = add("Attention", [queries, keys, values, "mask"], f"{name}.padded")
    rows = add("Transpose", [rows], f"{name}.rows", perm=[1, 0, 2, 3])  # [heads, batch, seq_len, d]
    line = add("Reshape", [rows, ints([num_heads, -1, head_dim])], f"{name}.line")
    tokens = add("Gather", [line, "packed_places"], f"{name}.packed", axis=1)  # [heads, tokens, d]
    add("Unsqueeze", [tokens, ints([0])], name)


def _gather_logits(nodes: _Nodes, hidden: str) -> None:
    """`last_hidden` [logits, hidden]: the last layer's output where a next token is predicted."""
    nodes.rows(LOGIT_POSITIONS.name, LOGIT_COUNTS)
    places = nodes.placed(LOGIT_POSITIONS.name, f"{LOGIT_POSITIONS.name}.row", f"{ROW_LENS}.starts", "logit_places")
    nodes.add("Gather", [nodes.add("Squeeze", [hidden, nodes.int([0])], "hidden_line"), places], "last_hidden", axis=0)


def _read_targets(nodes: _Nodes) -> None:
    """The outputs, from `model.norm` [logits, hidden] and `logits` [logits, vocab_size]."""
    add = nodes.add
    log_probs = add("LogSoftmax", ["logits"], "vocabulary_log_probs", axis=-1)
    nodes.rows(TARGET_IDS.name, TARGET_COUNTS)
    logits = nodes.placed(TARGET_LOGITS.name, f"{TARGET_IDS.name}.row", f"{LOGIT_COUNTS}.starts", "target_places")
    ids = add("Cast", [TARGET_IDS.name], "target_ids64", to=INT64)
    columns = [add("Unsqueeze", [value, nodes.int([1])], f"{value}.column") for value in (logits, ids)]
    add("GatherND", [log_probs, add("Concat", columns, "target_pairs", axis=1)], TOKEN_LOG_PROBS.name)
    first = add("Gather", ["model.norm", f"{LOGIT_COUNTS}.starts"], "first_hidden")
    add("Cast", [first], HIDDEN_STATE.name, to=TensorProto.FLOAT)


def _inputs() -> list[onnx.ValueInfoProto]:
    ragged = {
        SCORE_IDS.name: "tokens", BRANCH_IDS.name: "tokens", LOGIT_POSITIONS.name: "logits",
        TARGET_LOGITS.name: "targets", TARGET_IDS.name: "targets", LONGEST_ROW: "seq_len",
    }  # fmt: skip
    inputs = [helper.make_tensor_value_info(name, INT32, [dim]) for name, dim in ragged.items()]
    counts = (ROW_LENS, LOGIT_COUNTS, TARGET_COUNTS)
    return inputs + [helper.make_tensor_value_info(name, INT32, ["batch", 1]) for name in counts]


def _head_shape(graph: onnx.GraphProto, kind: str) -> tuple[int, int]:
    """num_heads and head_dim: the queries ("q") or keys ("k") are split so."""
    split = next(node for node in graph.node if node.name.endswith(f"self_attn.{kind}_split"))
    shape = next(tensor for tensor in graph.initializer if tensor.name == split.input[1])
    _, _, num_heads, head_dim = numpy_helper.to_array(shape).tolist()
    return num_heads, head_dim


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
