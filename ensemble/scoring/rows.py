"""Packs a prompt and its candidate continuations into one row of token ids, the input of a scoring engine.

A row holds the prompt once, then the tokens of each candidate except its last. Each candidate is a branch that attends
to the prompt and to itself. A candidate's last token is a target only, never an input. This module knows nothing of
text, graphs or Triton.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.protocol.contract import (
    BRANCH_IDS,
    LOGIT_POSITIONS,
    SCORE_IDS,
    TARGET_IDS,
    TARGET_LABELS,
    TARGET_LOGITS,
)

Ints = NDArray[np.int32]
GRAPH_FILE = "scoring.onnx"
PADDING = -1  # in branch_ids and target_labels

# Inputs that Triton adds to a ragged batch (`batch_input`), and a runner to its own batches.
ROW_LENS = "row_lens"
LOGIT_COUNTS = "logit_counts"
TARGET_COUNTS = "target_counts"
LONGEST_ROW = "longest_row"

# Further inputs and outputs of a CPU graph, one tensor per layer and kind of cache. Inputs: what a cache would hold of
# the prefix that all rows of a pass share [1, num_heads, prefix_len, head_dim]. Outputs: the same of the rows
# [batch, num_heads, seq_len, head_dim].
PREFIX = {"key": "prefix_keys_", "value": "prefix_values_", "latent": "prefix_latents_"}
OWN = {"key": "row_keys_", "value": "row_values_", "latent": "row_latents_"}

FIELDS = {
    "input_ids": SCORE_IDS,
    "branch_ids": BRANCH_IDS,
    "logit_positions": LOGIT_POSITIONS,
    "target_logits": TARGET_LOGITS,
    "target_ids": TARGET_IDS,
}


class RowError(ValueError):
    """A row is invalid; the message is one line."""


@dataclass(frozen=True)
class ScoreRow:
    """One row.

    input_ids [num_tokens]: the prompt, then each candidate's tokens except its last.
    branch_ids [num_tokens]: 0 for the prompt, i + 1 for candidate i.
    logit_positions [num_logits]: positions in the row whose logits are computed.
    target_logits [num_targets]: for each target token, the index into logit_positions that predicts it.
    target_ids [num_targets]: the target tokens.
    """

    input_ids: Ints
    branch_ids: Ints
    logit_positions: Ints
    target_logits: Ints
    target_ids: Ints

    def __len__(self) -> int:
        return len(self.input_ids)

    def begins_with(self, prefix: Ints) -> bool:
        """Return whether the prompt begins with `prefix` [n] and no logits of the prefix are needed."""
        n = len(prefix)
        return (
            len(self) > n
            and bool((self.input_ids[:n] == prefix).all() and (self.branch_ids[:n] == 0).all())
            and int(self.logit_positions.min()) >= n
        )

    def without(self, num_tokens: int) -> ScoreRow:
        """Return the row without its first `num_tokens`, whose logits must not be needed."""
        ids, branches = self.input_ids[num_tokens:], self.branch_ids[num_tokens:]
        return ScoreRow(ids, branches, self.logit_positions - np.int32(num_tokens), self.target_logits, self.target_ids)

    def to_first_logits(self) -> ScoreRow:
        """The row as far as its first logits see, and no target: what its hidden state is computed from."""
        first = self.logit_positions[:1]
        seen, none = slice(int(first[0]) + 1), self.target_ids[:0]
        return ScoreRow(self.input_ids[seen], self.branch_ids[seen], first, none, none)

    def check(self, vocab_size: int, max_seq_len: int) -> None:
        """Validate every value, since an invalid one would fail the whole batch.

        Raises:
            RowError: names the first invalid value.
        """
        if not 1 <= len(self) <= max_seq_len:
            raise RowError(f"input_ids holds {len(self)} tokens, must hold 1 to {max_seq_len}")
        if len(self.branch_ids) != len(self):
            raise RowError(f"branch_ids holds {len(self.branch_ids)} values, input_ids {len(self)}")
        if len(self.target_logits) != len(self.target_ids):
            raise RowError(f"target_logits holds {len(self.target_logits)} values, target_ids {len(self.target_ids)}")
        if self.branch_ids[0] != 0 or self.branch_ids.min() < 0:
            raise RowError("branch_ids must begin with 0 (the prompt) and be at least 0 except for padding at the end")
        if (self.branch_ids[: int((self.branch_ids == 0).sum())] != 0).any():
            raise RowError("branch_ids has 0, which is the prompt's, behind a candidate's tokens")
        if not (len(self.logit_positions) and len(self.target_ids)):
            raise RowError("logit_positions and target_ids must hold at least one value each")
        for name, limit in (
            ("input_ids", vocab_size),
            ("target_ids", vocab_size),
            ("logit_positions", len(self)),
            ("target_logits", len(self.logit_positions)),
        ):
            values = getattr(self, name)
            if values.min() < 0 or values.max() >= limit:
                raise RowError(f"{name} has values from {values.min()} to {values.max()}, must be 0 to {limit - 1}")


def make_row(prompt: Ints, candidates: Sequence[Ints]) -> tuple[ScoreRow, Ints]:
    """Return the row of `prompt` [n] and `candidates`, and the candidate index of each target [num_targets]."""
    ids, branches = [prompt], [np.zeros(len(prompt), np.int32)]
    positions, logits, labels = [len(prompt) - 1], [], []
    length = len(prompt)
    for number, candidate in enumerate(candidates):
        inner = candidate[:-1]
        ids.append(inner)
        branches.append(np.full(len(inner), number + 1, np.int32))
        logits += [0, *range(len(positions), len(positions) + len(inner))]
        positions += range(length, length + len(inner))
        labels += [number] * len(candidate)
        length += len(inner)
    row = ScoreRow(_ints(*ids), _ints(*branches), _ints(positions), _ints(logits), _ints(*candidates))
    return row, _ints(labels)


def stack_rows(rows: Sequence[tuple[ScoreRow, Ints]]) -> dict[str, Ints]:
    """Return the tensors [n, …] of one request by name; shorter rows are padded to the longest."""
    padding = {BRANCH_IDS.name: PADDING}
    tensors = {
        spec.name: _stack([getattr(row, name) for row, _ in rows], padding.get(spec.name, 0))
        for name, spec in FIELDS.items()
    }
    return tensors | {TARGET_LABELS.name: _stack([labels for _, labels in rows], PADDING)}


def split_rows(tensors: Mapping[str, NDArray[Any]]) -> list[ScoreRow]:
    """Return the rows of `stack_rows` without padding of the tokens.

    Raises:
        RowError: a tensor is missing, or the tensors are inconsistent.
    """
    for spec in FIELDS.values():
        if spec.name not in tensors:
            raise RowError(f"{spec.name} is missing")
        if tensors[spec.name].ndim != 2 or tensors[spec.name].shape[0] != tensors[SCORE_IDS.name].shape[0]:
            raise RowError(f"{spec.name} has shape {list(tensors[spec.name].shape)}, must be [rows, values]")
    rows = []
    for values in zip(*(tensors[spec.name] for spec in FIELDS.values()), strict=True):
        row = ScoreRow(*values)
        num_real = int((row.branch_ids != PADDING).sum())
        if not (row.branch_ids[num_real:] == PADDING).all():
            raise RowError("branch_ids has padding, -1, before a row's end")
        rows.append(ScoreRow(row.input_ids[:num_real], row.branch_ids[:num_real], *values[2:]))
    return rows


def batch_tensors(rows: Sequence[ScoreRow]) -> dict[str, Ints]:
    """Return the inputs of a scoring graph: the concatenated values of all rows, and the counts per row [n, 1]."""
    tensors = {FIELDS[f.name].name: np.concatenate([getattr(row, f.name) for row in rows]) for f in fields(ScoreRow)}
    for name, count_of in ((ROW_LENS, "input_ids"), (LOGIT_COUNTS, "logit_positions"), (TARGET_COUNTS, "target_ids")):
        tensors[name] = _ints([len(getattr(row, count_of)) for row in rows])[:, None]
    return tensors | {LONGEST_ROW: np.zeros(max(map(len, rows)), np.int32)}


def group_rows(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group the indices of rows by similar length, each group with at most `max_tokens` after padding (or one row).

    On a CPU larger batches than a few hundred tokens aren't faster, and padding costs as much as tokens.
    """
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def _stack(values: Sequence[Ints], padding: int) -> Ints:
    stacked = np.full((len(values), max(map(len, values))), padding, np.int32)
    for line, row in zip(stacked, values, strict=True):
        line[: len(row)] = row
    return stacked


def _ints(*parts: Any) -> Ints:
    return np.concatenate([np.asarray(part, np.int32) for part in parts])
