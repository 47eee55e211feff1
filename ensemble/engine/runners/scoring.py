"""The runner of a stateless engine on a CPU: rows in, their targets' log-probabilities out.

It runs the graph of `builders/engine/stateless.py`, feeding it what Triton's own backends would: every row's values
one behind the other. It knows nothing of text, labels or Triton.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ensemble.contract import HIDDEN_STATE, TOKEN_LOG_PROBS
from ensemble.engine.runners.base import RunnerError
from ensemble.manifest import Manifest
from ensemble.scoring.rows import GRAPH_FILE, ScoreRow, batch_tensors, group_rows
from ensemble.scoring.settings import ScoringSettings


@dataclass(frozen=True)
class RowScores:
    """log_probs [num_targets] of a row's targets; hidden [hidden] where its first logits are."""

    log_probs: NDArray[np.float32]
    hidden: NDArray[np.float32]


class ScoringRunner(Protocol):
    """What the stateless engine's adapter and its tests know of a model."""

    vocab_size: int
    max_seq_len: int

    def score(self, rows: Sequence[ScoreRow]) -> list[RowScores]:
        """Each row's scores, in order. The rows must have passed `ScoreRow.check`."""


class OnnxScoringRunner:
    """ONNX Runtime on the CPU.

    Raises:
        RunnerError: the file can't be loaded.
    """

    def __init__(self, path: Path, settings: ScoringSettings, *, vocab_size: int, max_seq_len: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = settings.num_threads or len(os.sched_getaffinity(0))
        options.inter_op_num_threads = 1
        # As in the other runner: spinning threads take the processor from the server and its tokenizer.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises its own classes, RuntimeError among them
            raise RunnerError(f"{path} can't be loaded by ONNX Runtime {ort.__version__}: {error}") from error
        self.vocab_size, self.max_seq_len = vocab_size, max_seq_len
        self._max_pass_tokens = settings.max_pass_tokens

    def score(self, rows: Sequence[ScoreRow]) -> list[RowScores]:
        scores: dict[int, RowScores] = {}
        for group in group_rows([len(row) for row in rows], self._max_pass_tokens):
            members = [rows[number] for number in group]
            log_probs, hidden = self._session.run([TOKEN_LOG_PROBS.name, HIDDEN_STATE.name], batch_tensors(members))
            ends = np.cumsum([len(row.target_ids) for row in members])[:-1]
            for number, own, state in zip(group, np.split(log_probs, ends), hidden, strict=True):
                scores[number] = RowScores(own, state)
        return [scores[number] for number in range(len(rows))]


def load_scoring_runner(directory: Path, settings: ScoringSettings) -> ScoringRunner:
    """Check the artefacts in `directory` against their manifest and load them.

    Raises:
        ManifestError: the artefacts or the installed packages don't fit the manifest.
        RunnerError: it is another target's, or loading failed.
    """
    manifest = Manifest.load(directory)
    manifest.verify(directory)
    if manifest.target != "onnx":
        raise RunnerError(f"{directory} is built for target {manifest.target!r}: Triton's own backend runs it")
    return OnnxScoringRunner(
        directory / GRAPH_FILE,
        settings,
        vocab_size=int(manifest.spec["vocab_size"]),
        max_seq_len=manifest.max_seq_len,
    )
