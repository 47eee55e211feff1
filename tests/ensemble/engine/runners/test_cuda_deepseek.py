"""Whole decoders of latent attention and experts in the cuda runner: a build's logits against the ONNX graph's."""

# without triton the file is skipped before it imports what needs it

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.support.cuda_device import DEVICE  # isort: skip  # before triton

from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.fp8.quantize import quantized_graph
from deepseek_triton.builders.fp8.recipe import RECIPES
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.targets.artefacts.cuda_weights import write_weights
from deepseek_triton.builders.targets.artefacts.decoder_shape import decoder_shape
from deepseek_triton.ensemble.artefacts.cuda_layout import WEIGHTS_FILE, DecoderShape
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.artefacts.tensor_file import TensorFile
from deepseek_triton.ensemble.engine.runners.base import PromptChunk
from deepseek_triton.ensemble.engine.runners.cuda.pages import CacheForm
from deepseek_triton.ensemble.engine.runners.cuda.runner import CudaRunner
from deepseek_triton.ensemble.engine.runners.cuda.weights import StoredWeights
from deepseek_triton.ensemble.engine.runners.onnx.runner import OnnxRunner
from tests.builders.graph.test_parity import graph_runner, prompt
from tests.support.checkpoints import make_checkpoint, make_tokenizer

# The interpreter computes masked lanes too, and makes numbers of arrays.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("RuntimeWarning", "DeprecationWarning")]
Array = NDArray[Any]
LEAST = 0.9999999  # cosine

OPTIONS = [
    pytest.param("v2-groups", marks=pytest.mark.slow),
    pytest.param("v2-lite", marks=pytest.mark.slow),
    pytest.param("v2-experts-everywhere", marks=pytest.mark.slow),
    pytest.param("v3", marks=pytest.mark.slow),
    "v3-stretched",
    pytest.param("v3-one-group", marks=pytest.mark.slow),
    pytest.param("v3-halves", marks=pytest.mark.slow),
]


def make_runner(path: Path, shape: DecoderShape) -> CudaRunner:
    return CudaRunner(
        StoredWeights(path), shape, max_num_seqs=3, max_num_batched_tokens=80,
        # In bfloat16 a router may choose another expert than the graph's.
        cache_form=CacheForm("slots", 0), dtype=torch.float32, device=str(DEVICE),
    )  # fmt: skip


def cosine(found: Array, wanted: Array) -> float:
    a, b = found.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def assert_agrees(found: Array, wanted: Array) -> None:
    assert cosine(found, wanted) > LEAST
    np.testing.assert_allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_built_decoders_logits_are_the_onnx_graphs(option: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", option, "bfloat16")
    reference = graph_runner(checkpoint, tmp_path)
    source = open_checkpoint(checkpoint)
    written = write_weights(source.spec, source.read, tmp_path, max_seq_len=128)
    runner = make_runner(written.path, decoder_shape(source.spec, 128))
    long, short = prompt(70), prompt(4, seed=1)  # past the trained length of those that are stretched
    packed = runner.prefill_many([PromptChunk(2, short, 0), PromptChunk(0, long, 0)])
    assert_agrees(packed[0], reference.prefill(0, short, 0))
    assert_agrees(packed[1], reference.prefill(1, long, 0))
    # Slot 1 has no sequence, and takes no part in the routing.
    ids, positions = np.array([5, 0, 7]), np.array([70, -1, 4])
    together = runner.decode(ids, positions)
    assert_agrees(together[0], reference.prefill(1, ids[:1], 70))
    assert_agrees(together[2], reference.prefill(0, ids[2:], 4))
    runner.close()


@pytest.mark.slow
def test_an_fp8_build_computes_as_the_fp8_graph(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", minversion="1.32", reason="earlier ones refuse FP8 between float32 operators")
    checkpoint = make_tokenizer(make_checkpoint(tmp_path / "checkpoint", "v3", "bfloat16"))
    build(
        BuildOptions(
            checkpoint, "m", tmp_path / "models", target="cuda", precision="fp8", recipe="fast", max_seq_len=64
        )
    )
    directory = tmp_path / "models" / "m-engine" / "1"
    shape = DecoderShape.from_dict(Manifest.load(directory).engine)
    assert TensorFile(directory / WEIGHTS_FILE).entries["layers.1.experts_down.weight"].dtype == "F8_E4M3"
    runner, ids = make_runner(directory / WEIGHTS_FILE, shape), prompt(9)
    graph, _ = quantized_graph(
        open_checkpoint(checkpoint), RECIPES["fast"], None, tmp_path, max_seq_len=64, network="fp32"
    )
    reference = OnnxRunner(graph, max_num_seqs=1, num_threads=2)
    # A value on the border between two codes may fall either way, and moves what follows.
    assert cosine(runner.prefill(0, ids[:8], 0), reference.prefill(0, ids[:8], 0)) > 0.99
    assert cosine(runner.decode(ids[8:], np.array([8]))[0], reference.decode(ids[8:], np.array([8]))[0]) > 0.99
    runner.close()


def test_the_experts_stacks_are_the_checkpoints(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "v3", "bfloat16")
    source = open_checkpoint(checkpoint)
    stored = TensorFile(write_weights(source.spec, source.read, tmp_path, max_seq_len=16).path)
    decoder_shape(source.spec, 16).check(stored.entries)
    again, experts = open_checkpoint(checkpoint), source.spec.experts
    assert experts is not None

    def tensor(name: str) -> Array:
        entry = stored.entries[name]
        dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[entry.dtype]
        values: Array = torch.from_numpy(stored.read(name).copy()).view(dtype).view(entry.shape).float().numpy()
        return values

    prefix = "model.layers.1.mlp."
    gate_up, down = tensor("layers.1.experts_gate_up.weight"), tensor("layers.1.experts_down.weight")
    for expert in range(experts.num_experts):
        gate, up, own_down = (
            np.asarray(again.read(f"{prefix}experts.{expert}.{name}_proj.weight"), np.float32)
            for name in ("gate", "up", "down")
        )
        np.testing.assert_array_equal(gate_up[expert], np.concatenate([gate, up]))
        np.testing.assert_array_equal(down[expert], own_down)
    bias = np.asarray(again.read(f"{prefix}gate.e_score_correction_bias"), np.float32)
    np.testing.assert_array_equal(tensor("layers.1.router.bias"), bias)
    assert stored.entries["layers.1.router.weight"].dtype == "F32"
