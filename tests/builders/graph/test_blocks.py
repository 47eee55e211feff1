"""Linear layers in blocks of integers: how floats are rounded, and what the graph computes with them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quantization
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.reader import Checkpoint, open_checkpoint
from deepseek_triton.builders.errors import BuildError, CheckpointError
from deepseek_triton.builders.graph.blocks import functions
from deepseek_triton.builders.graph.blocks.linear import BlockLinear
from deepseek_triton.builders.graph.blocks.rounding import BLOCK_SIZE, rounded
from deepseek_triton.builders.graph.decoder import build_graph
from deepseek_triton.builders.targets.artefacts.block_weights import BlockWeights
from deepseek_triton.ensemble.decoder.mla import KV_B
from deepseek_triton.ensemble.engine.runners.onnx import operators
from deepseek_triton.ensemble.engine.runners.onnx.runner import OnnxRunner
from tests.support.checkpoints import make_checkpoint
from tests.support.gguf_files import k_quant_blocks, write_gguf

MAX_SEQ_LEN = 64
FLOAT_ACTIVATIONS = 1  # MatMulNBits' accuracy_level that rounds no activation
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
}
Read = Callable[[str], NDArray[Any]]


def weights(shape: tuple[int, int] = (16, 128), seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_eight_bits_are_off_by_half_a_step_at_most() -> None:
    weight = weights()
    linear = rounded(weight, 8)
    error = np.abs(linear.dequantized() - weight).reshape(16, -1, BLOCK_SIZE).max(-1)
    assert linear.minimum is None and (error <= linear.scale * 0.5001).all() and error.max() > 0


def test_four_bits_are_nearer_than_each_blocks_range_in_fifteen_steps() -> None:
    weight = weights((64, 128))
    blocks = weight.reshape(64, -1, BLOCK_SIZE)
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    step = (high - low) / 15
    plain = np.rint((blocks - low) / step) * step + low
    error = ((rounded(weight, 4).dequantized() - weight) ** 2).mean()
    assert 0 < error < 0.93 * ((plain - blocks) ** 2).mean()


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_of_one_value_and_of_zeros_come_back(bits: int) -> None:
    weight = np.repeat(np.array([[0.0, 3.5], [-2.0, 0.0]], np.float32), BLOCK_SIZE, axis=1)
    np.testing.assert_allclose(rounded(weight, bits).dequantized(), weight, rtol=1e-6)


def test_four_bit_weights_of_sixteen_levels_come_back() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (8, 3, BLOCK_SIZE))
    codes[..., :2] = (0, 15)
    weight = (codes * 0.125 - 0.7).astype(np.float32).reshape(8, -1)
    np.testing.assert_allclose(rounded(weight, 4).dequantized(), weight, atol=1e-6)


def test_layers_of_one_kind_join_and_others_do_not() -> None:
    first, second = rounded(weights(seed=1), 4), rounded(weights((4, 128), 2), 4)
    joined = BlockLinear.joined([first, second])
    assert joined is not None
    np.testing.assert_array_equal(joined.dequantized(), np.concatenate([first.dequantized(), second.dequantized()]))
    assert BlockLinear.joined([first, rounded(weights(), 8)]) is None


def runner(checkpoint: Checkpoint, read: Read, parent: Path, **options: Any) -> OnnxRunner:
    directory = Path(tempfile.mkdtemp(dir=parent))
    build_graph(checkpoint.spec, read, directory, max_seq_len=MAX_SEQ_LEN, fuses=True, **options)
    return OnnxRunner(directory / "model.onnx", max_num_seqs=2, num_threads=1)


def floats_of(path: Path, precision: str) -> dict[str, NDArray[Any]]:
    """The very weights that the blocks of `path` stand for."""
    source = BlockWeights(open_checkpoint(path), precision)
    floats: dict[str, NDArray[Any]] = {}
    for name in open_checkpoint(path).spec.tensor_shapes():
        module, _, kind = name.rpartition(".")
        is_taken_apart = module.endswith(KV_B)  # and stays float
        linear = source.quantized(module) if kind == "weight" and not is_taken_apart else None
        if linear is not None:
            floats[name] = linear.dequantized()
            if linear.bias is not None:
                floats[f"{module}.bias"] = linear.bias
        elif name not in floats:
            floats[name] = source.read(name)
    return floats


def both_logits(path: Path, precision: str, parent: Path) -> tuple[BlockWeights, list[tuple[Any, Any]]]:
    """Logits of a prompt and of a decode step, in blocks and with the weights that these stand for."""
    checkpoint = open_checkpoint(path)
    blocks = BlockWeights(checkpoint, precision)
    ours = runner(checkpoint, blocks.read, parent, quantized=blocks.quantized)
    theirs = runner(checkpoint, floats_of(path, precision).__getitem__, parent)
    ids = np.random.default_rng(0).integers(0, checkpoint.spec.vocab_size, 20)
    step = np.array([3]), np.array([20])
    prompt = ours.prefill(0, ids, 0).copy(), theirs.prefill(0, ids, 0).copy()
    return blocks, [prompt, (ours.decode(*step)[0], theirs.decode(*step)[0])]


def assert_computes_its_weights(path: Path, precision: str, parent: Path) -> BlockWeights:
    """With float activations the blocks' graph gives the logits of a float32 graph with their weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functions, "ACTIVATIONS", FLOAT_ACTIVATIONS)
        patch.setattr(operators, "library", lambda: None)  # which always rounds activations
        blocks, pairs = both_logits(path, precision, parent)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, atol=1e-3 * theirs.std())
    return blocks


