"""The cross-entropy of sequences under a transformers model, over the tokens that are learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deepseek_triton.builders.lifecycle.learning.tokens import TokenSequence

if TYPE_CHECKING:
    from torch import Tensor


def summed_loss(model: Any, sequences: Sequence[TokenSequence], device: str) -> tuple[Tensor, int]:
    """The sum over all learnt tokens of the batch in nats, and their number."""
    import torch
    from torch.nn import functional

    length = max(len(one.ids) for one in sequences)
    ids = np.zeros((len(sequences), length), np.int64)
    targets = np.full((len(sequences), length), -100, np.int64)
    is_there = np.zeros((len(sequences), length), np.int64)
    for row, one in enumerate(sequences):
        ids[row, : len(one.ids)] = one.ids
        targets[row, : len(one.ids)] = np.where(one.is_learnt, one.ids, -100)
        is_there[row, : len(one.ids)] = 1
    tensors = {"input_ids": ids, "attention_mask": is_there}
    given = {name: torch.from_numpy(array).to(device) for name, array in tensors.items()}
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device != "cpu"):
        logits = model(**given, use_cache=False).logits[:, :-1]
    wanted = torch.from_numpy(targets[:, 1:]).to(device)
    loss = functional.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum")
    return loss, int((targets[:, 1:] >= 0).sum())


def mean_loss(model: Any, sequences: Sequence[TokenSequence], device: str, micro_batch: int) -> float:
    """The mean over all learnt tokens in nats; nothing is trained."""
    import torch

    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for part in parts(sequences, micro_batch):
            loss, num_tokens = summed_loss(model, part, device)
            total += float(loss)
            count += num_tokens
    return total / count


def parts(sequences: Sequence[TokenSequence], size: int) -> Iterator[Sequence[TokenSequence]]:
    """Pieces of `size` sequences."""
    for start in range(0, len(sequences), size):
        yield sequences[start : start + size]
