"""Small random models with a token for each byte: for tests of mechanics, which need no language.

With 320 tokens instead of SmolLM2's 49,152, a server of one starts with half the processor time and makes a token in
half.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepseek_triton.builders.checkpoint.config.hf_config import from_hf
from tests.support.checkpoints import TINY, make_tokenizer, random_tensors, write_tiny

BYTES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "eos_token_id": 319,
    "tie_word_embeddings": True,
}  # fmt: skip


def write_byte_model(directory: Path, seed: int = 0, scale: float = 1.0) -> Path:
    """A checkpoint; the seed chooses its weights, whose standard deviation is `scale`."""
    tensors = random_tensors(from_hf({**TINY, **BYTES}), seed)
    write_tiny(directory, {name: array * scale for name, array in tensors.items()}, **BYTES)
    return make_tokenizer(directory, BYTES["vocab_size"])
