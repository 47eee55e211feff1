"""A head that is stored is the one that is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from deepseek_triton.builders.checkpoint.config.hf_config import from_hf
from deepseek_triton.builders.checkpoint.files import tied_head
from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import CheckpointError
from tests.support.checkpoints import TINY, random_tensors, write_tiny

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIED: dict[str, Any] = {**TINY, "tie_word_embeddings": True}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_head_of_its_own_is_read(tmp_path: Path, dtype: Any) -> None:
    tensors = {name: array.astype(dtype) for name, array in random_tensors(from_hf(TIED)).items()}
    tensors[HEAD] = tensors[EMBEDDING].copy()
    tensors[HEAD][-1, -1] += 1  # the last value alone differs
    checkpoint = open_checkpoint(write_tiny(tmp_path, tensors, tie_word_embeddings=True))
    assert not checkpoint.spec.tie_word_embeddings
    np.testing.assert_array_equal(checkpoint.read(HEAD), tensors[HEAD])


def test_a_head_that_is_the_embedding_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tied_head, "BLOCK_BYTES", 100)  # compared in several blocks, the last a short one
    tensors = random_tensors(from_hf(TIED))
    tensors[HEAD] = tensors[EMBEDDING]
    checkpoint = open_checkpoint(write_tiny(tmp_path, tensors, tie_word_embeddings=True))
    assert checkpoint.spec.tie_word_embeddings and HEAD not in checkpoint.spec.tensor_shapes()


def test_a_head_of_another_type_is_read(tmp_path: Path) -> None:
    tensors = random_tensors(from_hf(TIED))
    tensors[HEAD] = tensors[EMBEDDING].astype(np.float16)
    assert not open_checkpoint(write_tiny(tmp_path, tensors, tie_word_embeddings=True)).spec.tie_word_embeddings


def test_without_a_head_in_the_file_the_configuration_counts(tmp_path: Path) -> None:
    tensors = random_tensors(from_hf(TIED))
    assert open_checkpoint(write_tiny(tmp_path / "tied", tensors, tie_word_embeddings=True)).spec.tie_word_embeddings
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        open_checkpoint(write_tiny(tmp_path / "untied", tensors))


def test_a_head_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    tensors = random_tensors(from_hf(TIED))
    tensors[HEAD] = tensors[EMBEDDING][:-1]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \[15, 8\], expected \[16, 8\]"):
        open_checkpoint(write_tiny(tmp_path, tensors, tie_word_embeddings=True))
