"""Run a decoder one layer at a time: hidden states in, hidden states and taps out.

Calibration, compensation and evaluation need every layer's inputs but never the whole model at once. Each layer becomes
a graph of its own, runs over all windows, and is dropped. Peak memory is one layer and the windows' hidden states.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.graph.decoder import build_layer
from deepseek_triton.builders.graph.nodes import Float8Layers, Read
from deepseek_triton.ensemble.decoder.spec import ModelSpec, layer_prefix

Float32 = NDArray[np.float32]
Ids = NDArray[np.int64]


def runnable_opset() -> int:
    """The newest opset that the installed ONNX Runtime runs: 24 from release 1.24 on, else 23."""
    import onnxruntime as ort

    major, minor = (int(part) for part in ort.__version__.split(".")[:2])
    return 24 if (major, minor) >= (1, 24) else 23


class LayerSession:
    """One decoder layer in float32 on ONNX Runtime's CPU provider; each window is one sequence."""

    def __init__(self, path: Path, spec: ModelSpec, layer: int, max_seq_len: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3  # else it warns about each cache that is not updated in place
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leaves the cores to NumPy
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._prefix = layer_prefix(layer)
        self._feeds: dict[str, Any] = {"start": np.zeros(1, np.int64)}
        for tensor in (tensor for part in spec.parts(layer) for tensor in part.cache):
            cache = np.zeros((1, tensor.num_heads, max_seq_len, tensor.head_dim), np.float32)
            self._feeds[f"past_{tensor.kind}_{layer}"] = cache

    def run(self, hidden: Float32, outputs: Sequence[str] = ()) -> tuple[Float32, ...]:
        """hidden [seq_len, hidden] of one window → the layer's output, then `outputs`, each [seq_len, width]."""
        names = [self._prefix + name for name in ("mlp_residual", *outputs)]
        values = self._session.run(names, self._feeds | {"hidden": hidden[None]})
        return tuple(value[0] for value in values)


@contextlib.contextmanager
def layer_session(
    spec: ModelSpec,
    layer: int,
    read: Read,
    *,
    max_seq_len: int,
    quantized: Float8Layers | None = None,
    outputs: Sequence[str] = (),
) -> Iterator[LayerSession]:
    """Build one decoder layer and open it for running.

    Args:
        read: returns a float weight of the layer by its name.
        max_seq_len: tokens in the longest window.
        quantized: returns a module in FP8, or None, as for `build_graph`.
        outputs: values that `run` can return besides the layer's output, without the layer's prefix.
    """
    with tempfile.TemporaryDirectory(prefix="deepseek-triton-layer-") as directory:
        names = [layer_prefix(layer) + name for name in outputs]
        path = build_layer(
            spec, layer, read, Path(directory),
            max_seq_len=max_seq_len, opset=runnable_opset(), quantized=quantized, outputs=names,
        )  # fmt: skip
        yield LayerSession(path, spec, layer, max_seq_len)


def embed(embedding: NDArray[Any], windows: Sequence[Ids]) -> list[Float32]:
    """The first layer's input of each window: [seq_len, hidden] float32."""
    return [np.asarray(embedding[window], np.float32) for window in windows]


def final_norm(hidden: Float32, weight: NDArray[Any], eps: float) -> Float32:
    """RMS norm before the head: [seq_len, hidden]."""
    mean_square = np.mean(np.square(hidden), axis=-1, keepdims=True, dtype=np.float32)
    normed: Float32 = hidden / np.sqrt(mean_square + np.float32(eps)) * np.asarray(weight, np.float32)
    return normed
