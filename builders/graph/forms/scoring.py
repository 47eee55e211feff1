"""Sequences without a cache: one pass over whole rows that scores candidate continuations.

A row is a prompt and, after it, branches: the tokens of each candidate but its last. A token sees the prompt and its
own branch, so the prompt is computed once for all candidates. Rows arrive unpadded, one behind the other, as Triton
concatenates ragged requests, and stay so: attention alone pads them, to the longest of the batch and no further. A
graph for a CPU also takes the keys and values of a beginning that all rows share, and gives those of its rows.
"""

from __future__ import annotations

from onnx import TensorProto

from deepseek_triton.builders.graph.forms.score_nodes import ScoreNodes
from deepseek_triton.builders.graph.forms.shared_prefix import SharedPrefix
from deepseek_triton.builders.graph.node_list import Body
from deepseek_triton.builders.graph.nodes import DecoderNodes
from deepseek_triton.builders.graph.sequences import Heads
from deepseek_triton.ensemble.decoder.gqa import GroupedQueryAttention
from deepseek_triton.ensemble.decoder.part import CacheTensor
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
    LOGIT_COUNTS,
    LONGEST_ROW,
    ROW_LENS,
    TARGET_COUNTS,
)

DOC = f"""Scores candidate continuations, without a cache. All rows' values lie one behind the other.
Inputs: {SCORE_IDS.name} [tokens]; {BRANCH_IDS.name} [tokens] 0: prompt, 1 …: a candidate, -1: padding at a row's end;
{LOGIT_POSITIONS.name} [logits] where in its row a next token is predicted; {TARGET_LOGITS.name} [targets] which of its
row's predictions a target is read from; {TARGET_IDS.name} [targets] token ids; {ROW_LENS}, {LOGIT_COUNTS},
{TARGET_COUNTS} [batch, 1] how many of the values are each row's; {LONGEST_ROW} [seq_len]: its length alone counts.
Outputs: {TOKEN_LOG_PROBS.name} [targets]; {HIDDEN_STATE.name} [batch, hidden] where the first logits are."""
PREFIX_DOC = """
For each layer n and kind of cache, inputs prefix_KIND_n [1, num_heads, prefix_len, head_dim] of a beginning that all
rows share and that isn't among their tokens; outputs row_KIND_n [batch, num_heads, seq_len, head_dim]."""

INT32, INT64 = TensorProto.INT32, TensorProto.INT64
RAGGED = {
    SCORE_IDS.name: "tokens", BRANCH_IDS.name: "tokens", LOGIT_POSITIONS.name: "logits",
    TARGET_LOGITS.name: "targets", TARGET_IDS.name: "targets", LONGEST_ROW: "seq_len",
}  # fmt: skip


