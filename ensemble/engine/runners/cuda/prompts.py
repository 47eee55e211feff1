"""Packs several slots' chunks of prompts into one batch of tokens: NumPy arrays, to be copied to the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.engine.runners.base import Ids, PromptChunk

Array = NDArray[np.int32]


@dataclass(frozen=True)
class PackedPrompts:
    """ids, slots, positions: [num_tokens], chunk after chunk; position −1: padding after the last.

    tiles: [num_tiles, 4] int32, at most `tile` queries of one chunk each: slot, position of the first query, its row,
    number of queries; zeros after the last. last_rows: [num_logits], the row of each chunk's last token, then zeros.
    """

    ids: Ids
    slots: Ids
    positions: Ids
    tiles: Array
    last_rows: Ids


def pack(
    chunks: Sequence[PromptChunk], *, tile: int, num_tokens: int = 0, num_tiles: int = 0, num_logits: int = 0
) -> PackedPrompts:
    """Concatenate the chunks, padded to at least the given sizes."""
    lengths = [len(chunk.ids) for chunk in chunks]
    total = max(sum(lengths), num_tokens)
    ids, slots = np.zeros(total, np.int64), np.zeros(total, np.int64)
    positions = np.full(total, -1, np.int64)
    tiles: list[tuple[int, int, int, int]] = []
    last_rows = []
    row = 0
    for chunk, length in zip(chunks, lengths, strict=True):
        end = row + length
        ids[row:end], slots[row:end] = chunk.ids, chunk.slot
        positions[row:end] = np.arange(chunk.start, chunk.start + length)
        for first in range(0, length, tile):
            tiles.append((chunk.slot, chunk.start + first, row + first, min(tile, length - first)))
        last_rows.append(end - 1)
        row = end
    # The tiles that read the most cache start first; short ones fill the gaps at the end.
    tiles.sort(key=lambda entry: -(entry[1] + entry[3]))
    padded = np.zeros((max(len(tiles), num_tiles), 4), np.int32)
    padded[: len(tiles)] = tiles
    rows = np.zeros(max(len(last_rows), num_logits), np.int64)
    rows[: len(last_rows)] = last_rows
    return PackedPrompts(ids, slots, positions, padded, rows)
