"""The tensors that a checkpoint may hold beside a decoder's own: they take no part in what the model computes.

Everything that is in no row of the table is refused by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ATTENTION = r"(?:.*\.)?(?:self_attn|attn|attention)"


@dataclass(frozen=True)
class UnusedTensor:
    """Names that match `pattern` whole. what: the tensor, in words. num_dims: those that it has, where that tells it
    from a tensor that takes part.
    """

    pattern: str
    what: str
    num_dims: tuple[int, ...] | None = None

    def matches(self, name: str, shape: tuple[int, ...]) -> bool:
        """Is a tensor of this name and shape one of these?"""
        return re.fullmatch(self.pattern, name) is not None and (self.num_dims is None or len(shape) in self.num_dims)


UNUSED_TENSORS = (
    UnusedTensor(
        r"(?:.*\.)?rotary_emb\.(?:original_)?(?:inv_freq|cos_cached|sin_cached)",
        "rotary tables: computed from the configuration",
    ),
    UnusedTensor(r"(?:.*\.)?attn_rot_embd\.weight", "a GGUF's rotary frequencies: computed from the metadata"),
    UnusedTensor(rf"{ATTENTION}\.bias", "the causal mask as a buffer [1, 1, n, n]", (4,)),
    UnusedTensor(rf"{ATTENTION}\.masked_bias", "the causal mask's number for what is hidden", (0, 1)),
    UnusedTensor(r"(?:.*\.)?position_ids", "positions 0, 1, 2, … as a buffer"),
    UnusedTensor(
        rf"{ATTENTION}(?:\.attn)?\.(?:[qkv]|kv|prob)_(?:scale|zero_point)",
        "scales of an FP8 cache: the caches here have 16 or 32 bits",
    ),
    UnusedTensor(
        rf"{ATTENTION}\.[qkv]_proj\.(?:[kv]_scale|output_scale|output_zero_point)",
        "scales of an FP8 cache, as written beside the layers that fill it",
    ),
    UnusedTensor(r"(?:v_head|value_head|reward_head)\..+", "a head for reinforcement learning"),
    UnusedTensor(r"score\.(?:weight|bias)", "a classifier's head"),
)


def is_unused(name: str, shape: tuple[int, ...]) -> bool:
    """May a tensor be left out?"""
    return any(unused.matches(name, shape) for unused in UNUSED_TENSORS)


# Names in a checkpoint of the decoder without its head, which lack "model.".
BARE_PREFIXES = ("layers.", "embed_tokens.", "norm.", "rotary_emb.")


def with_prefix(name: str) -> str:
    """The name with the prefix `model.`, which checkpoints of the bare decoder leave out."""
    return f"model.{name}" if name.startswith(BARE_PREFIXES) else name