def test_activations_are_rounded_to_eight_bits_and_no_further(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "hf", "llama", **SIZES)
    for ours, theirs in both_logits(path, "int8", tmp_path)[1]:
        cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
        assert 0.99 < cosine < 1 - 1e-7


@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize("option", ["llama", "llama-mha-tied", "qwen2", "qwen3"])
def test_a_graph_in_blocks_computes_what_they_stand_for(option: str, precision: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "hf", option, **SIZES)
    blocks = assert_computes_its_weights(path, precision, tmp_path)
    num_linears = 2 * 7 + (1 if open_checkpoint(path).spec.tie_word_embeddings else 2)
    assert sum(blocks.census.values()) == num_linears and "float32" not in blocks.census


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "Q2_K"])
def test_a_ggufs_blocks_are_taken_over(kind: str, tmp_path: Path) -> None:
    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 256, "head_dim": 64} if kind.endswith("K") else SIZES
    source = open_checkpoint(make_checkpoint(tmp_path / "hf", "llama", **sizes))
    tensors = {name: source.read(name) for name in source.spec.tensor_shapes()}
    own: dict[str, Any] = {"encode": k_quant_blocks} if kind.endswith("K") else {}
    path = write_gguf(tmp_path / "m.gguf", source.spec, tensors, Quantization[kind], **own)
    blocks = assert_computes_its_weights(path, "stored", tmp_path)
    assert blocks.census == {kind: 2 * 7 + 2}


def test_rows_that_are_no_multiple_of_a_block_stay_float(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "hf", "llama", **{**SIZES, "intermediate_size": 100})
    blocks = assert_computes_its_weights(path, "int8", tmp_path)
    assert blocks.census == {"int8": 2 * 6 + 2, "float32": 2}


def test_stored_needs_a_quantised_gguf(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "hf", "llama", **SIZES)
    with pytest.raises(BuildError, match=r"hf stores no weights in blocks of integers.*--precision int4 or int8"):
        BlockWeights(open_checkpoint(path), "stored")


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_weights_that_are_not_finite_are_refused(number: float, precision: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "hf", "llama", **SIZES))

    class Damaged:
        spec, path, blocks = checkpoint.spec, checkpoint.path, None

        def read(self, name: str) -> NDArray[Any]:
            values = checkpoint.read(name).copy()
            if name == "model.layers.1.mlp.up_proj.weight":
                values[3, 5] = number
            return values

    weights = BlockWeights(Damaged(), precision)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight .*not finite"):
        runner(checkpoint, weights.read, tmp_path, quantized=weights.quantized)
