"""sentencepiece's tokenizer.model → the same tokenizer of the tokenizers library.

A file enters, read without sentencepiece itself: it is one protobuf message, of which three fields are needed. What
leaves is what transformers' converter for Llama makes of it.

Source: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from deepseek_triton.builders.checkpoint.tokenizer.byte_fallback import PieceType, byte_fallback_tokenizer
from deepseek_triton.builders.errors import CheckpointError, UnsupportedError

BYTE_PAIRS = 2  # TrainerSpec.ModelType.BPE
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # protobuf's wire types


@dataclass(frozen=True)
class SentencePieceModel:
    """pieces, scores, types: of each id. model_type: TrainerSpec's. adds_prefix: a text gets a space before."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    model_type: int
    adds_prefix: bool
    removes_spaces: bool
    has_charsmap: bool


def convert_sentencepiece(file: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of `file`; config: tokenizer_config.json, which may switch the leading space off.

    Raises:
        CheckpointError: the file is damaged.
        UnsupportedError: it is of a kind that has no conversion here.
    """
    how = "convert the tokenizer with transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…)"
    try:
        model = read_model(file.read_bytes())
    except (ValueError, IndexError, struct.error) as error:
        raise CheckpointError(f"{file} is not a sentencepiece model; {how}") from error
    if model.model_type != BYTE_PAIRS:
        raise UnsupportedError(f"{file} is a sentencepiece model of type {model.model_type}, not of byte pairs; {how}")
    if model.removes_spaces or model.has_charsmap:
        raise UnsupportedError(f"{file} is a sentencepiece model that normalises text before it is cut; {how}")
    adds_prefix = config.get("add_prefix_space")
    tokenizer = byte_fallback_tokenizer(
        model.pieces,
        model.scores,
        model.types,
        has_prefix=model.adds_prefix if adds_prefix is None else bool(adds_prefix),
        prefixes_every_part=config.get("legacy") is not False,
    )
    special = (PieceType.UNKNOWN, PieceType.CONTROL)
    tokenizer.add_tokens(
        [
            AddedToken(piece, special=kind in special, normalized=False)
            for piece, kind in zip(model.pieces, model.types, strict=True)
            if kind in (*special, PieceType.USER_DEFINED)
        ]
    )
    return tokenizer


def read_model(data: bytes) -> SentencePieceModel:
    """The parts of a ModelProto that make a tokenizer; what isn't there has protobuf's defaults."""
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(value))
            pieces.append(piece[1].decode("utf-8"))
            scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
            types.append(piece.get(3, PieceType.NORMAL))
        elif field == 2:
            trainer = dict(_fields(value))
        elif field == 3:
            normalizer = dict(_fields(value))
    if not pieces:
        raise ValueError("it holds no pieces")
    return SentencePieceModel(
        tuple(pieces), tuple(scores), tuple(types),
        model_type=trainer.get(3, 1),
        adds_prefix=bool(normalizer.get(3, 1)),
        removes_spaces=bool(normalizer.get(4, 1)),
        has_charsmap=bool(normalizer.get(2)),
    )  # fmt: skip


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Each field of a protobuf message: its number, and its value (an int, or bytes)."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        field, wire = key >> 3, key & 7
        if wire == VARINT:
            value, position = _varint(data, position)
            yield field, value
            continue
        if wire == BYTES:
            length, position = _varint(data, position)
        elif wire in (FIXED32, FIXED64):
            length = 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        if field == 0 or position + length > len(data):
            raise ValueError("a field goes past the end")
        yield field, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number that begins at `position`, and where the next field begins."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
        if shift > 63:
            raise ValueError("a number has more than 64 bits")
