"""Triton's adapter for a scoring model's tokenizer: texts and labels → rows of ids.

A repository's model.py imports it. It translates tensors and errors, nothing else: prompts are
`ensemble/scoring/prompts.py`'s business.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from deepseek_triton.ensemble.artefacts.manifest import loaded_identity
from deepseek_triton.ensemble.models.fields import check_fields
from deepseek_triton.ensemble.models.tensors import NUMPY_DTYPES, RequestError, asks_for_build, read_inputs
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.scoring.profile import ScoringProfile
from deepseek_triton.ensemble.scoring.prompts import Prompter
from deepseek_triton.ensemble.scoring.rows import stack_rows
from deepseek_triton.ensemble.text.tokenizer import Tokenizer


class TritonPythonModel:
    """Answers each request, of one text or several, with one response."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer and the profile that lie beside this file."""
        directory = Path(args["model_repository"]) / args["model_version"]
        profile = ScoringProfile.load(directory)
        self._identity = loaded_identity(args)
        self._prompter = Prompter(profile, Tokenizer.from_directory(directory, profile.max_seq_len))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Encode every request; one that can't be encoded gets its own error."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            check_fields(request, contract.SCORE.inputs)
            if asks_for_build(request):
                text = np.array([[self._identity]], NUMPY_DTYPES["STRING"])
                return pb_utils.InferenceResponse([pb_utils.Tensor(contract.SCORED_LABELS.name, text)])
            tensors = self._encode(read_inputs(request))
        except ValueError as error:  # RequestError, ProfileError, TextError: a message of one line for the client
            invalid = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=invalid)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, values) for name, values in tensors.items()])

    def _encode(self, inputs: dict[str, Any]) -> dict[str, Any]:
        texts, chats = _column(inputs, contract.TEXT_INPUT), _column(inputs, contract.MESSAGES)
        if (texts is None) == (chats is None):
            raise RequestError("give either text_input or messages")
        rows, lengths, all_labels = [], [], []
        prompts = texts if chats is None else chats
        assert prompts is not None
        for index, prompt in enumerate(prompts):
            sent = inputs.get(contract.LABELS.name)
            labels = self._prompter.labels_of(None if sent is None else list(sent[index]))
            text, messages = (prompt, None) if chats is None else (None, prompt)
            row, targets, num_tokens = self._prompter.row(text, messages, labels)
            rows.append((row, targets))
            lengths.append(num_tokens)
            all_labels.append([label.encode() for label in labels])
        tensors = stack_rows(rows)
        limit = self._prompter.profile.max_request_tokens
        if limit and len(rows) > 1 and tensors[contract.SCORE_IDS.name].size > limit:
            num_rows, longest = tensors[contract.SCORE_IDS.name].shape
            raise RequestError(
                f"{num_rows} texts of up to {longest} tokens in one request, together at most {limit}: send fewer texts"
            )
        return {
            **tensors,
            contract.SCORED_LABELS.name: np.array(all_labels, NUMPY_DTYPES["STRING"]).reshape(len(rows), -1),
            contract.NUM_INPUT_TOKENS.name: np.array(lengths, np.int32).reshape(-1, 1),
        }


def _column(inputs: dict[str, Any], spec: contract.TensorSpec) -> list[Any] | None:
    """The values of a tensor [rows, 1], or None where the request doesn't have it."""
    if spec.name not in inputs:
        return None
    values = inputs[spec.name]
    if values.ndim != 2 or values.shape[1] != 1:
        raise RequestError(f"{spec.name} has shape {list(values.shape)}, must be [texts, 1]")
    return list(values[:, 0])
