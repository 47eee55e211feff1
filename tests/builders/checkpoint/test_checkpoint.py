from __future__ import annotations

import json
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quantization
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_triton.builders.checkpoint.config.hf_config import from_hf
from deepseek_triton.builders.checkpoint.files.safetensors import read_safetensors_header
from deepseek_triton.builders.checkpoint.gguf_checkpoint import strict_reader
from deepseek_triton.builders.checkpoint.reader import Checkpoint, open_checkpoint
from deepseek_triton.builders.errors import BuildError, CheckpointError, UnsupportedError
from deepseek_triton.ensemble.decoder.spec import ModelSpec
from tests.support.checkpoints import (
    TINY,
    Tensors,
    make_checkpoint,
    make_tokenizer,
    random_tensors,
    safetensors_bytes,
    write_tiny,
)
from tests.support.gguf_files import finish, k_quant_blocks, permuted, write_gguf


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A small, sound checkpoint without a tokenizer."""
    return write_tiny(tmp_path / "tiny")


def read_all(checkpoint: Checkpoint) -> Tensors:
    return {name: checkpoint.read(name) for name in checkpoint.spec.tensor_shapes()}


def message_of(path: Path, error: type[BuildError] = CheckpointError) -> str:
    """The error message of opening or reading `path`."""
    with pytest.raises(error) as caught:
        read_all(open_checkpoint(path))
    text = str(caught.value)
    assert "\n" not in text and str(path) in text, "one line that names the file"
    return text


# Hugging Face


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensors_come_as_they_are_stored(dtype: Any, tmp_path: Path) -> None:
    tensors = {name: array.astype(dtype) for name, array in random_tensors(from_hf(TINY)).items()}
    for name, array in read_all(open_checkpoint(write_tiny(tmp_path / "c", tensors))).items():
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, tensors[name])


def test_shards_with_and_without_an_index(tiny: Path) -> None:
    expected = read_all(open_checkpoint(tiny))
    names = sorted(expected)
    files = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    (tiny / "model.safetensors").unlink()
    for file, held in files.items():
        (tiny / file).write_bytes(safetensors_bytes({name: expected[name] for name in held}))
    assert_equal(read_all(open_checkpoint(tiny)), expected)
    # An index says which files belong to the model: others are not looked at.
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (tiny / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copyfile(tiny / "a.safetensors", tiny / "copy.safetensors")
    assert_equal(read_all(open_checkpoint(tiny)), expected)
    # transformers would take this file, and vLLM those of the index.
    (tiny / "model.safetensors").write_bytes(safetensors_bytes(expected))
    assert "two sets of weights; remove one of them" in message_of(tiny)


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_the_digest_depends_on_names_dtypes_and_bytes(tiny: Path, tmp_path: Path) -> None:
    def digest(tensors: Tensors | None = None) -> str:
        directory = tiny if tensors is None else write_tiny(tmp_path / "other", tensors)
        checkpoint = open_checkpoint(directory)
        read_all(checkpoint)
        return checkpoint.digest()

    tensors = read_all(open_checkpoint(tiny))
    assert digest(tensors) == digest()
    assert digest(dict(reversed(tensors.items()))) == digest(), "the files' own order doesn't matter"
    changed = {**tensors, "model.norm.weight": np.nextafter(tensors["model.norm.weight"], np.float32(9))}
    assert digest(changed) != digest()
    assert digest({**tensors, "model.norm.weight": tensors["model.norm.weight"].astype(np.float16)}) != digest()


def test_buffers_of_older_checkpoints_and_a_stored_tied_head_are_passed_over(tmp_path: Path) -> None:
    tied = {**TINY, "tie_word_embeddings": True}
    tensors = random_tensors(from_hf(tied))
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32),
        "lm_head.weight": tensors["model.embed_tokens.weight"],
    }
    checkpoint = open_checkpoint(write_tiny(tmp_path / "c", {**tensors, **more}, tie_word_embeddings=True))
    assert_equal(read_all(checkpoint), tensors)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    assert (
        "does not exist; give a Hugging Face directory, a .gguf file or, to download a model, ORG/NAME"
        in message_of(tmp_path / "nowhere")
    )
    (tmp_path / "model.bin").write_bytes(b"weights")
    assert "model.bin is a pickle, which can run code" in message_of(tmp_path / "model.bin", UnsupportedError)
    (tmp_path / "model.zip").write_bytes(b"weights")
    assert "neither a Hugging Face directory nor a .gguf file" in message_of(tmp_path / "model.zip")
    (tmp_path / "empty").mkdir()
    assert "empty holds no checkpoint: neither config.json nor a .gguf file" in message_of(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text(json.dumps(TINY))
    assert "holds no .safetensors file; fetch them, or convert" in message_of(tmp_path / "empty")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not valid JSON"),
        ("[1]", "config.json must hold a JSON object"),
        ("[" * 200_000, "config.json is not valid JSON"),
        ('{"model_type": "\udce4"}', "config.json is not valid JSON"),
        ('{"model_type": "llama"}', "config.json: num_attention_heads is missing"),
    ],
)
def test_a_bad_config(text: str, message: str, tiny: Path) -> None:
    (tiny / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert message in message_of(tiny)


def test_a_bad_generation_config(tiny: Path) -> None:
    (tiny / "generation_config.json").write_text('{"eos_token_id": 99}')
    assert "generation_config.json: eos_token_id is 99, outside the vocabulary" in message_of(tiny)
    (tiny / "generation_config.json").write_text('{"eos_token_id": "3"}')
    assert "generation_config.json: eos_token_id is '3', must be a token id" in message_of(tiny)
    (tiny / "generation_config.json").write_text("no")
    assert "generation_config.json is not valid JSON" in message_of(tiny)


def test_an_unsupported_architecture_names_the_file(tiny: Path) -> None:
    (tiny / "config.json").write_text('{"model_type": "mamba"}')
    assert "config.json: architecture 'mamba' is not supported" in message_of(tiny, UnsupportedError)


@pytest.mark.slow
def test_truncation_at_every_byte_is_noticed_when_the_checkpoint_is_opened(tiny: Path) -> None:
    file = tiny / "model.safetensors"
    content = file.read_bytes()
    for length in {*range(0, 20), *range(20, len(content), 97), len(content) - 1}:
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors.*fetch the checkpoint again"):
            open_checkpoint(tiny)


def test_a_file_that_shrinks_after_it_was_opened(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    file = tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"ends inside lm_head\.weight"):
        read_all(checkpoint)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: No such file"):
        read_all(checkpoint)


NORM = "model.norm.weight"


def _offsets(begin: int, end: int, name: str = NORM) -> Callable[[dict[str, Any]], object]:
    def change(header: dict[str, Any]) -> None:
        offsets = header[name]["data_offsets"]
        header[name]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

    return change


LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "range shorter than the shape": (_offsets(0, -4), "has 28 bytes, its shape [8] needs 32"),
    "range over its neighbour": (_offsets(-32, -32), f"{NORM!r} begins at byte"),
    "range past the end": (_offsets(1 << 40, 1 << 40), f"ends inside {NORM!r}"),
    "negative range": (_offsets(-(1 << 30), -(1 << 30)), f"corrupt entry for {NORM!r}"),
    "range backwards": (lambda header: header[NORM].update(data_offsets=[64, 32]), "has -32 bytes"),
    "three offsets": (lambda header: header[NORM].update(data_offsets=[0, 1, 2]), "corrupt entry"),
    "fractions": (lambda header: header[NORM].update(shape=[8.5]), "corrupt entry"),
    "infinite": (lambda header: header[NORM].update(shape=[float("inf")]), "corrupt entry"),
    "negative shape": (lambda header: header[NORM].update(shape=[-8]), "corrupt entry"),
    "shape of another length": (lambda header: header[NORM].update(shape=[4]), "has 32 bytes, its shape [4] needs 16"),
    "reshaped": (lambda header: header[NORM].update(shape=[2, 4]), "has shape [2, 4], expected [8]"),
    "no dtype": (lambda header: header[NORM].pop("dtype"), "corrupt entry"),
    "no object": (lambda header: header.update({NORM: 7}), "corrupt entry"),
    "a hole": (lambda header: header.pop(NORM), "begins at byte"),
    "renamed": (
        lambda header: header.update({"norm\nx": header.pop(NORM)}),
        f"{NORM} is missing, and 'norm\\nx' is there, which no llama model has (and 1 more",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(lie: str, tiny: Path) -> None:
    change, message = LIES[lie]
    tensors = read_all(open_checkpoint(tiny))
    (tiny / "model.safetensors").write_bytes(safetensors_bytes(tensors, change))
    assert message in message_of(tiny)


def test_headers_that_are_none(tiny: Path) -> None:
    file = tiny / "model.safetensors"
    for header in (b"[]", b"{", b"\xff\xfe", b"[" * 100_000):
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        assert "has a corrupt safetensors header; fetch" in message_of(tiny)
    file.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    assert "is not a safetensors file, or was cut short" in message_of(tiny)


def test_bytes_that_belong_to_no_tensor(tiny: Path) -> None:
    file = tiny / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"more")
    assert "has 4 bytes that belong to no tensor" in message_of(tiny)


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: array for name, array in tensors.items() if name not in names}


def test_tensors_missing_unexpected_and_of_the_wrong_shape(tmp_path: Path) -> None:
    tensors = random_tensors(from_hf(TINY))
    query, key = (f"model.layers.1.self_attn.{kind}_proj.weight" for kind in "qk")

    def message(tensors: Tensors, **changes: Any) -> str:
        return message_of(write_tiny(tmp_path / "c", tensors, **changes))

    assert f"{query} is missing;" in message(without(tensors, query))
    assert f"{query} is missing (and 1 more tensors)" in message(without(tensors, query, key))
    wrapped = message({f"_orig_mod.{name}": array for name, array in tensors.items()})
    assert "model.embed_tokens.weight is missing, and '_orig_mod." in wrapped
    assert "'model.vision.weight' is not part of a llama model" in message({**tensors, "model.vision.weight": NORM_})
    assert f"{query} has shape [4, 8], expected [8, 8]" in message({**tensors, query: tensors[query][:4]})
    assert f"{query} has shape [64], expected [8, 8]" in message({**tensors, query: tensors[query].reshape(-1)})
    # A configuration that doesn't fit its weights shows in the first tensor that differs.
    assert "model.embed_tokens.weight has shape [16, 8], expected [17, 8]" in message(tensors, vocab_size=17)
    assert "model.layers.2." in message(tensors, num_hidden_layers=3)
    assert "'model.layers.1." in message(tensors, num_hidden_layers=1)


NORM_ = np.ones(8, np.float32)


def test_a_dtype_without_an_implementation(tmp_path: Path) -> None:
    tensors = random_tensors(from_hf(TINY))
    path = write_tiny(tmp_path / "c", {**tensors, NORM: tensors[NORM].astype(np.float64)})
    message = message_of(path, UnsupportedError)
    assert f"{NORM!r} has dtype 'F64'; supported: F32, F16, BF16" in message
    change = _set_dtype(["F32"])
    (path / "model.safetensors").write_bytes(safetensors_bytes(tensors, change))
    message_of(path, UnsupportedError)


def _set_dtype(dtype: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header[NORM].update(dtype=dtype)


def test_missing_and_duplicate_shards(tiny: Path) -> None:
    tensors = read_all(open_checkpoint(tiny))
    (tiny / "more.safetensors").write_bytes(safetensors_bytes({NORM: tensors[NORM]}))
    assert f"{NORM!r} is in both model.safetensors and more.safetensors" in message_of(tiny)
    index = tiny / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {NORM: "model-00002-of-00002.safetensors"}}))
    assert "model-00002-of-00002.safetensors: No such file or directory; fetch" in message_of(tiny)
    nothing: tuple[Any, ...] = ({}, None, [1])
    for weight_map in nothing:
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert "index.json has no weight_map" in message_of(tiny)
    for file in (7, None, "../elsewhere.safetensors", "/etc/passwd", ["a"]):
        index.write_text(json.dumps({"weight_map": {NORM: file}}))
        assert "weight_map must name files beside it" in message_of(tiny)


def test_an_unreadable_shard(tiny: Path) -> None:
    (tiny / "model.safetensors").unlink()
    (tiny / "model.safetensors").mkdir()
    assert "model.safetensors: Is a directory" in message_of(tiny)


def test_the_tokenizer_s_files_are_copied(tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json does not exist; convert the tokenizer"):
        open_checkpoint(tiny).write_tokenizer(target)
    make_tokenizer(tiny)
    (tiny / "chat_template.jinja").write_text("{{ messages }}")
    open_checkpoint(tiny).write_tokenizer(target)
    assert sorted(path.name for path in target.iterdir()) == [
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert (target / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()


# GGUF

QUANTIZABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0")
# In all tests of one file the largest error of a weight, over the largest weight of its block.
PRECISION = {
    "F32": 0.0, "F16": 5e-4, "BF16": 4e-3, "Q8_0": 6e-3, "Q5_0": 0.07, "Q4_0": 0.14, "Q4_1": 0.09,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[ModelSpec, Tensors]]:
    """A random checkpoint that transformers wrote: its spec and its tensors."""
    directory = tmp_path_factory.mktemp("models")

    def model(option: str) -> tuple[ModelSpec, Tensors]:
        if not (directory / option).exists():
            make_checkpoint(directory / option, option, intermediate_size=128, num_hidden_layers=2)
        checkpoint = open_checkpoint(directory / option)
        return checkpoint.spec, read_all(checkpoint)

    return model


@pytest.mark.slow
@pytest.mark.parametrize("option", ["llama", "llama-biases", "llama-mha-tied", "llama-head-dim", "qwen2", "qwen3"])
def test_gguf_gives_what_the_hugging_face_checkpoint_gives(option: str, models: Any, tmp_path: Path) -> None:
    spec, tensors = models(option)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", spec, tensors))
    assert checkpoint.spec.rms_norm_eps == pytest.approx(spec.rms_norm_eps)  # a float32 in GGUF
    assert replace(checkpoint.spec, rms_norm_eps=spec.rms_norm_eps) == spec
    assert_equal(read_all(checkpoint), tensors)
    has_biases = any(name.endswith("q_proj.bias") for name in tensors)
    assert has_biases == (option in ("qwen2", "llama-biases"))


@pytest.mark.parametrize("name", QUANTIZABLE)
def test_gguf_quantizations_come_as_float32_near_the_weights(name: str, models: Any, tmp_path: Path) -> None:
    spec, tensors = models("llama")
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", spec, tensors, Quantization[name]))
    for tensor, array in read_all(checkpoint).items():
        assert array.dtype == np.float32
        if array.ndim == 1:
            np.testing.assert_array_equal(array, tensors[tensor])
            continue
        blocks = tensors[tensor].reshape(-1, 32)
        error = np.abs(array.reshape(-1, 32) - blocks).max(1) / np.abs(blocks).max(1)
        assert error.max() <= PRECISION[name]
        assert name == "F32" or error.max() > 0, "the file should have been quantised"


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K"])
def test_gguf_k_quants_are_those_of_gguf_s_own_dequantizer(name: str, tmp_path: Path) -> None:
    spec = from_hf({**TINY, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1})
    tensors = random_tensors(spec)
    path = write_gguf(tmp_path / "m.gguf", spec, tensors, Quantization[name], k_quant_blocks)
    for tensor, array in read_all(open_checkpoint(path)).items():
        expected = tensors[tensor]
        if expected.ndim == 2:
            expected = gguf.quants.dequantize(k_quant_blocks(expected, Quantization[name]), Quantization[name])
            assert expected.std() > 0.01
        heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}.get(tensor.split(".")[-2])
        if heads:
            # The random blocks stand for rows that are permuted already: what is read must give them back.
            array = permuted(array, heads)
        np.testing.assert_array_equal(array, expected)


def test_k_quants_by_the_formula() -> None:
    # One block of Q6_K by hand: value = d × scale × (6-bit code - 32).
    block = np.zeros(210, np.uint8)
    block[0], block[128] = 0x0F, 0x02  # the first code: low four bits 15, high two bits 2 → 47
    block[192] = 3  # the first sixteen values' scale
    block[208:] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    values = gguf.quants.dequantize(block[None], Quantization.Q6_K)
    assert values[0, 0] == 0.5 * 3 * (47 - 32)


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    spec = from_hf(TINY)
    return write_gguf(tmp_path / "tiny.gguf", spec, random_tensors(spec))


@pytest.mark.slow
def test_gguf_truncated_anywhere(tiny_gguf: Path) -> None:
    content = tiny_gguf.read_bytes()
    for length in {*range(0, 64), *range(64, len(content), 61), len(content) - 1}:
        tiny_gguf.write_bytes(content[:length])
        if length == len(content) - 1 and content[-1] == 0:
            continue  # padding
        with pytest.raises(CheckpointError, match=r"tiny\.gguf.*fetch the checkpoint again"):
            open_checkpoint(tiny_gguf)


def test_gguf_that_is_none(tmp_path: Path) -> None:
    for content in (b"", b"GGUF", b"GGML" + bytes(100), bytes(100), b"\x00" * 7):
        (tmp_path / "x.gguf").write_bytes(content)
        assert "is not a readable GGUF file" in message_of(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"tjgg", "format of before GGUF; convert"),
        (b"GGUF\x01\0\0\0", "version 1; convert"),
        (b"\x1f\x8b\x08", "gzip; unpack"),
        (b"PK\x03\x04", "zip archive; unpack"),
        (b"<!DOCTYPE html>", "HTML page"),
    ],
)
def test_whole_files_of_another_format_are_named(start: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(start + bytes(100))
    with pytest.raises(UnsupportedError, match=message) as error:
        open_checkpoint(tmp_path / "x.gguf")
    assert "fetch the checkpoint again" not in str(error.value)


def test_gguf_with_an_array_longer_than_the_file_is_no_endless_loop(tiny_gguf: Path) -> None:
    content = bytearray(tiny_gguf.read_bytes())
    length = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 4 + 4
    assert int.from_bytes(content[length : length + 8], "little") == TINY["vocab_size"]
    content[length - 4 : length] = (4).to_bytes(4, "little")  # strings become 32-bit numbers
    content[length : length + 8] = (2**62).to_bytes(8, "little")
    tiny_gguf.write_bytes(content)
    with time_limit(20):
        assert "it ends before byte" in message_of(tiny_gguf)


@pytest.mark.parametrize("endianess", gguf.GGUFEndian)
def test_gguf_metadata_is_what_gguf_s_own_reader_gives(endianess: gguf.GGUFEndian, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=endianess)
    values: dict[str, Any] = {
        "numbers": [1, 2**31 - 1, -5], "reals": [0.5, -1e30], "truths": [True, False, True],
        "strings": ["", "a", "日本語", "\0", "x" * 300], "text": "one", "number": 7,
    }  # fmt: skip
    for key, value in values.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    writer.add_key_value("bytes", [3, 255], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8)
    writer.add_key_value("nested", [[1, 2], [3]], gguf.GGUFValueType.ARRAY)
    writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))
    finish(writer)
    own, ours = gguf.GGUFReader(path), strict_reader(path)
    assert [*own.fields] == [*ours.fields]
    for key, field in own.fields.items():
        found = ours.fields[key]
        assert (found.contents(), found.types, found.offset) == (field.contents(), field.types, field.offset), key
    assert ours.fields["strings"].contents() == values["strings"]
    assert ours.data_offset == own.data_offset
    np.testing.assert_array_equal(ours.tensors[0].data, own.tensors[0].data)


def test_gguf_tensors_at_fault(tmp_path: Path) -> None:
    spec = from_hf(TINY)
    tensors = random_tensors(spec)
    path = tmp_path / "m.gguf"
    assert "model.norm.weight is missing" in message_of(write_gguf(path, spec, without(tensors, NORM)))
    more = {"blk.0.ssm.weight": np.ones(4, np.float32)}
    assert "'blk.0.ssm.weight' is not part of a llama" in message_of(write_gguf(path, spec, tensors, more=more))
    missing = without(tensors, "model.embed_tokens.weight")
    assert "has no token_embd.weight" in message_of(write_gguf(path, spec, missing))
    reshaped = {**tensors, "model.layers.0.mlp.up_proj.weight": np.ones((8, 8), np.float32)}
    assert "up_proj.weight has shape [8, 8], expected [12, 8]" in message_of(write_gguf(path, spec, reshaped))
    assert "architecture 'gemma'" in message_of(write_gguf(path, spec, tensors, architecture="gemma"), UnsupportedError)
    integers = {**tensors, NORM: np.ones(8, np.int32)}
    assert f"{NORM} has type I32" in message_of(write_gguf(path, spec, integers), UnsupportedError)


def test_gguf_frequency_factors_leave_the_tensors_for_the_spec(tmp_path: Path) -> None:
    spec = from_hf(TINY)
    factors = {"rope_freqs.weight": np.array([1.0, 4.0], np.float32)}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", spec, random_tensors(spec), more=factors))
    assert (checkpoint.spec.rope.scaling, checkpoint.spec.rope.frequency_factors) == ("factors", (1.0, 4.0))


# Anything at all


class TookTooLong(BaseException):
    """A BaseException, so that `except Exception` doesn't catch it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def give_up(number: int, frame: object) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, give_up)
    outer_s, _ = signal.setitimer(signal.ITIMER_REAL, seconds)  # the test's own limit has the same timer
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, outer_s)
        signal.signal(signal.SIGALRM, before)


