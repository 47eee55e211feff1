"""Latent attention and experts from GGUF files on ONNX Runtime, against transformers with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.graph.decoder import build_graph
from deepseek_triton.builders.targets.artefacts.block_weights import BlockWeights
from deepseek_triton.ensemble.engine.runners.onnx.runner import OnnxRunner
from tests.builders.graph.test_blocks import assert_computes_its_weights
from tests.builders.graph.test_parity import assert_agrees, graph_runner, prompt
from tests.support.checkpoints import load_reference, make_checkpoint
from tests.support.latent_gguf import write_latent_gguf

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")

WHOLE_BLOCKS: dict[str, Any] = {  # every matrix has rows of whole blocks of 32
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 16, "moe_intermediate_size": 32,
    "intermediate_size": 96,
}  # fmt: skip


def gguf_of(directory: Path, option: str, kind: str, **more: Any) -> tuple[Path, Path]:
    """A checkpoint and the GGUF of its weights, quantised; the checkpoint's become what the GGUF's stand for."""
    from safetensors.numpy import load_file, save_file

    checkpoint = make_checkpoint(directory / "hf", option, **more)
    spec, file = open_checkpoint(checkpoint).spec, checkpoint / "model.safetensors"
    tensors = load_file(file)
    quantization = gguf.GGMLQuantizationType[kind]
    path = write_latent_gguf(directory / "m.gguf", spec, tensors, splits_kv_b=True, quantization=quantization)
    if kind != "F32":

        def rounded(rows: Any) -> Any:
            return gguf.quants.dequantize(gguf.quants.quantize(rows, quantization), quantization)

        for name, array in tensors.items():
            if name.endswith("kv_b_proj.weight"):
                heads = array.reshape(spec.num_heads, -1, array.shape[-1])
                nope = more["qk_nope_head_dim"]
                keys = rounded(np.ascontiguousarray(heads[:, :nope].transpose(0, 2, 1))).transpose(0, 2, 1)
                values = rounded(np.ascontiguousarray(heads[:, nope:]))
                tensors[name] = np.ascontiguousarray(np.concatenate([keys, values], axis=1).reshape(array.shape))
            elif array.ndim == 2 and array.shape[-1] % 32 == 0 and not name.endswith("mlp.gate.weight"):
                tensors[name] = rounded(array)
        save_file(tensors, file, metadata={"format": "pt"})
    return checkpoint, path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "kind", "more"),
    [
        ("v2-lite", "F32", {}),
        ("v2-groups", "F32", {}),
        ("v3-stretched", "F32", {}),
        ("v2", "Q8_0", WHOLE_BLOCKS),
        ("v3", "Q4_0", WHOLE_BLOCKS),
        ("v3", "Q5_1", WHOLE_BLOCKS),
    ],
)
def test_logits_and_greedy_tokens_are_those_of_transformers(
    option: str, kind: str, more: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint, path = gguf_of(tmp_path, option, kind, **more)
    assert_agrees(graph_runner(path, tmp_path, max_seq_len=256), load_reference(checkpoint), prompt(90))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["stored", "int8", "int4"])
def test_matrices_in_blocks_beside_latents_and_experts(precision: str, tmp_path: Path) -> None:
    """A GGUF's blocks are taken over, of experts too; kv_b is multiplied out."""
    checkpoint, path = gguf_of(tmp_path, "v3", "Q8_0", **WHOLE_BLOCKS)
    source = open_checkpoint(path)
    weights = BlockWeights(source, precision)
    graph = build_graph(
        source.spec, weights.read, tmp_path, max_seq_len=128, precision="fp32", fuses=True, quantized=weights.quantized
    )
    runner, ids = OnnxRunner(graph, max_num_seqs=1, num_threads=2), prompt(60)
    with torch.no_grad():
        expected = load_reference(checkpoint)(torch.tensor(ids)[None]).logits[0, -1].numpy()
    found = runner.prefill(0, ids, 0)
    cosine = found @ expected / np.linalg.norm(found) / np.linalg.norm(expected)
    assert cosine > (0.5 if precision == "int4" else 0.99)  # the tokens are rounded to eight bits too
    # Each layer's q_a, q_b, kv_a and o; the dense and the shared MLPs; embedding and head. Then two layers' experts.
    many = 23 + 2 * 8 * 3
    assert weights.census == {
        "stored": {"Q8_0": many}, "int8": {"int8": many}, "int4": {"int4": many - 2, "int8": 2},
    }[precision]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize("option", ["v2", "v3"])
def test_experts_in_blocks_compute_what_they_stand_for(option: str, precision: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "hf", option, **WHOLE_BLOCKS)
    assert "float32" not in assert_computes_its_weights(path, precision, tmp_path).census


@pytest.mark.slow
def test_one_matrix_that_has_no_blocks_keeps_its_layers_experts_float(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "hf", "v3", **{**WHOLE_BLOCKS, "moe_intermediate_size": 48})
    census = assert_computes_its_weights(path, "int8", tmp_path).census
    assert census["float32"] == 2 * 8 * 3 + 2  # the shared experts' down, 48 wide too
