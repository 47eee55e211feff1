"""Triton's adapter for the detokenizer: `output_ids` → a client's outputs, and the acknowledgement to the engine.

A repository's model.py imports it. A stream's responses arrive in order; what a stream has left over from one
to the next is kept under its id. Decoupled, though it sends one response at most: a heartbeat of the engine is
acknowledged and goes no further.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from ensemble import contract
from ensemble.acknowledge import AcknowledgementSender, pipe_path
from ensemble.errors import one_line
from ensemble.models.tensors import array, read_inputs, scalar
from ensemble.progress import Progress
from ensemble.siblings import watch
from ensemble.streams import Outputs, Stream
from ensemble.text import Tokenizer

log = logging.getLogger(__name__)

# A cancelled stream never sends its last response; its state goes when so many others have been used since.
MAX_STREAMS = 16384


class TritonPythonModel:
    """One response of the engine in, one response to the client out, or none."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer that lies beside this file."""
        version = args["model_version"]
        self._tokenizer = Tokenizer.from_directory(Path(args["model_repository"]) / version)
        name = args["model_name"].removesuffix("-detokenizer")
        self._acknowledgements = AcknowledgementSender(pipe_path(name, version))
        self._streams: OrderedDict[int, Stream] = OrderedDict()
        self._watchdog = watch(name, version, "detokenizer")

    def execute(self, requests: list[Any]) -> None:
        """Answer every request, then acknowledge them all at once."""
        answered = [self._answer(request) for request in requests]
        self._acknowledgements.send(stream_id for stream_id in answered if stream_id is not None)

    def finalize(self) -> None:
        """Close the pipe."""
        self._watchdog.close()
        self._acknowledgements.close()

    def _answer(self, request: Any) -> int | None:
        """Answer a request; the id of its stream, None if it was at fault.

        Anybody may call this model directly and send anything: it must not cost the others of the batch their answers.
        """
        sender = request.get_response_sender()
        try:
            progress = _read(request)
            response = _response(self._outputs(progress)) if progress.updates else None
        except Exception as error:
            log.error("a response of the engine can't be read", exc_info=error)
            message = f"output_ids and progress must be what the engine gives: {one_line(error)}"
            invalid = pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG)
            sender.send(pb_utils.InferenceResponse(error=invalid), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            return None
        sent = () if response is None else (response,)
        sender.send(*sent, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)  # one call: each crosses processes
        return progress.stream_id

    def _outputs(self, progress: Progress) -> Outputs:
        stream = self._streams.pop(progress.stream_id, None) or Stream(self._tokenizer, progress.head)
        outputs = stream.push(progress)
        if not progress.is_last:
            self._streams[progress.stream_id] = stream
            if len(self._streams) > MAX_STREAMS:
                self._streams.popitem(last=False)
        return outputs


def _read(request: Any) -> Progress:
    tensors = read_inputs(request)
    ids = tensors[contract.OUTPUT_IDS.name].reshape(-1).tolist()
    progress = Progress.from_json(scalar(tensors, contract.PROGRESS), ids)
    if not isinstance(progress.stream_id, int) or not 0 <= progress.stream_id < 2**64:
        raise ValueError(f"the stream's id is {progress.stream_id!r}")
    return progress


def _response(outputs: Outputs) -> Any:
    tensors = [pb_utils.Tensor(spec.name, array(spec, values)) for spec, values in outputs.items()]
    return pb_utils.InferenceResponse(tensors)
