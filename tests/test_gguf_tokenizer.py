"""The table of pre-tokenizers against real tokenizers, and SentencePiece's merges against its own rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from builders.gguf_tokenizer import BYTE_PAIR_RULES, GGUFTokenizerError, merges_of_scores, write_tokenizer
from ensemble.text import Tokenizer
from tests.real_tokenizers import HARD_TEXTS, deepseek_directory, smollm2, smollm2_directory


class FakeField:
    def __init__(self, value: Any) -> None:
        self.value = value

    def contents(self) -> Any:
        return self.value


class FakeReader:
    """A GGUF's metadata without the GGUF; `fields` holds whole keys, the arguments those of the tokenizer."""

    def __init__(self, chat_template: str | None = None, **ggml: Any) -> None:
        values = {f"tokenizer.ggml.{key}": value for key, value in ggml.items() if value is not None}
        if chat_template is not None:
            values["tokenizer.chat_template"] = chat_template
        self.fields = {key: FakeField(value) for key, value in values.items()}


TINY_BPE: dict[str, Any] = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": ["<s>", "</s>", "a", "b", "ab", "Ġ", "<tool>"],
    "token_type": [3, 3, 1, 1, 1, 1, 4],
    "merges": ["a b"],
    "bos_token_id": 0,
    "eos_token_id": 1,
}
PIECES = ["▁", "h", "e", "l", "o", "he", "ll", "llo", "▁he", "hello", "▁hello", "▁h"]
TINY_SENTENCEPIECE: dict[str, Any] = {
    "model": "llama",
    "tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES],
    "token_type": [2, 3, 3, *[6] * 256, *[1] * len(PIECES)],
    "scores": [0.0] * 259 + [-float(rank) for rank in range(len(PIECES))],
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def written(directory: Path, metadata: dict[str, Any], **changes: Any) -> Tokenizer:
    write_tokenizer(FakeReader(**{**metadata, **changes}), directory)
    return Tokenizer.from_directory(directory)


# --- byte-level BPE


def test_deepseek_rebuilt_from_gguf_metadata_gives_its_own_ids(tmp_path: Path) -> None:
    source = deepseek_directory() / "tokenizer.json"
    spec = json.loads(source.read_text(encoding="utf-8"))
    added = {token["id"]: token for token in spec["added_tokens"]}
    tokens = {**{i: token for token, i in spec["model"]["vocab"].items()}, **{i: t["content"] for i, t in added.items()}}
    ours = written(
        tmp_path,
        {
            "model": "gpt2",
            "pre": "deepseek-v3",
            "tokens": [tokens[i] for i in range(len(tokens))],
            "token_type": [1 if i not in added else 3 if added[i]["special"] else 4 for i in range(len(tokens))],
            "merges": [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]],
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    )
    theirs = Backend.from_file(str(source))
    for text in HARD_TEXTS:
        assert ours.encode(text).tolist() == theirs.encode(text).ids, text
    assert ours.decode(range(len(tokens))) == theirs.decode(list(range(len(tokens))))


# Ids of SmolLM2-135M-Instruct's own tokenizer.json: this tokenizer's ids of llama.cpp's check text have the hash that
# llama.cpp records for it (`smollm` in convert_hf_to_gguf.py), and then gave these.
SMOLLM2_IDS: dict[str, list[int]] = {}


@pytest.mark.parametrize("text", SMOLLM2_IDS)
def test_smollm2_ids(text: str) -> None:
    assert smollm2().encode(text).tolist() == SMOLLM2_IDS[text]
