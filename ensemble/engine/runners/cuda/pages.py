"""The runner's caches in memory: whole slots, or as many blocks as there is room for, and the tables that name them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.engine.runners.cuda.buffers import staged
from deepseek_triton.ensemble.engine.runners.cuda.caches import PAGE, Caches
from deepseek_triton.ensemble.protocol.settings import KvCache

SCALE_BYTES = 2  # of one head of one token in INT8
CHANGES = 4096  # entries of tables that are copied at once


@dataclass(frozen=True)
class CacheForm:
    """What the caches are made of. tokens: positions of all blocks at most; 0: as many as there is room for."""

    kind: KvCache = "slots"
    tokens: int = 0

    @property
    def is_paged(self) -> bool:
        """Whether it has blocks."""
        return self.kind != "slots"

    @property
    def is_int8(self) -> bool:
        """Whether keys and values are 8-bit integers."""
        return self.kind == "pages-int8"

    def block_bytes(self, shape: DecoderShape, itemsize: int) -> int:
        """Bytes of a block in the caches of all layers; itemsize: of what isn't INT8."""
        token = shape.token_elements() * (1 if self.is_int8 else itemsize)
        if self.is_int8:
            token += 2 * shape.num_kv_heads * SCALE_BYTES
        return shape.num_layers * PAGE * token

    def most_blocks(self, max_num_seqs: int, max_seq_len: int) -> int:
        """Blocks that can be used: those of all sequences at their longest, or those of `tokens`."""
        return -(-self.tokens // PAGE) if self.tokens else max_num_seqs * -(-max_seq_len // PAGE)

    def allocate(
        self, shape: DecoderShape, slots: int, extent: int, dtype: torch.dtype, device: torch.device
    ) -> Caches:
        """Allocate caches; extent: positions of a slot, or all blocks, nobody's among them."""
        kept = shape.parts(0)[0].cache
        rows = (slots, kept[0].num_heads, extent) if not self.is_paged else (extent, kept[0].num_heads, PAGE)
        size = (shape.num_layers, *rows)
        stored = torch.int8 if self.is_int8 else dtype
        # Zeros, not empty: a masked position is multiplied by 0, and 0 x NaN is NaN.
        tensors = [torch.zeros(*size, tensor.head_dim, dtype=stored, device=device) for tensor in kept]
        keys, values = tensors[0], tensors[-1]
        if not self.is_paged:
            return Caches(keys, values)
        table = torch.zeros(slots, -(-shape.max_seq_len // PAGE), dtype=torch.int32, device=device)
        if not self.is_int8:
            return Caches(keys, values, table)
        key_scales, value_scales = (torch.ones(size, dtype=torch.bfloat16, device=device) for _ in range(2))
        return Caches(keys, values, table, key_scales, value_scales)


SLOTS = CacheForm()


class TableChanges:
    """Changes of the tables [slots, blocks of a slot], copied to the device in the order of the stream."""

    def __init__(self, table: torch.Tensor | None) -> None:
        self._table = torch.zeros(0, 0, dtype=torch.int32) if table is None else table
        self._entries: dict[int, int] = {}  # index in the flat table → block
        self._indices = torch.zeros(CHANGES, dtype=torch.int64, device=self._table.device)
        self._blocks = torch.zeros(CHANGES, dtype=torch.int32, device=self._table.device)

    def set(self, slot: int, first: int, blocks: Sequence[int]) -> None:
        """Note that entries first, first + 1, … of `slot` become `blocks`."""
        start = slot * self._table.shape[1] + first
        self._entries.update(enumerate(blocks, start))

    def copy(self) -> None:
        """Copy what was noted, for the calls that are begun later; allocates nothing on the device."""
        if not self._entries:
            return
        indices, blocks = np.array(list(self._entries)), np.array(list(self._entries.values()), np.int32)
        self._entries.clear()
        for first in range(0, len(indices), CHANGES):
            part = slice(first, first + CHANGES)
            count = len(indices[part])
            self._indices[:count].copy_(staged(indices[part], self._table.device), non_blocking=True)
            self._blocks[:count].copy_(staged(blocks[part], self._table.device), non_blocking=True)
            self._table.view(-1).scatter_(0, self._indices[:count], self._blocks[:count])


def describe_room(num_tokens: int, max_seq_len: int, max_num_seqs: int) -> str:
    """«room for 412,000 tokens: 12 sequences of 32,768 or 201 of 2,048», at most `max_num_seqs` sequences."""
    lengths = [max_seq_len] + ([2048] if max_seq_len > 2048 else [])
    told = [f"{min(max_num_seqs, num_tokens // (-(-length // PAGE) * PAGE)):,}" for length in lengths]
    sequences = f"{told[0]} sequences of {max_seq_len:,}" + "".join(f" or {count} of 2,048" for count in told[1:])
    return f"room for {num_tokens:,} tokens: {sequences}"
