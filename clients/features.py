"""The features of a text that calibration is fitted on: its labels' scores and its hidden state.

The client calls the model's tokenizer and engine one after the other, as the ensemble does, but not its scorer. It
knows the names of the ensemble's parts and nothing of fitting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_triton.clients.base import BaseClient
from deepseek_triton.clients.score import ScoreRequest, Tensor
from deepseek_triton.ensemble.protocol import contract


@dataclass(frozen=True)
class Features:
    """The log-probability and the label of each target token (-1: padding) of one text, and its hidden state."""

    log_probs: tuple[float, ...]
    target_labels: tuple[int, ...]
    hidden: tuple[float, ...]


def read_features(client: BaseClient, texts: Sequence[str]) -> list[Features]:
    """Features of `texts`, for the labels that the model was built with. Raises `ClientError`."""
    inputs = ScoreRequest(texts=texts).to_tensors()
    rows = client.infer(f"{client.model}-tokenizer", inputs, contract.SCORE_TOKENIZER.outputs)
    passed: dict[contract.TensorSpec, Tensor] = {spec: rows[spec.name] for spec in contract.SCORE_ROW}
    scored = client.infer(f"{client.model}-engine", passed, contract.SCORE_ENGINE.outputs)
    columns = (scored[contract.TOKEN_LOG_PROBS.name], rows[contract.TARGET_LABELS.name])
    hidden = scored[contract.HIDDEN_STATE.name].rows()
    return [
        Features(tuple(log_probs), tuple(labels), tuple(state))
        for log_probs, labels, state in zip(*(column.rows() for column in columns), hidden, strict=True)
    ]
