"""Triton's adapter for the detokenizer: `output_ids` → `text_output`, and the acknowledgement to the engine.

Copied into the model repository as model.py. A stream's responses arrive in order; what a stream has left over from one
to the next is kept under its `sequence_id`.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from ensemble import contract
from ensemble.acknowledge import AcknowledgementSender, pipe_path
from ensemble.models.tensors import array, read_inputs, scalar
from ensemble.text import IncrementalDetokenizer, Tokenizer

# A cancelled stream never sends its last response; its state goes when so many others have been used since.
MAX_STREAMS = 16384


class TritonPythonModel:
    """One response of the engine in, one response to the client out."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer that lies beside this file."""
        version = args["model_version"]
        self._tokenizer = Tokenizer.from_directory(Path(args["model_repository"]) / version)
        name = args["model_name"].removesuffix("-detokenizer")
        self._acknowledgements = AcknowledgementSender(pipe_path(name, version))
        self._streams: OrderedDict[int, IncrementalDetokenizer] = OrderedDict()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Decode every request, then acknowledge them all at once."""
        inputs = [read_inputs(request) for request in requests]
        responses = [self._respond(tensors) for tensors in inputs]
        self._acknowledgements.send(scalar(tensors, contract.SEQUENCE_ID) for tensors in inputs)
        return responses

    def finalize(self) -> None:
        """Close the pipe."""
        self._acknowledgements.close()

    def _respond(self, tensors: dict[str, Any]) -> Any:
        text = self._decode(
            scalar(tensors, contract.SEQUENCE_ID),
            tensors[contract.OUTPUT_IDS.name].reshape(-1).tolist(),
            is_final=bool(scalar(tensors, contract.FINISH_REASON)),
        )
        outputs = [pb_utils.Tensor(contract.TEXT_OUTPUT.name, array(contract.TEXT_OUTPUT, text.encode()))]
        outputs += [pb_utils.Tensor(spec.name, tensors[spec.name]) for spec in contract.PROGRESS_OUTPUTS]
        return pb_utils.InferenceResponse(outputs)

    def _decode(self, sequence_id: int, ids: list[int], *, is_final: bool) -> str:
        detokenizer = self._streams.pop(sequence_id, None) or IncrementalDetokenizer(self._tokenizer)
        if not is_final:
            self._streams[sequence_id] = detokenizer
            if len(self._streams) > MAX_STREAMS:
                self._streams.popitem(last=False)
        return detokenizer.push(ids, final=is_final)
