"""NodeList: nodes one by one, of a graph or of a function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators

Body = Callable[[], str]
LoopBody = Callable[[str, str], str]


class NodeList(ABC):
    """Collects nodes, subgraphs among them; what a constant is, a graph and a function know."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._ints: dict[tuple[int, ...], str] = {}

    @abstractmethod
    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Add a small constant."""

    def node(self, op_type: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Add a node with one output, called like the node."""
        self.nodes(op_type, inputs, [name], name, **attributes)
        return name

    def nodes(self, op_type: str, inputs: Sequence[str], outputs: Sequence[str], name: str, **attributes: Any) -> None:
        """Add a node with the outputs named."""
        self._nodes.append(helper.make_node(op_type, list(inputs), list(outputs), name=name, **attributes))

    def branch(self, condition: str, few: Body, many: Body, name: str) -> str:
        """Add an If node: `few` adds the nodes that run where the BOOL scalar `condition` is true, `many` the others.

        Each gives the name of its value; both see what stands before the node. The node's value is called `name`.
        """
        graphs = {
            attribute: self._subgraph(f"{name}.{attribute}", (), lambda body=body: [body()])  # type: ignore[misc]
            for attribute, body in (("then_branch", few), ("else_branch", many))
        }
        return self.node("If", [condition], name, **graphs)

    def loop(self, count: str, start: str, dtype: int, shape: Sequence[int | str], body: LoopBody, name: str) -> str:
        """Add a Loop node of `count` steps over one value, at first `start`; its last value is called `name`.

        body: adds the nodes of a step, from the names of the step's number (INT64 scalar) and of the value, and gives
        the name of the new value. dtype, shape: of the value.
        """
        step, going, value = f"{name}.step", f"{name}.is_going", f"{name}.value"
        inputs = (
            helper.make_tensor_value_info(step, TensorProto.INT64, []),
            helper.make_tensor_value_info(going, TensorProto.BOOL, []),
            helper.make_tensor_value_info(value, dtype, shape),
        )

        def add() -> list[str]:
            new = body(step, value)
            return [self.node("Identity", [going], f"{name}.goes_on"), new]

        graph = self._subgraph(f"{name}.body", inputs, add)
        return self.node("Loop", [count, "", start], name, body=graph)

    def _subgraph(
        self, name: str, inputs: Sequence[onnx.ValueInfoProto], add: Callable[[], list[str]]
    ) -> onnx.GraphProto:
        outer, self._nodes = self._nodes, []
        outputs = [onnx.ValueInfoProto(name=output) for output in add()]
        nodes, self._nodes = self._nodes, outer
        return helper.make_graph(nodes, name, inputs, outputs)

    def int(self, value: int | list[int]) -> str:
        """A shared INT64 constant, a scalar or [n]."""
        array = np.asarray(value, dtype=np.int64)
        key = (array.ndim, *array.reshape(-1).tolist())
        if key not in self._ints:
            self._ints[key] = self.constant("int_" + "_".join(map(str, key)).replace("-", "m"), array)
        return self._ints[key]


class FunctionNodes(NodeList):
    """A function's body: a constant is a node, which stands before all others."""

    def __init__(self) -> None:
        super().__init__()
        self._constants: list[onnx.NodeProto] = []

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Add a small constant."""
        self._constants.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value)))
        return name

    def attribute(self, name: str) -> str:
        """The function's attribute `name`, INT64s, as a value of that name."""
        self._constants.append(pass_on(helper.make_node("Constant", [], [name]), value_ints=name))
        return name

    @property
    def last(self) -> onnx.NodeProto:
        """The newest node."""
        return self._nodes[-1]

    def function(
        self, domain: str, name: str, inputs: Sequence[str], output: str, attributes: Sequence[str], opset: int
    ) -> onnx.FunctionProto:
        """The function that these nodes are, of ONNX's operators and of ONNX Runtime's own."""
        imports = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
        nodes = [*self._constants, *self._nodes]
        return helper.make_function(domain, name, list(inputs), [output], nodes, imports, list(attributes))


def pass_on(node: onnx.NodeProto, **names: str) -> onnx.NodeProto:
    """The node, whose attributes on the left are the function's on the right: whole numbers, `value_ints` lists."""
    for name, source in names.items():
        kind = onnx.AttributeProto.INTS if name == "value_ints" else onnx.AttributeProto.INT
        node.attribute.add(name=name, ref_attr_name=source, type=kind)
    return node
