"""Triton's adapter for the tokenizer: `text_input` or `messages` → `input_ids`.

Copied into the model repository as model.py. It translates tensors and errors, nothing else: text is
`ensemble/text.py`'s business.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from ensemble import contract
from ensemble.errors import TextError
from ensemble.models.tensors import RequestError, array, read_inputs, scalar
from ensemble.text import Tokenizer


class TritonPythonModel:
    """One request in, one response out, many at a time."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer that lies beside this file."""
        self._tokenizer = Tokenizer.from_directory(Path(args["model_repository"]) / args["model_version"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Encode every request; one that can't be encoded gets its own error."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            ids = self._encode(request)
        except (RequestError, TextError) as error:
            invalid = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=invalid)
        values = ((contract.INPUT_IDS, ids), (contract.ACKNOWLEDGE, True))
        return pb_utils.InferenceResponse([pb_utils.Tensor(spec.name, array(spec, value)) for spec, value in values])

    def _encode(self, request: Any) -> Any:
        inputs = read_inputs(request)
        text, messages = scalar(inputs, contract.TEXT_INPUT), scalar(inputs, contract.MESSAGES)
        if (text is None) == (messages is None):
            raise RequestError("give either text_input or messages")
        return self._tokenizer.encode(text) if messages is None else self._tokenizer.encode_messages(messages)
