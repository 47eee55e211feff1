"""A whole decoder in arrays: it continues token ids, with its weights in one device's memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.fp8.forward.layer import PARTS
from deepseek_triton.builders.fp8.forward.values import LayerValues
from deepseek_triton.builders.fp8.rounding.arrays import Array, Arrays
from deepseek_triton.builders.graph.nodes import Read
from deepseek_triton.ensemble.decoder.spec import ModelSpec

Ids = NDArray[np.int64]
FREE_SHARE = 0.8  # of the memory that is free, for the weights in float32


def can_generate(spec: ModelSpec, arrays: Arrays) -> bool:
    """Whether every part has a forward pass and the weights fit into the memory of `arrays`."""
    parts = {type(part) for layer in range(spec.num_layers) for part in spec.parts(layer)}
    return parts <= set(PARTS) and spec.num_parameters() * 4 < arrays.free_bytes() * FREE_SHARE


class ArrayDecoder:
    """All layers of a decoder, embedding and head, float32.

    Args:
        read: gives the weights by name, in the order of `ModelSpec.tensor_shapes`.
        max_seq_len: tokens of a sequence.
    """

    def __init__(self, spec: ModelSpec, read: Read, arrays: Arrays, max_seq_len: int) -> None:
        self._spec, self._arrays = spec, arrays
        self._embedding = arrays.put(read("model.embed_tokens.weight"))
        self._layers = [LayerValues(spec, layer, read, arrays, max_seq_len) for layer in range(spec.num_layers)]
        self._norm = arrays.put(read("model.norm.weight"))
        self._head = self._embedding if spec.tie_word_embeddings else arrays.put(read("lm_head.weight"))

    def generate(self, tokens: Ids, num_tokens: int, choose: Callable[[NDArray[np.float32]], Ids]) -> Ids:
        """Continue `tokens` [n, seq_len] by `num_tokens`: [n, seq_len + num_tokens].

        choose: one token [n, 1] for each row of logits [n, vocab_size].
        """
        for values in self._layers:
            values.cache, values.start = {}, 0
        step = tokens
        for _ in range(num_tokens):
            step = choose(self._arrays.get(self._logits(step)))
            tokens = np.concatenate([tokens, step], axis=1)
        return tokens

    def _logits(self, ids: Ids) -> Array:
        """The logits [n, vocab_size] after `ids` [n, seq_len], which the caches hold afterwards."""
        hidden = self._embedding[self._arrays.index(ids)]
        for values in self._layers:
            for part in self._spec.parts(values.layer):
                hidden = PARTS[type(part)](values, part, hidden)
            values.taps.clear()
            values.start += ids.shape[1]
        last = hidden[:, -1]
        mean_square = self._arrays.xp.mean(last * last, -1, keepdims=True)
        normed = last / self._arrays.xp.sqrt(mean_square + self._spec.rms_norm_eps) * self._norm
        return normed @ self._head.T
