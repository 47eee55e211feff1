"""Read an artefact's weights back from model.onnx and its data file, for evaluation.

A graph that graph/decoder.py wrote, in any precision, enters; each weight as float32 and each FP8 layer as stored
leave. Names are those of the checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.graph.float8 import Float8Linear
from deepseek_triton.ensemble.decoder.spec import ModelSpec


class ArtefactError(BuildError):
    """The artefact is missing, unreadable, or not one that this project wrote."""


class Artefact:
    """The initialisers of a model.onnx, by name.

    num_bytes: size of model.onnx and model.onnx.data.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            graph = onnx.load(path, load_external_data=False).graph
            self.num_bytes = path.stat().st_size + path.with_name(path.name + ".data").stat().st_size
        except OSError as error:
            raise ArtefactError(f"{error.filename or path}: {error.strerror}") from error
        except Exception as error:  # protobuf raises its own DecodeError
            raise ArtefactError(f"{path} is not an ONNX graph: {error}") from error
        self._tensors: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self._inputs: dict[str, str] = {node.input[1]: node.input[0] for node in graph.node if node.op_type == "MatMul"}
        if "model.embed_tokens.weight" not in self._tensors:
            raise ArtefactError(f"{path} is not a decoder graph of this project: it has no model.embed_tokens.weight")

    def check(self, spec: ModelSpec) -> None:
        """Check that every weight of `spec` is here, in its shape.

        Raises:
            ArtefactError: one is missing or has another shape; the artefact was built from another checkpoint.
        """
        for name, shape in spec.tensor_shapes().items():
            found = tuple(self._tensor(name).dims)
            if found not in (shape, shape[::-1]):
                raise ArtefactError(f"{self.path}: {name} has shape {list(found)}: not built from this checkpoint")

    def read(self, name: str) -> NDArray[np.float32]:
        """A weight [out, in] (as in the checkpoint) as float32; FP8 ones dequantised."""
        module = name.removesuffix(".weight")
        linear = self.quantized(module)
        if linear is not None and name.endswith(".weight"):
            return linear.dequantized()
        array = self._array(name)
        is_transposed = name.endswith(".weight") and array.ndim == 2 and name != "model.embed_tokens.weight"
        return np.asarray(array.T if is_transposed else array, np.float32)

    def quantized(self, module: str) -> Float8Linear | None:
        """A linear layer as it is stored, or None where it is not FP8."""
        name = f"{module}.weight"
        if self._tensor(name).data_type != TensorProto.FLOAT8E4M3FN:
            return None
        # With dynamic scales the stored scale is 1. The constant min_token_scale is only in such graphs.
        is_dynamic = "min_token_scale" in self._tensors
        input_scale = None if is_dynamic else float(self._array(f"{self._input(module)}.input_scale"))
        bias = self._array(f"{module}.bias") if f"{module}.bias" in self._tensors else None
        return Float8Linear(
            self._array(name).T,
            np.asarray(self._array(f"{module}.weight_scale"), np.float32),
            input_scale,
            None if bias is None else np.asarray(bias, np.float32),
        )

    def stored_bytes(self, module: str) -> int:
        """Bytes of the module's weight and its scales."""
        names = (f"{module}.weight", f"{module}.weight_scale")
        return sum(_num_bytes(self._tensors[name]) for name in names if name in self._tensors)

    def precision_of(self, module: str) -> str:
        """ONNX's name of the weight's dtype: FLOAT8E4M3FN, FLOAT16 or FLOAT."""
        return str(TensorProto.DataType.Name(self._tensor(f"{module}.weight").data_type))

    def _input(self, module: str) -> str:
        """Name of the value that an FP8 layer reads, before it is rounded."""
        rounded = self._inputs.get(f"{module}.weight.dequantized")
        if rounded is None:
            raise ArtefactError(f"{self.path} has no matrix product of {module}.weight: not a graph of this project")
        return rounded.removesuffix(".dequantized")

    def _tensor(self, name: str) -> TensorProto:
        if name not in self._tensors:
            raise ArtefactError(f"{self.path} has no {name}: not built from this checkpoint")
        return self._tensors[name]

    def _array(self, name: str) -> NDArray[Any]:
        tensor = self._tensor(name)
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        place = {entry.key: entry.value for entry in tensor.external_data}
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        file = self.path.with_name(place["location"])
        with file.open("rb") as stream:
            stream.seek(int(place["offset"]))
            array = np.fromfile(stream, np.uint8, int(place["length"]))
        if array.size != int(place["length"]):
            raise ArtefactError(f"{file} ends inside {name}; build it again")
        return array.view(dtype).reshape(tuple(tensor.dims))


def _num_bytes(tensor: TensorProto) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