def damages(size: int, header: int) -> st.SearchStrategy[Callable[[bytes], bytes]]:
    """Flips of a few bytes, most of them in the header; cuts; pieces written twice."""
    places = st.one_of(st.integers(0, header - 1), st.integers(0, size - 1))

    def flip(flips: list[tuple[int, int]]) -> Callable[[bytes], bytes]:
        def damage(content: bytes) -> bytes:
            array = bytearray(content)
            for place, bits in flips:
                array[place] ^= bits
            return bytes(array)

        return damage

    return st.one_of(
        st.lists(st.tuples(places, st.integers(1, 255)), min_size=1, max_size=4).map(flip),
        places.map(lambda place: lambda content: content[:place]),
        st.tuples(places, places).map(lambda pair: lambda content: content[: pair[0]] + content[pair[1] :]),
    )


def check_damaged(file_name: str, content: bytes, others: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for other, data in others.items():
            (directory / other).write_bytes(data)
        (directory / file_name).write_bytes(content)
        path = directory / file_name if file_name.endswith(".gguf") else directory
        with time_limit(20):
            try:
                read_all(open_checkpoint(path))
            except BuildError as error:
                assert "\n" not in str(error)


def _tiny_safetensors() -> bytes:
    return safetensors_bytes(random_tensors(from_hf(TINY)))


def _tiny_gguf() -> bytes:
    spec = from_hf(TINY)
    with tempfile.TemporaryDirectory() as name:
        return write_gguf(Path(name) / "m.gguf", spec, random_tensors(spec), Quantization.F16).read_bytes()


CONFIG = json.dumps({**TINY, "rope_scaling": {"type": "yarn", "factor": 2.0}}).encode()
SAFETENSORS, GGUF = _tiny_safetensors(), _tiny_gguf()
SAFETENSORS_HEADER = 8 + int.from_bytes(SAFETENSORS[:8], "little")
FUZZ = settings(max_examples=200)


@pytest.mark.slow
@FUZZ
@given(damages(len(SAFETENSORS), SAFETENSORS_HEADER))
def test_damaged_safetensors_end_in_a_build_error_or_are_read(damage: Callable[[bytes], bytes]) -> None:
    check_damaged("model.safetensors", damage(SAFETENSORS), {"config.json": json.dumps(TINY).encode()})


@pytest.mark.slow
@FUZZ
@given(damages(len(GGUF), GGUF.index(b"blk.1.ffn_down.weight") + 60))
def test_damaged_gguf_files_end_in_a_build_error_or_are_read(damage: Callable[[bytes], bytes]) -> None:
    check_damaged("m.gguf", damage(GGUF), {})


@pytest.mark.slow
@FUZZ
@given(damages(len(CONFIG), len(CONFIG)))
def test_damaged_configs_end_in_a_build_error_or_are_read(damage: Callable[[bytes], bytes]) -> None:
    check_damaged("config.json", damage(CONFIG), {"model.safetensors": SAFETENSORS})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.slow
@FUZZ
@given(st.sampled_from([*TINY, "rope_scaling", "rope_theta", "head_dim", "hidden_act", "partial_rotary_factor"]), JSON)
def test_any_json_in_a_config_ends_in_a_build_error_or_is_read(key: str, value: Any) -> None:
    config = json.dumps({**TINY, key: value}).encode()
    check_damaged("config.json", config, {"model.safetensors": SAFETENSORS})


@pytest.mark.slow
@FUZZ
@given(st.sampled_from(["dtype", "shape", "data_offsets"]), JSON)
def test_any_json_in_a_header_ends_in_a_build_error_or_is_read(key: str, value: Any) -> None:
    tensors = random_tensors(from_hf(TINY))
    content = safetensors_bytes(tensors, lambda header: header[NORM].update({key: value}))
    check_damaged("model.safetensors", content, {"config.json": json.dumps(TINY).encode()})


def test_a_header_alone_can_be_read(tiny: Path) -> None:
    location = read_safetensors_header(tiny / "model.safetensors")[NORM]
    assert (location.shape, location.length, location.dtype.name) == ((8,), 32, "float32")
