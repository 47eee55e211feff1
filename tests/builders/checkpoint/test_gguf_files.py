"""A GGUF in parts, and one in the other byte order."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quantization

from deepseek_triton.builders.checkpoint.config.hf_config import from_hf
from deepseek_triton.builders.checkpoint.reader import Checkpoint, open_checkpoint
from deepseek_triton.builders.errors import BuildError, CheckpointError, UnsupportedError
from tests.support.checkpoints import TINY, Array, Tensors, random_tensors
from tests.support.gguf_files import k_quant_blocks, write_gguf

NUM_PARTS = 4
PARTS = [f"m-0000{i + 1}-of-0000{NUM_PARTS}.gguf" for i in range(NUM_PARTS)]


@pytest.fixture
def tensors() -> Tensors:
    return random_tensors(from_hf(TINY))


@pytest.fixture
def parts(tensors: Tensors, tmp_path: Path) -> Path:
    """A directory with a GGUF in four parts."""
    write_gguf(tmp_path / "m.gguf", from_hf(TINY), tensors, split_max_tensors=6)
    assert sorted(file.name for file in tmp_path.iterdir()) == PARTS
    return tmp_path


def read_all(checkpoint: Checkpoint) -> Tensors:
    return {name: checkpoint.read(name) for name in checkpoint.spec.tensor_shapes()}


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def refusal(path: Path, error: type[BuildError] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        open_checkpoint(path)
    return str(caught.value)


@pytest.mark.parametrize("given", [*PARTS, ""])
def test_any_part_or_their_directory_gives_the_whole(given: str, parts: Path, tensors: Tensors) -> None:
    assert_equal(read_all(open_checkpoint(parts / given)), tensors)


def test_a_first_part_of_metadata_alone(tensors: Tensors, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", from_hf(TINY), tensors, split_max_tensors=9, small_first_shard=True)
    assert_equal(read_all(open_checkpoint(tmp_path)), tensors)


@pytest.mark.parametrize("given", [PARTS[0], PARTS[3], ""])
def test_a_missing_part_is_named(given: str, parts: Path) -> None:
    (parts / PARTS[2]).unlink()
    text = refusal(parts / given)
    assert f"{PARTS[2]}: No such file" in text and f"(1 of {NUM_PARTS} parts missing: {PARTS[2]})" in text
    (parts / PARTS[0]).unlink()
    assert f"2 of {NUM_PARTS} parts missing: {PARTS[0]}, {PARTS[2]}" in refusal(parts / PARTS[3])


def test_parts_whose_names_are_not_true(parts: Path, tmp_path: Path, tensors: Tensors) -> None:
    shutil.copyfile(parts / PARTS[1], parts / "renamed.gguf")
    assert "renamed.gguf is part 2 of 4 of a GGUF file, its name says otherwise" in refusal(parts / "renamed.gguf")
    shutil.copyfile(parts / PARTS[1], parts / PARTS[2])
    assert f"{PARTS[2]}: " in (text := refusal(parts / PARTS[0])) and "is in another part too" in text
    write_gguf(parts / PARTS[2], from_hf(TINY), {"model.norm.weight": tensors["model.norm.weight"]})
    assert "is in another part too" in refusal(parts / PARTS[0])


@pytest.mark.parametrize("name", ["m-00001-of-00000.gguf", "m-00000-of-00004.gguf", "m-00005-of-00004.gguf"])
def test_a_name_that_counts_itself_out_is_named(name: str, parts: Path) -> None:
    (parts / PARTS[0]).rename(parts / name)
    assert f"{name} is by its name no part of" in refusal(parts / name)


def test_the_suffix_may_be_in_capitals(tensors: Tensors, tmp_path: Path) -> None:
    write_gguf(tmp_path / "M.GGUF", from_hf(TINY), tensors)
    assert open_checkpoint(tmp_path / "M.GGUF").spec.num_layers == from_hf(TINY).num_layers


def test_parts_in_another_order(parts: Path) -> None:
    (parts / PARTS[1]).rename(parts / "x")
    (parts / PARTS[2]).rename(parts / PARTS[1])
    (parts / "x").rename(parts / PARTS[2])
    assert f"{PARTS[1]} is part 3, its name says part 2" in refusal(parts / PARTS[0])


def test_a_part_that_was_cut_short_is_named(parts: Path) -> None:
    content = (parts / PARTS[1]).read_bytes()
    (parts / PARTS[1]).write_bytes(content[:-40])
    assert f"{PARTS[1]} is not a readable GGUF file" in refusal(parts / PARTS[0])


def test_a_directory_of_one_or_of_several_models(tensors: Tensors, tmp_path: Path) -> None:
    spec = from_hf(TINY)
    write_gguf(tmp_path / "m-Q8_0.gguf", spec, tensors)
    (tmp_path / "mmproj-m.gguf").write_bytes(b"")
    (tmp_path / "m.imatrix.gguf").write_bytes(b"")
    assert_equal(read_all(open_checkpoint(tmp_path)), tensors)
    write_gguf(tmp_path / "m-F32.gguf", spec, tensors, split_max_tensors=6)
    text = refusal(tmp_path)
    assert "holds 2 GGUF models, give one of them" in text and text.endswith("m-F32-00001-of-00004.gguf, m-Q8_0.gguf")


BIG = gguf.GGUFEndian.BIG


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_big_endian_floats(name: str, tensors: Tensors, tmp_path: Path) -> None:
    spec, kind = from_hf(TINY), Quantization[name]

    def encode(array: Array, quantization: Quantization) -> Array:
        encoded: Array = gguf.quants.quantize(array.copy(), quantization)
        return encoded.view(np.uint16).byteswap().view(np.uint8) if name == "BF16" else encoded

    little = open_checkpoint(write_gguf(tmp_path / "little.gguf", spec, tensors, kind))
    copies = {name: array.copy() for name, array in tensors.items()}  # the writer swaps bytes in place
    big = open_checkpoint(write_gguf(tmp_path / "big.gguf", spec, copies, kind, encode, endianess=BIG))
    assert big.spec == little.spec
    assert_equal(read_all(big), read_all(little))


def swapped(blocks: Array, quantization: Quantization) -> Array:
    """Blocks in the other byte order, by gguf's own converter of files."""
    from gguf.scripts.gguf_convert_endian import byteswap_tensors

    class Holder:
        data = np.array(blocks).reshape(-1)

    for start in range(0, Holder.data.size, gguf.GGML_QUANT_SIZES[quantization][1]):
        byteswap_tensors[quantization](Holder, start)
    return Holder.data.reshape(blocks.shape)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_big_endian_blocks(name: str, tmp_path: Path) -> None:
    kind = Quantization[name]
    spec = from_hf({**TINY, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1})
    encode: Any = k_quant_blocks if name.endswith("K") else gguf.quants.quantize
    little = open_checkpoint(write_gguf(tmp_path / "little.gguf", spec, random_tensors(spec), kind, encode))
    big = open_checkpoint(
        write_gguf(
            tmp_path / "big.gguf", spec, random_tensors(spec), kind,
            lambda array, kind: swapped(encode(array, kind), kind), endianess=BIG,
        )
    )  # fmt: skip
    assert_equal(read_all(big), read_all(little))


def test_big_endian_blocks_that_nobody_describes_are_refused_by_name(tmp_path: Path) -> None:
    spec = from_hf({**TINY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1})
    path = write_gguf(tmp_path / "big.gguf", spec, random_tensors(spec), Quantization.Q5_0, endianess=BIG)
    with pytest.raises(UnsupportedError, match=r"token_embd.weight has type Q5_0, which is not read from a big-endian"):
        read_all(open_checkpoint(path))
