"""Graphs for the TensorRT builder's tests: one random layer of any size, and a plain round-to-nearest FP8
version."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from builders.graph.decoder import build_graph
from builders.spec import ModelSpec

E4M3_MAX = 448.0


def small_spec(**changes: Any) -> ModelSpec:
    """Two layers that build in seconds; head_dim is one that TensorRT has fused attention for."""
    values: dict[str, Any] = {
        "architecture": "llama", "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256,
        "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256, "tie_word_embeddings": False, "qkv_bias": False, "qk_norm": False,
    }  # fmt: skip
    return ModelSpec(**{**values, **changes})


def qwen_layer(hidden: int, intermediate: int, heads: int, kv_heads: int, vocab_size: int = 1024) -> ModelSpec:
    """One layer of a DeepSeek-R1-Distill-Qwen; head and embedding small, which no layer's kernels depend
    on."""
    return small_spec(
        architecture="qwen2", vocab_size=vocab_size, hidden_size=hidden, intermediate_size=intermediate,
        num_layers=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=128, max_position_embeddings=131072, qkv_bias=True,
    )  # fmt: skip


def random_weights(spec: ModelSpec) -> Callable[[str], NDArray[Any]]:
    """Weights of the right shapes; large ones repeat one random row, because gigabytes of random numbers take
    a minute."""
    random = np.random.default_rng(0)

    def read(name: str) -> NDArray[Any]:
        shape = spec.tensor_shapes()[name]
        if math.prod(shape) < 2**20:
            return random.normal(1.0 if "norm" in name else 0.0, 0.1, shape).astype(np.float16)
        row = random.normal(0, 0.02, shape[-1]).astype(np.float16)
        return np.broadcast_to(row, shape)

    return read


def linear_modules(spec: ModelSpec) -> list[str]:
    """Every linear layer but the head, by Hugging Face's name."""
    suffix = "_proj.weight"
    return [name.removesuffix(".weight") for name in spec.tensor_shapes() if name.endswith(suffix)]


def write_graph(spec: ModelSpec, directory: Path, **options: Any) -> Path:
    """The decoder's graph with random weights."""
    directory.mkdir(parents=True, exist_ok=True)
    return build_graph(spec, random_weights(spec), directory, **{"max_seq_len": 256, "precision": "fp16", **options})


def quantize_to_nearest(path: Path, directory: Path, keep: tuple[str, ...] = ("lm_head",)) -> Path:
    """The float16 graph at `path` with FP8 weights per output channel and one static scale for each
    activation."""
    directory.mkdir(parents=True, exist_ok=True)
    model = onnx.load(path)
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    graph.initializer.append(numpy_helper.from_array(np.array(0.02, np.float16), "activation_scale"))
    graph.initializer.append(helper.make_tensor("fp8_zero", TensorProto.FLOAT8E4M3FN, [], [0.0]))
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights and not node.name.startswith(keep):
            weight = weights[node.input[1]]
            value = numpy_helper.to_array(weight)  # [in, out]
            scale = (np.abs(value).max(axis=0).astype(np.float32) / E4M3_MAX).astype(np.float16)
            codes = (value / scale).astype(ml_dtypes.float8_e4m3fn)
            name = weight.name
            weight.CopyFrom(TensorProto(name=name, data_type=TensorProto.FLOAT8E4M3FN, dims=value.shape))
            weight.raw_data = codes.tobytes()
            graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
            quantized, activation, dequantized = f"{node.name}.q", f"{node.name}.dq", f"{name}.dq"
            nodes += [
                helper.make_node(
                    "QuantizeLinear", [node.input[0], "activation_scale", "fp8_zero"], [quantized], quantized
                ),
                helper.make_node("DequantizeLinear", [quantized, "activation_scale"], [activation], activation),
                helper.make_node("DequantizeLinear", [name, f"{name}.scale"], [dequantized], dequantized, axis=1),
            ]
            node.input[:] = [activation, dequantized]
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    target = directory / "model.onnx"
    onnx.save(model, target, save_as_external_data=True, location="model.onnx.data")
    return target
