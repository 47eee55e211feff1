"""Triton's adapter for a stateless engine on a CPU: rows → their targets' log-probabilities.

A repository's model.py imports it; its tensors are those of the plan that Triton's own tensorrt backend
runs on a GPU. Triton hands over a whole batch of requests, ragged as they are; all their rows are computed together.
Where no request of a batch asks for log probabilities, the hidden states alone are computed.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from deepseek_triton.ensemble.engine.runners.load import load_scoring_runner
from deepseek_triton.ensemble.engine.runners.scoring import RowScores
from deepseek_triton.ensemble.models.tensors import read_inputs
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.scoring.rows import RowError, ScoreRow, split_rows
from deepseek_triton.ensemble.scoring.settings import ScoringSettings


class TritonPythonModel:
    """Answers each request, of one row or several, with one response."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the artefacts that lie beside this file."""
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
        settings = ScoringSettings.from_model_config(args["model_config"])
        directory = Path(args["model_repository"]) / args["model_version"]
        self._runner = load_scoring_runner(directory, settings)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Score the rows of all requests in one batch; an invalid request gets an error of its own."""
        rows: list[ScoreRow] = []
        accepted: list[slice | str] = []  # each request's rows, or its error
        for request in requests:
            try:
                own = split_rows(read_inputs(request))
                for row in own:
                    row.check(self._runner.vocab_size, self._runner.max_seq_len)
            except RowError as error:
                accepted.append(str(error))
                continue
            accepted.append(slice(len(rows), len(rows) + len(own)))
            rows += own
        with_log_probs = any(contract.TOKEN_LOG_PROBS.name in one.requested_output_names() for one in requests)
        scores = self._runner.score(rows, with_log_probs=with_log_probs) if rows else []
        return [
            _error(place) if isinstance(place, str) else _response(scores[place], with_log_probs) for place in accepted
        ]


def _response(scores: list[RowScores], with_log_probs: bool) -> Any:
    values = {contract.HIDDEN_STATE: np.stack([row.hidden for row in scores])}
    if with_log_probs:
        values[contract.TOKEN_LOG_PROBS] = np.stack([row.log_probs for row in scores])
    return pb_utils.InferenceResponse([pb_utils.Tensor(spec.name, value) for spec, value in values.items()])


def _error(message: str) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
