"""Weights that a GGUF file stores in blocks of integers, read without rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quantization

from deepseek_triton.builders.checkpoint.config.hf_config import from_hf
from deepseek_triton.builders.checkpoint.quantized.gguf_blocks import READERS, IntegerBlocks, integer_blocks
from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.graph.blocks.linear import BlockLinear
from tests.support.checkpoints import TINY, random_tensors, write_tiny
from tests.support.gguf_files import HALVES, k_quant_blocks, write_gguf

SHAPE = (6, 512)


def linear(blocks: IntegerBlocks) -> BlockLinear:
    return BlockLinear.of_codes(blocks.codes, blocks.code_bits, blocks.scale, blocks.offset)


def test_every_kind_is_tried() -> None:
    assert set(HALVES) == set(READERS)


@pytest.mark.parametrize("kind", READERS)
def test_blocks_stand_for_what_ggufs_own_dequantizer_gives(kind: str) -> None:
    data = k_quant_blocks(np.empty(SHAPE, np.float32), Quantization[kind])
    expected = gguf.quants.dequantize(data, Quantization[kind])
    assert expected.std() > 0.01
    blocks = integer_blocks(kind, data, SHAPE)
    assert int(blocks.codes.max()) == 2**blocks.code_bits - 1
    found = linear(blocks)
    assert found.shape == SHAPE and found.bits == (4 if int(kind[1]) <= 4 else 8)
    # A minimum is stored for codes around zero: one addition more than gguf makes.
    error = np.abs(found.dequantized() - expected).max()
    assert error == 0 if found.minimum is None else error <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_a_files_blocks_are_its_weights_with_heads_in_this_projects_order(kind: str, tmp_path: Path) -> None:
    spec = from_hf({**TINY, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 40})
    path = write_gguf(tmp_path / "m.gguf", spec, random_tensors(spec), Quantization[kind])
    checkpoint = open_checkpoint(path)
    assert checkpoint.blocks is not None
    matrices = {name.removesuffix(".weight") for name, shape in spec.tensor_shapes().items() if len(shape) == 2}
    assert checkpoint.blocks.modules == matrices
    for module in matrices:
        np.testing.assert_allclose(
            linear(checkpoint.blocks.read(module)).dequantized(), checkpoint.read(f"{module}.weight"), atol=1e-6
        )


def test_the_digest_counts_blocks_as_they_lie_in_the_file(tmp_path: Path) -> None:
    spec = replace(from_hf({**TINY, "hidden_size": 64, "intermediate_size": 96}), num_layers=1)
    digests: list[str] = []
    for seed in (0, 0, 1):
        path = write_gguf(tmp_path / f"{len(digests)}.gguf", spec, random_tensors(spec, seed), Quantization.Q4_0)
        checkpoint = open_checkpoint(path)
        assert checkpoint.blocks is not None
        checkpoint.blocks.read("model.embed_tokens")
        digests.append(checkpoint.digest())
    assert digests[0] == digests[1] != digests[2]


def test_other_checkpoints_store_no_blocks(tmp_path: Path) -> None:
    assert open_checkpoint(write_tiny(tmp_path / "hf")).blocks is None
    spec = from_hf({**TINY, "hidden_size": 64, "intermediate_size": 96})
    assert open_checkpoint(write_gguf(tmp_path / "m.gguf", spec, random_tensors(spec), Quantization.F16)).blocks is None