class ScoringRows:
    """Implements `Sequences`. takes_prefix: with the inputs and outputs of PREFIX_DOC; Triton's own backends can't
    feed them.
    """

    fuses_attention = False

    def __init__(self, nodes: DecoderNodes, *, takes_prefix: bool) -> None:
        self._nodes, self._score = nodes, ScoreNodes(nodes.g)
        first = nodes.spec.parts(0)[0].cache[0]
        self._places: str | None = None  # of the tokens that predict, among all
        self._prefix = SharedPrefix(self._score, nodes.onnx_dtype, first) if takes_prefix else None

    @property
    def doc(self) -> str:
        """The graph's own documentation."""
        return DOC if self._prefix is None else DOC + PREFIX_DOC

    def begin(self) -> str:
        """Where each token lies, packed and padded, and what it sees.

        `token_line` [1, tokens]; `padded_places` [batch, seq_len] of packed tokens; `packed_places` [tokens] of padded
        ones; `position_ids` [batch, seq_len]; `mask` [batch, 1, seq_len, seq_len], behind a prefix's if there is one.
        """
        for name, dim in RAGGED.items():
            self._nodes.g.input(name, INT32, [dim])
        for name in (ROW_LENS, LOGIT_COUNTS, TARGET_COUNTS):
            self._nodes.g.input(name, INT32, ["batch", 1])
        self._nodes.rope_tables()
        nodes, prefix = self._score, self._prefix
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
        return "token_line"

    def rows(self, heads: str) -> str:
        """heads [1, heads, tokens, d] laid out row by row: [batch, heads, seq_len, d]."""
        tokens = self._score.add("Squeeze", [heads, self._score.int([0])], f"{heads}.tokens")
        rows = self._score.add(
            "Gather", [tokens, "padded_places"], f"{heads}.rows", axis=1
        )  # [heads, batch, seq_len, d]
        return self._score.add("Transpose", [rows], f"{heads}.padded", perm=[1, 0, 2, 3])

    def rotated(self, heads: str, name: str) -> str:
        # Of rows: its tables are no longer than one row may be, and a batch's tokens are more.
        return self._score.add("RotaryEmbedding", [self.rows(heads), "rope.cos", "rope.sin", "position_ids"], name)

    def remembered(self, layer: int, tensor: CacheTensor, rows: str) -> str:
        return rows if self._prefix is None else self._prefix.before(layer, tensor, rows)

    def grouped_query(self, layer: int, part: GroupedQueryAttention, qkv: tuple[str, ...], name: str) -> str:
        raise NotImplementedError("attention has nodes of its own here")

    def by_length(self, most: int, few: Body, many: Body, name: str) -> str:
        return self._score.add("Identity", [many()], name)

    def chosen(self, scores: Body, topk: int, name: str) -> str:
        raise NotImplementedError("rows are no longer than what an indexer chooses")

    def attention(
        self, heads: Heads, qkv: tuple[str, str, str], name: str, scale: float | None = None, mask: str | None = None
    ) -> str:
        """What comes back is packed again."""
        add, ints = self._score.add, self._score.int
        scaled = {} if scale is None else {"scale": scale}
        rows = add("Attention", [*qkv, "mask"], f"{name}.padded", **scaled)
        rows = add("Transpose", [rows], f"{name}.rows", perm=[1, 0, 2, 3])  # [heads, batch, seq_len, d]
        line = add("Reshape", [rows, ints([heads.num_heads, -1, heads.head_dim])], f"{name}.line")
        tokens = add("Gather", [line, "packed_places"], f"{name}.packed", axis=1)  # [heads, tokens, d]
        return add("Unsqueeze", [tokens, ints([0])], name)

    def needed(self, layer: int, value: str) -> str:
        """Behind the last layer's attention nothing is asked of tokens that don't predict: [1, logits, width]."""
        if layer + 1 < self._nodes.spec.num_layers:
            return value
        if self._places is None:
            nodes, name = self._score, LOGIT_POSITIONS.name
            nodes.rows(name, LOGIT_COUNTS)
            self._places = nodes.placed(name, f"{name}.row", f"{ROW_LENS}.starts", "logit_places")
        return self._score.add("Gather", [value, self._places], f"{value}.needed", axis=1)

    def predicting(self, hidden: str) -> str:
        """`last_hidden` [logits, hidden]."""
        return self._score.add("Squeeze", [hidden, self._score.int([0])], "last_hidden")

    def with_logits(self, hidden: str) -> str:
        """All, or none where no row has a target: the head is as large as many layers. A plan has targets always."""
        if self._prefix is None:
            return hidden
        add, zero = self._score.add, self._score.int([0])
        counts = [add("Shape", [name], f"{name}.count") for name in (TARGET_IDS.name, LOGIT_POSITIONS.name)]
        return add("Slice", [hidden, zero, add("Mul", counts, "logits_end"), zero], "hidden_with_logits")

    def finish(self, logits: str) -> None:
        """From `model.norm` [logits, hidden] and the logits [logits, vocab_size]: the outputs."""
        nodes, add = self._score, self._score.add
        logits = add("Cast", [logits], "logits", to=TensorProto.FLOAT)
        log_probs = add("LogSoftmax", [logits], "vocabulary_log_probs", axis=-1)
        nodes.rows(TARGET_IDS.name, TARGET_COUNTS)
        rows = nodes.placed(TARGET_LOGITS.name, f"{TARGET_IDS.name}.row", f"{LOGIT_COUNTS}.starts", "target_places")
        ids = add("Cast", [TARGET_IDS.name], "target_ids64", to=INT64)
        columns = [add("Unsqueeze", [value, nodes.int([1])], f"{value}.column") for value in (rows, ids)]
        add("GatherND", [log_probs, add("Concat", columns, "target_pairs", axis=1)], TOKEN_LOG_PROBS.name)
        first = add("Gather", ["model.norm", f"{LOGIT_COUNTS}.starts"], "first_hidden")
        add("Cast", [first], HIDDEN_STATE.name, to=TensorProto.FLOAT)
        self._nodes.g.output(TOKEN_LOG_PROBS.name, TensorProto.FLOAT, ["targets"])
        self._nodes.g.output(HIDDEN_STATE.name, TensorProto.FLOAT, ["batch", self._nodes.spec.hidden_size])
        if self._prefix is not None:
            self._prefix.finish()
        nodes.finish()
