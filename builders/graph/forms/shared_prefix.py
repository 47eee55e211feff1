"""A beginning that all rows of a scoring graph share: computed once, when the model is loaded."""

from __future__ import annotations

from deepseek_triton.builders.graph.forms.score_nodes import ScoreNodes
from deepseek_triton.ensemble.decoder.part import CacheTensor
from deepseek_triton.ensemble.scoring.rows import OWN, PREFIX, ROW_LENS


class SharedPrefix:
    """What is cached of it stands before a row's own; a row's own is an output.

    first: a tensor of the first layer's cache.
    """

    def __init__(self, nodes: ScoreNodes, dtype: int, first: CacheTensor) -> None:
        self._nodes, self._dtype = nodes, dtype
        self._outputs: list[tuple[str, list[int | str]]] = []
        self._count = nodes.add("Shape", [f"{PREFIX[first.kind]}0"], "prefix_len_1d", start=2, end=3)

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

    def before(self, layer: int, tensor: CacheTensor, own: str) -> str:
        """`own` behind the prefix's: [batch, num_heads, prefix_len + seq_len, head_dim]."""
        name, given = f"{PREFIX[tensor.kind]}{layer}", f"{OWN[tensor.kind]}{layer}"
        self._nodes.add("Identity", [own], given)
        rows = self._nodes.add("Expand", [name, self._one_for_each], f"{name}.rows")
        self._nodes.g.input(name, self._dtype, [1, tensor.num_heads, "prefix_len", tensor.head_dim])
        self._outputs.append((given, ["batch", tensor.num_heads, "seq_len", tensor.head_dim]))
        return self._nodes.add("Concat", [rows, own], f"{name}.joined", axis=2)

    def finish(self) -> None:
        """Declare the outputs: what is cached of a row."""
        for name, shape in self._outputs:
            self._nodes.g.output(name, self._dtype, shape)
