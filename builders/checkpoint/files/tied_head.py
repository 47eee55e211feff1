"""A head that is stored although the configuration ties it to the embedding: it is used, unless it is the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from deepseek_triton.builders.checkpoint.files.safetensors import TensorLocation
from deepseek_triton.ensemble.decoder.spec import ModelSpec

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
BLOCK_BYTES = 2**24


def with_stored_head(spec: ModelSpec, tensors: Mapping[str, TensorLocation]) -> ModelSpec:
    """`spec`, untied where `tensors` holds a head of its own, as a fine-tune leaves it.

    Files that tie and store both hold the same values twice: those are shared.
    """
    if not spec.tie_word_embeddings or HEAD not in tensors or EMBEDDING not in tensors:
        return spec
    return spec if _are_equal(tensors[HEAD], tensors[EMBEDDING]) else replace(spec, tie_word_embeddings=False)


def _are_equal(head: TensorLocation, embedding: TensorLocation) -> bool:
    if (head.dtype, head.shape, head.length) != (embedding.dtype, embedding.shape, embedding.length):
        return False
    for position in range(0, head.length, BLOCK_BYTES):
        size = min(BLOCK_BYTES, head.length - position)
        first, second = (
            np.fromfile(tensor.file, np.uint8, count=size, offset=tensor.offset + position)
            for tensor in (head, embedding)
        )
        if not np.array_equal(first, second):
            return False
    return True
