"""GraphBuilder: nodes one by one into an ONNX graph, weights straight into its external data file.

It knows ONNX's protobuf and files; it knows nothing about transformers. A weight is written when it is added and then
forgotten, so a build holds no more than the tensors its caller holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from deepseek_triton.builders.errors import CheckpointError
from deepseek_triton.builders.graph.node_list import NodeList

ALIGNMENT = 4096  # bytes; a page, so that a runtime can map each tensor
BLOCK_BYTES = 64 * 2**20  # converted and written at a time
IR_VERSIONS = {23: 11, 24: 12}  # opset → the ONNX IR version it came with

Progress = Callable[[int], None]
Function = Callable[[int], onnx.FunctionProto]  # from the opset of its operators


class GraphBuilder(NodeList):
    """Collects nodes, inputs and outputs; owns the external data file until `finish`."""

    def __init__(
        self, directory: Path, name: str, *, opset: int, file: str = "", progress: Progress | None = None
    ) -> None:
        """name: of the graph and of `name.onnx.data`; file: of the graph's file, if it isn't `name.onnx`."""
        super().__init__()
        self.opset, self._name = opset, name
        self._path = directory / (file or f"{name}.onnx")
        self._data_name = f"{name}.onnx.data"
        # A new file, not the old one cut short: a session that maps the old one's pages would be killed by SIGBUS.
        (directory / self._data_name).unlink(missing_ok=True)
        self._data = (directory / self._data_name).open("wb")
        self._progress = progress
        self._functions: dict[Function, onnx.FunctionProto] = {}
        self._initializers: list[TensorProto] = []
        self._names: set[str] = set()
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def __enter__(self) -> GraphBuilder:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._data.close()

    def input(self, name: str, dtype: int, shape: Sequence[int | str], doc: str = "") -> str:
        """Declare a graph input; a str in `shape` is a dynamic dimension."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape, doc_string=doc))
        return name

    def output(self, name: str, dtype: int, shape: Sequence[int | str], doc: str = "") -> None:
        """Declare that the value called `name` leaves the graph."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape, doc_string=doc))

    def function(self, make: Function) -> None:
        """Define an operator by others, once; a runtime that has a kernel for it takes that instead."""
        if make not in self._functions:
            self._functions[make] = make(self.opset)

    def has(self, name: str) -> bool:
        """Is there a constant or weight called `name`?"""
        return name in self._names

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Add a small constant, stored inside the graph file."""
        self._initializers.append(numpy_helper.from_array(value, name))
        self._names.add(name)
        return name

    def weight(self, name: str, value: NDArray[Any], dtype: np.dtype[Any], *, transpose: bool = False) -> str:
        """Write a tensor to the external data file as `dtype`, a 2-D one transposed if asked.

        Args:
            value: the tensor; converted block by block, so that no whole copy of it is made.

        Raises:
            CheckpointError: it holds NaN or infinity, or a number that `dtype` can't hold.
        """
        shape = value.shape[::-1] if transpose else value.shape
        return self._stored(name, shape, dtype, [value.T if transpose else value])

    def stack(self, name: str, values: Iterable[NDArray[Any]], shape: Sequence[int], dtype: np.dtype[Any]) -> str:
        """Write arrays one behind the other as one tensor [len(values), …] of `shape`; one is in memory at a time.

        Raises:
            CheckpointError: as `weight`.
        """
        return self._stored(name, shape, dtype, values)

    def _stored(self, name: str, shape: Sequence[int], dtype: np.dtype[Any], sources: Iterable[NDArray[Any]]) -> str:
        offset = self._data.tell() + -self._data.tell() % ALIGNMENT
        self._data.seek(offset)
        for source in sources:
            self._write(name, source, dtype)
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(dtype), dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        length = self._data.tell() - offset
        for key, text in (("location", self._data_name), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=text)
        self._initializers.append(tensor)
        self._names.add(name)
        return name

    def _write(self, name: str, source: NDArray[Any], dtype: np.dtype[Any]) -> None:
        rows = max(1, BLOCK_BYTES // max(1, source[:1].size * dtype.itemsize))
        for start in range(0, len(source), rows):
            with np.errstate(over="ignore"):
                block = np.ascontiguousarray(source[start : start + rows], dtype=dtype)
            if dtype.kind == "f" and not np.isfinite(block).all():
                what = (
                    "the checkpoint is corrupt" if dtype.itemsize > 2 else "corrupt, or too large: try --precision fp32"
                )
                raise CheckpointError(f"{name} holds numbers that are not finite as {dtype.name}; {what}")
            self._data.write(block.view(np.uint8).data)
            if self._progress:
                self._progress(block.nbytes)

    def finish(self, *, producer: str, version: str, doc: str) -> Path:
        """Write the graph beside its data and check it, types and shapes included.

        Nodes of other domains than ONNX's own are checked by the runtime that has them.

        Raises:
            onnx.checker.ValidationError, onnx.shape_inference.InferenceError: the graph is malformed.
        """
        self._data.close()
        nodes = self._needed_nodes()
        used = {name for node in nodes for name in names_read(node)}
        initializers = [tensor for tensor in self._initializers if tensor.name in used]
        domains = {node.domain for node in nodes}
        domains |= {opset.domain for function in self._functions.values() for opset in function.opset_import}
        graph = helper.make_graph(nodes, self._name, self._inputs, self._outputs, initializers, doc_string=doc)
        model = helper.make_model(
            graph,
            producer_name=producer,
            producer_version=version,
            doc_string=doc,
            ir_version=IR_VERSIONS[self.opset],
            opset_imports=[
                helper.make_opsetid("", self.opset),
                *(helper.make_opsetid(domain, 1) for domain in sorted(domains - {""})),
            ],
        )
        onnx.save(model, self._path)
        onnx.checker.check_model(str(self._path), full_check=True)
        if self._functions:  # without them their nodes are of a domain that isn't ONNX's: nothing is inferred of those
            model.functions.extend(self._functions.values())
            onnx.save(model, self._path)
            onnx.checker.check_model(str(self._path))
        return self._path

    def _needed_nodes(self) -> list[onnx.NodeProto]:
        """The nodes that the outputs need, in their order; they were added in topological order."""
        needed, kept = {value.name for value in self._outputs}, []
        for node in reversed(self._nodes):
            if needed & set(node.output):
                needed |= names_read(node)
                kept.append(node)
        return kept[::-1]


def names_read(node: onnx.NodeProto) -> set[str]:
    """The names of all values that a node reads, in its subgraphs too."""
    names = set(node.input)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            names |= {name for inner in attribute.g.node for name in names_read(inner)}
            names |= {output.name for output in attribute.g.output}  # a branch may give what stands before the node
    return names
