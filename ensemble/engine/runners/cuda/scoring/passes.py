"""Rows → passes: which sequences a pass computes, and which blocks of the cache each of them reads and writes.

A prompt is one sequence, and so is each candidate of several tokens. A candidate's sequence reads the full blocks of
its prompt, which the prompt writes in the same pass or in an earlier one, and computes the prompt's last, unfinished
block again. Rows that begin with the shared prefix read its blocks. It knows nothing of torch or of a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from deepseek_triton.ensemble.scoring.rows import Ints, ScoreRow

FEWEST_LOGITS, TOKENS_A_LOGIT = 64, 16  # each logit is a row of the head's product, whose result takes memory


@dataclass(frozen=True)
class Prefix:
    """Tokens that most prompts begin with, a number of whole blocks, and the blocks that hold their cache."""

    ids: Ints
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class PassLimits:
    """What a pass holds at most: tokens, and logits, of which each sequence has one or more.

    num_blocks: blocks of the cache, for a pass, one row's prompt and the prefix. block: tokens of a block.
    """

    num_tokens: int
    num_logits: int
    num_blocks: int
    block: int

    @classmethod
    def of(cls, max_pass_tokens: int, max_seq_len: int, prefix_len: int, block: int) -> PassLimits:
        """Limits that hold any row: a pass has at least `max_seq_len` tokens."""
        num_tokens = max(max_pass_tokens, max_seq_len)
        num_logits = min(num_tokens, max(FEWEST_LOGITS, num_tokens // TOKENS_A_LOGIT))
        # Sequences end in unfinished blocks: a pass of very short ones ends with the blocks, before its tokens.
        num_blocks = 2 * -(-num_tokens // block) + -(-max_seq_len // block) + prefix_len // block
        return cls(num_tokens, num_logits, num_blocks, block)


@dataclass(frozen=True)
class ScoredSequence:
    """One slot of a pass.

    row: index of its row. ids [n]: the tokens that are computed, from position `start` on, the first of a block.
    blocks: those of positions 0, 1, …. logits [k]: which of the row's logits are read; places [k]: at which of `ids`.
    """

    row: int
    ids: Ints
    start: int
    blocks: tuple[int, ...]
    logits: Ints
    places: Ints


@dataclass(frozen=True)
class _Part:
    """A sequence without its blocks."""

    is_prompt: bool
    ids: Ints
    start: int
    logits: Ints
    places: Ints


def plan_passes(rows: Sequence[ScoreRow], prefix: Prefix, limits: PassLimits) -> Iterator[list[ScoredSequence]]:
    """The passes that score `rows`, to be computed in their order."""
    free = [block for block in range(limits.num_blocks, 0, -1) if block not in prefix.blocks]  # 0 is nobody's
    current: list[ScoredSequence] = []
    used: list[int] = []  # blocks that are free again after the current pass
    for number, row in enumerate(rows):
        start = len(prefix.ids) if prefix.blocks and row.begins_with(prefix.ids) else 0
        prompt, kept = prefix.blocks[: start // limits.block], list[int]()
        for part in _parts(row, start, limits):
            shared = prompt[: part.start // limits.block]
            needed = -(-(part.start + len(part.ids)) // limits.block) - len(shared)
            if not _fits(part, needed, current, limits, len(free)):
                yield current
                free += used
                current, used = [], []
            own = [free.pop() for _ in range(needed)]
            if part.is_prompt and not kept:
                prompt, kept = shared + tuple(own), own
            else:
                used += own
            current.append(ScoredSequence(number, part.ids, part.start, shared + tuple(own), part.logits, part.places))
        used += kept
    if current:
        yield current


def _fits(part: _Part, needed: int, current: Sequence[ScoredSequence], limits: PassLimits, num_free: int) -> bool:
    tokens = len(part.ids) + sum(len(other.ids) for other in current)
    logits = max(1, len(part.logits)) + sum(max(1, len(other.logits)) for other in current)
    return tokens <= limits.num_tokens and logits <= limits.num_logits and needed <= num_free


def _parts(row: ScoreRow, start: int, limits: PassLimits) -> Iterator[_Part]:
    """The prompt from position `start` on, then the candidates whose logits are read; few logits at a time."""
    branches = row.branch_ids[row.logit_positions]
    num_prompt = int((row.branch_ids == 0).sum())
    for branch in [0, *np.unique(branches[branches > 0])]:
        first = num_prompt // limits.block * limits.block if branch else start
        own = np.flatnonzero(row.branch_ids == branch) if branch else np.zeros(0, np.int64)
        columns = np.concatenate([np.arange(first, num_prompt), own])
        if not len(columns):  # the prompt is the prefix, and only candidates' logits are read
            continue
        logits = np.flatnonzero(branches == branch).astype(np.int32)
        places = np.searchsorted(columns, row.logit_positions[logits]).astype(np.int32)
        for at in range(0, max(1, len(logits)), limits.num_logits):
            chosen = slice(at, at + limits.num_logits)
            yield _Part(not branch, row.input_ids[columns], first, logits[chosen], places[chosen])
