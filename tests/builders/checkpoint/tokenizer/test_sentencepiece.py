"""A checkpoint with sentencepiece's tokenizer.model and no tokenizer.json."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import BuildError, CheckpointError, UnsupportedError
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.ensemble.text.tokenizer import Tokenizer
from tests.support.checkpoints import write_tiny

LETTERS = ["▁", *"abcdehlnorstw", "▁h", "el", "he", "lo", "hel", "▁t", "he▁", "▁the", "▁hello", "wor", "▁w"]
TEXTS = ("hello the world", "  hello", "the\n é 深 hello", "</s> hello<s>", "")


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def field(number: int, value: int | bytes | float) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def model(model_type: int = 2, removes_spaces: int = 0, charsmap: bytes = b"") -> bytes:
    """tokenizer.model as Llama's: <unk>, <s>, </s>, all bytes, and pieces with their scores."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{n:02X}>", 0.0, 6) for n in range(256))]
    pieces += [(piece, -float(score), 1) for score, piece in enumerate(reversed(LETTERS))]
    data = b"".join(
        field(1, field(1, piece.encode()) + field(2, score) + (field(3, kind) if kind != 1 else b""))
        for piece, score, kind in pieces
    )
    trainer = field(3, model_type) + field(35, 1) + field(4, len(pieces))
    normalizer = field(1, b"identity") + (field(2, charsmap) if charsmap else b"") + field(3, 1)
    return data + field(2, trainer) + field(3, normalizer + field(4, removes_spaces) + field(5, 1))


def checkpoint(directory: Path, data: bytes, config: dict[str, Any] | None = None) -> Path:
    write_tiny(directory, vocab_size=300, eos_token_id=2)
    (directory / "tokenizer.model").write_bytes(data)
    values = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **(config or {})}
    (directory / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    return directory


def built(directory: Path, **config: Any) -> Tokenizer:
    source = checkpoint(directory / "checkpoint", model(), config)
    build(BuildOptions(source, "m", directory / "repository"))
    return Tokenizer.from_directory(directory / "repository/m-tokenizer/1")


def test_ids_are_those_of_sentencepiece(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model())
    ours = built(tmp_path)
    for text in TEXTS:
        if "<s>" not in text and text:  # a text's own control tokens are ordinary text to sentencepiece
            assert ours.encode(text).tolist() == [1, *theirs.encode(text)], text
            assert ours.decode(ours.encode(text)) == text


def test_ids_are_the_pieces_of_the_highest_scores(tmp_path: Path) -> None:
    ours = built(tmp_path)
    pieces = [ours.visible_token(index) or "hidden" for index in ours.encode("hello the é").tolist()]
    assert pieces == ["hidden", "▁", "hel", "lo", "▁the", "▁", "<0xC3>", "<0xA9>"]  # as sentencepiece gives
    assert (ours.bos_id, ours.eos_id) == (1, 2)
    assert ours.decode(ours.encode("  hello the é")) == "  hello the é"


def test_a_space_before_each_part_is_the_legacy_form(tmp_path: Path) -> None:
    legacy, today = built(tmp_path / "legacy", legacy=True), built(tmp_path / "today", legacy=False)
    text = "hello</s>hello"
    assert legacy.encode(text).tolist() != today.encode(text).tolist()
    assert legacy.encode("hello").tolist() == today.encode("hello").tolist()


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", CheckpointError, "is not a sentencepiece model; convert"),
        (b"not protobuf at all", CheckpointError, "is not a sentencepiece model; convert"),
        (model()[:-3], CheckpointError, "is not a sentencepiece model; convert"),
        (model(model_type=1), UnsupportedError, "type 1, not of byte pairs; convert"),
        (model(removes_spaces=1), UnsupportedError, "that normalises text before it is cut; convert"),
        (model(charsmap=b"xx"), UnsupportedError, "that normalises text before it is cut; convert"),
    ],
)
def test_a_model_that_cannot_be_converted_is_named(
    tmp_path: Path, data: bytes, error: type[BuildError], message: str
) -> None:
    source = checkpoint(tmp_path / "checkpoint", data)
    with pytest.raises(error, match=message) as caught:
        open_checkpoint(source).write_tokenizer(tmp_path)
    assert str(source / "tokenizer.model") in str(caught.value)


@pytest.mark.parametrize("name", ["tekken.json", "vocab.json"])
def test_other_tokenizers_are_refused_by_name(tmp_path: Path, name: str) -> None:
    source = write_tiny(tmp_path / "checkpoint")
    (source / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"tokenizer.json does not exist, only {name} .*save_pretrained"):
        open_checkpoint(source).write_tokenizer(tmp_path)


def test_a_processor_s_template_is_named_where_there_is_no_other(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "checkpoint")
    (source / "chat_template.json").write_text('{"chat_template": "x"}')
    assert open_checkpoint(source).notes == (
        "warning: chat_template.json is a processor's and isn't read: put its template into chat_template.jinja",
    )
    (source / "chat_template.jinja").write_text("x")
    assert open_checkpoint(source).notes == ()
