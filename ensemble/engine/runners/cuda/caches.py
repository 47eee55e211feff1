"""The KV caches of all layers on one device, as the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PAGE = 64  # positions of a block of the cache: what a kernel reads at a time lies in one


@dataclass(frozen=True)
class Caches:
    """Keys and values of every layer, each [layers, slots, kv_heads, max_seq_len, head_dim], or in blocks.

    table: [slots, most blocks of a slot] int32; keys and values are then [layers, blocks, kv_heads, PAGE, head_dim].
    key_scales and value_scales: [layers, blocks, kv_heads, PAGE] bfloat16, of keys and values in INT8. Of latent
    attention, keys and values are one tensor: one head of latents, each with its rotated key.
    """

    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor | None = None
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    @property
    def extent(self) -> int:
        """Positions of a slot, or entries of its table."""
        return self.keys.shape[-2] if self.table is None else self.table.shape[1]

    @property
    def page(self) -> int:
        """Positions of a block; 0: slots are whole."""
        return 0 if self.table is None else self.keys.shape[-2]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those that there are."""
        tensors = (*self.stored, self.table, self.key_scales, self.value_scales)
        return tuple(tensor for tensor in tensors if tensor is not None)

    @property
    def stored(self) -> tuple[torch.Tensor, ...]:
        """Keys and values, each tensor once."""
        return (self.keys,) if self.values is self.keys else (self.keys, self.values)

    def layer(self, index: int) -> Caches:
        """One layer's, each without the first dimension."""
        keys = self.keys[index]
        values = keys if self.values is self.keys else self.values[index]
        if self.key_scales is None or self.value_scales is None:
            return Caches(keys, values, self.table)
        return Caches(keys, values, self.table, self.key_scales[index], self.value_scales[index])
