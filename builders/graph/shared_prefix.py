"""A beginning that all rows of a scoring graph share: computed once, when the model is loaded."""

from __future__ import annotations

from deepseek_triton.builders.graph.score_nodes import ScoreNodes
from deepseek_triton.ensemble.decoder.gqa import GroupedQueryAttention
from deepseek_triton.ensemble.scoring.rows import OWN, PREFIX, ROW_LENS


class SharedPrefix:
    """Its keys and values stand before a row's own; a row's own keys and values are outputs."""

    def __init__(self, nodes: ScoreNodes, dtype: int) -> None:
        self._nodes, self._dtype = nodes, dtype
        self._outputs: list[tuple[str, list[int | str]]] = []
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

    def before(self, layer: int, part: GroupedQueryAttention, keys: str, values: str) -> list[str]:
        """The layer's keys and values [batch, kv_heads, prefix_len + seq_len, head_dim]."""
        found = []
        for kind, own in (("keys", keys), ("values", values)):
            name, given = f"{PREFIX[kind]}{layer}", f"{OWN[kind]}{layer}"
            self._nodes.add("Identity", [own], given)
            rows = self._nodes.add("Expand", [name, self._one_for_each], f"{name}.rows")
            found.append(self._nodes.add("Concat", [rows, own], f"{name}.joined", axis=2))
            self._nodes.g.input(name, self._dtype, [1, part.num_kv_heads, "prefix_len", part.head_dim])
            self._outputs.append((given, ["batch", part.num_kv_heads, "seq_len", part.head_dim]))
        return found

    def finish(self) -> None:
        """Declare the outputs: a row's own keys and values."""
        for name, shape in self._outputs:
            self._nodes.g.output(name, self._dtype, shape)
