"""The runner of a scoring engine on a CPU: rows in, log probabilities of their targets out.

It runs the scoring graph of `builders/graph/decoder.py` on the inputs that Triton's own backends would form: the values
of all rows, concatenated. The tokens that a template puts at the beginning of all prompts are computed once, at load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.engine.runners.onnx.session import open_session, without_denormals
from deepseek_triton.ensemble.engine.runners.scoring import RowScores
from deepseek_triton.ensemble.protocol.contract import HIDDEN_STATE, TOKEN_LOG_PROBS
from deepseek_triton.ensemble.scoring.rows import OWN, PREFIX, ScoreRow, batch_tensors, group_rows, make_row
from deepseek_triton.ensemble.scoring.settings import ScoringSettings


class OnnxScoringRunner:
    """ONNX Runtime on the CPU.

    prefix: token ids that most prompts begin with. Rows that begin so reuse its keys and values; others are computed
    whole.

    Raises:
        RunnerError: the file can't be loaded.
    """

    def __init__(
        self, path: Path, settings: ScoringSettings, *, vocab_size: int, max_seq_len: int, prefix: Sequence[int] = ()
    ) -> None:
        self._session = open_session(path, settings.num_threads)
        self.vocab_size, self.max_seq_len = vocab_size, max_seq_len
        self._max_pass_tokens = settings.max_pass_tokens
        self._prefix = np.array(prefix, np.int32)
        self._empty = self._no_prefix()
        self._shared = self._compute_prefix() if len(prefix) else self._empty
        self._warm_up()

    def score(self, rows: Sequence[ScoreRow], *, with_log_probs: bool = True) -> list[RowScores]:
        if not with_log_probs:
            rows = [row.to_first_logits() for row in rows]
        num_shared = len(self._prefix)
        is_shared = [bool(num_shared) and row.begins_with(self._prefix) for row in rows]
        scores: dict[int, RowScores] = {}
        for kind, prefix in ((True, self._shared), (False, self._empty)):
            numbers = [number for number, own in enumerate(is_shared) if own is kind]
            members = [rows[number].without(num_shared) if kind else rows[number] for number in numbers]
            for group in group_rows([len(row) for row in members], self._max_pass_tokens):
                found = self._pass([members[place] for place in group], prefix)
                scores |= {numbers[place]: own for place, own in zip(group, found, strict=True)}
        return [scores[number] for number in range(len(rows))]

    def _pass(self, rows: Sequence[ScoreRow], prefix: Mapping[str, NDArray[Any]]) -> list[RowScores]:
        """Rows without a target have no log probabilities; where none has one, the graph leaves out the head."""
        feeds = {**batch_tensors(rows), **prefix}
        log_probs, hidden = self._run([TOKEN_LOG_PROBS.name, HIDDEN_STATE.name], feeds)
        ends = np.cumsum([len(row.target_ids) for row in rows])[:-1]
        return [RowScores(own, state) for own, state in zip(np.split(log_probs, ends), hidden, strict=True)]

    def _run(self, names: list[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The graph's outputs of these names."""
        with without_denormals():
            values: list[NDArray[Any]] = self._session.run(names, feeds)
        return values

    def _warm_up(self) -> None:
        """Score one row, so that the first request isn't slower than the next."""
        first, second = np.zeros(1, np.int32), np.zeros(1, np.int32)
        row, _ = make_row(np.concatenate([self._prefix, first]), [second])
        self.score([row])

    def _no_prefix(self) -> dict[str, NDArray[Any]]:
        """Empty keys and values; an empty dictionary for a graph that takes no prefix."""
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        inputs = (value for value in self._session.get_inputs() if value.name.startswith(tuple(PREFIX.values())))
        return {value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), types[value.type]) for value in inputs}

    def _compute_prefix(self) -> dict[str, NDArray[Any]]:
        """Compute the prefix's keys and values in a pass over it alone."""
        row, _ = make_row(self._prefix, [self._prefix[:1]])
        own = {
            name: name.replace(PREFIX[kind], OWN[kind])
            for name in self._empty
            for kind in PREFIX
            if PREFIX[kind] in name
        }
        values = self._run(list(own.values()), {**batch_tensors([row]), **self._empty})
        return dict(zip(own, values, strict=True))
