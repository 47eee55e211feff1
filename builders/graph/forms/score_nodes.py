"""The nodes of a scoring graph: small integer constants of its own, and ragged inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from deepseek_triton.builders.graph.builder import GraphBuilder

INT64 = TensorProto.INT64


class ScoreNodes:
    """Adds nodes to one graph; its constants are added at the end, by `finish`."""

    def __init__(self, graph: GraphBuilder) -> None:
        self.g = graph
        self._constants: dict[str, NDArray[Any]] = {}

    def add(self, op_type: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """A node with one output, called like the node."""
        return self.g.node(op_type, inputs, name, **attributes)

    def int(self, value: int | list[int]) -> str:
        """A shared INT64 constant, a scalar or [n]."""
        name = f"score_int_{value}".replace("[", "v").replace("]", "").replace("-", "m").replace(", ", "_")
        self._constants[name] = np.asarray(value, np.int64)
        return name

    def finish(self) -> None:
        """Add the constants."""
        for name, value in self._constants.items():
            self.g.constant(name, value)

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
