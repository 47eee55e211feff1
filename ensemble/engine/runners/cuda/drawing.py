"""Logits to tokens on the device: the two kernels that look through them and draw."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton

from ensemble.engine.runners.cuda.kernels import sampling
from ensemble.engine.runners.cuda.launcher import Launcher

SCAN_CHUNK = 4096  # logits that one program looks through
DRAW_BLOCK = 4096


def draw_tokens(
    launch: Launcher,
    logits: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
    tokens: torch.Tensor,
    log_probs: torch.Tensor,
) -> None:
    """Draw row by row into `tokens` [rows] int64 and `log_probs` [rows] float32.

    Args:
        logits: [rows, vocab_size] float32.
        inputs: how each row draws, as `buffers.INPUTS` has it.
    """
    size, vocab_size = logits.shape
    chunks = int(triton.cdiv(vocab_size, SCAN_CHUNK))
    best, total = launch.empty(size, chunks), launch.empty(size, chunks)
    where = launch.empty(size, chunks, dtype=torch.int32)
    launch(
        sampling.scan_logits, (chunks, size), logits, best, where, total,
        V=vocab_size, CHUNK=SCAN_CHUNK, CHUNKS=chunks, num_warps=4,
    )  # fmt: skip
    launch(
        sampling.draw_tokens, (size,), logits, best, where, total,
        inputs["temperatures"], inputs["top_ks"], inputs["top_ps"], inputs["min_ps"], inputs["seeds"],
        inputs["steps"], tokens, log_probs,
        V=vocab_size, CHUNKS=chunks, BLOCK_CHUNKS=triton.next_power_of_2(chunks), BLOCK=DRAW_BLOCK,
        num_warps=16,
    )  # fmt: skip
