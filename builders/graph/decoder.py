"""ModelSpec + weights → one ONNX graph, part by part.

The graph of a decoder that generates has an in-place KV cache (forms/cached.py), that of one that scores has none
(forms/scoring.py); the layers are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.graph.builder import GraphBuilder, Progress
from deepseek_triton.builders.graph.forms.cached import CachedSequences, Logits
from deepseek_triton.builders.graph.forms.filled import FilledSequences
from deepseek_triton.builders.graph.forms.fused import FusedSequences, can_fuse
from deepseek_triton.builders.graph.forms.scoring import ScoringRows
from deepseek_triton.builders.graph.nodes import DecoderNodes, Quantized, Read
from deepseek_triton.builders.graph.parts import PARTS
from deepseek_triton.builders.graph.sequences import Sequences
from deepseek_triton.ensemble.decoder.spec import ModelSpec
from deepseek_triton.ensemble.scoring.rows import GRAPH_FILE

PRODUCER = "deepseek-triton"
DTYPES: dict[str, np.dtype[Any]] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}


@dataclass(frozen=True)
class ScoringMode:
    """A graph without a cache. takes_prefix: it also takes the keys and values of a beginning that all rows share."""

    takes_prefix: bool = False


def build_graph(
    spec: ModelSpec,
    read: Read,
    directory: Path,
    *,
    max_seq_len: int,
    precision: str = "fp32",
    quantized: Quantized | None = None,
    opset: int = 24,
    logits: Logits = "last",
    scoring: ScoringMode | None = None,
    version: str = "",
    progress: Progress | None = None,
    fuses: bool = False,
) -> Path:
    """Write a decoder's graph, and its weights as `model.onnx.data`, into `directory`.

    Args:
        spec: the decoder's dimensions.
        read: gives a weight by its Hugging Face name; called once for each.
        max_seq_len: positions in the cache of each sequence, in tokens.
        precision: "fp32" or "fp16", for weights, cache and arithmetic alike; logits leave as float32.
        quantized: gives a linear layer by its module's name in FP8, or None: that layer has `precision`, and so has
            everything else. Called once for each, before its weight would be read.
        opset: 24, or 23 for ONNX Runtime before 1.24 (ScatterND instead of TensorScatter).
        logits: "last" [batch, vocab_size], or "all" [batch, seq_len, vocab_size].
        scoring: without a cache: one pass that scores candidate continuations; None: with one.
        progress: called with the number of bytes of weights just written.
        fuses: with operators that ONNX Runtime alone has, which are faster on a CPU.

    Returns:
        The path of `model.onnx`, or of `scoring.onnx`.

    Raises:
        BuildError: a scoring graph in another opset than 24.
    """
    if scoring is not None and opset != 24:
        raise BuildError(f"a scoring graph needs opset 24, not {opset}: pip install 'onnxruntime>=1.24'")
    file = "model.onnx" if scoring is None else GRAPH_FILE
    with GraphBuilder(directory, "model", opset=opset, file=file, progress=progress) as graph:
        nodes = DecoderNodes(graph, spec, read, max_seq_len, DTYPES[precision], quantized, fuses=fuses)
        sequences = _cached(nodes, logits) if scoring is None else ScoringRows(nodes, takes_prefix=scoring.takes_prefix)
        _add_decoder(nodes, sequences)
        return graph.finish(producer=PRODUCER, version=version, doc=sequences.doc)


def build_layer(
    spec: ModelSpec,
    layer: int,
    read: Read,
    directory: Path,
    *,
    max_seq_len: int,
    opset: int,
    quantized: Quantized | None = None,
    outputs: Sequence[str] = (),
) -> Path:
    """Write decoder layer `layer` alone, in float32, as `layer.onnx`: what calibration and evaluation run.

    Input `hidden` [batch, seq_len, hidden], besides `start` and the layer's cache; outputs the layer's own, first, and
    `outputs`: other values by name. FP8 layers are simulated (`Float8Nodes`): the same numbers, much faster on a CPU.
    """
    with GraphBuilder(directory, "layer", opset=opset) as graph:
        nodes = DecoderNodes(graph, spec, read, max_seq_len, DTYPES["fp32"], quantized, simulate=True)
        graph.input("hidden", nodes.onnx_dtype, ["batch", "seq_len", spec.hidden_size], "the previous layer's output")
        graph.input("start", TensorProto.INT64, ["batch"], "position of each row's first token")
        sequences = CachedSequences(nodes)
        sequences.positions("hidden")
        for name in (_add_layer(nodes, sequences, layer, "hidden"), *outputs):
            shape: list[int | str] = ["batch", "seq_len", f"{name}.width"]
            graph.output(name, nodes.onnx_dtype, shape, "a value of the decoder's graph")
        return graph.finish(producer=PRODUCER, version="", doc=f"Layer {layer} of a decoder.")


def _cached(nodes: DecoderNodes, logits: Logits) -> CachedSequences:
    if not nodes.fuses:
        return CachedSequences(nodes, logits)
    attentions = (nodes.spec.parts(layer)[0] for layer in range(nodes.spec.num_layers))
    return FusedSequences(nodes, logits) if all(map(can_fuse, attentions)) else FilledSequences(nodes, logits)


def _add_decoder(nodes: DecoderNodes, sequences: Sequences) -> None:
    spec = nodes.spec
    ids = sequences.begin()
    hidden = nodes.embedded(ids, "embed_tokens")  # [batch, seq_len, hidden]
    for layer in range(spec.num_layers):
        hidden = _add_layer(nodes, sequences, layer, hidden)
    hidden = nodes.rms_norm(sequences.predicting(hidden), "model.norm")
    sequences.finish(nodes.head(sequences.with_logits(hidden), "lm_head"))


def _add_layer(nodes: DecoderNodes, sequences: Sequences, layer: int, hidden: str) -> str:
    """hidden [batch, seq_len, hidden] through one layer."""
    for part in nodes.spec.parts(layer):
        hidden = PARTS[type(part)](nodes, sequences, part, layer, hidden)
    return hidden
