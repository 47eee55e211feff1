"""Triton's adapter for the detokenizer: `output_ids` → a client's outputs, and the acknowledgement to the engine.

A repository's model.py imports it. A stream's responses arrive in order; its state from one to the next is kept under
the stream's id. The model is decoupled, though it sends at most one response to each request: a heartbeat of the engine
is acknowledged and not passed on.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton_python_backend_utils as pb_utils

from deepseek_triton.ensemble.models.tensors import array, read_inputs, scalar
from deepseek_triton.ensemble.processes.acknowledgements import AcknowledgementSender, pipe_path
from deepseek_triton.ensemble.processes.seal import model_seal
from deepseek_triton.ensemble.processes.watchdog import watch
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.progress import Progress
from deepseek_triton.ensemble.text.errors import one_line
from deepseek_triton.ensemble.text.streams import Stream, StreamOutputs
from deepseek_triton.ensemble.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# A cancelled stream never sends its last response; its state is dropped after this many other streams were used.
MAX_STREAMS = 16384

# Sending a response takes a few tenths of a millisecond, nearly all of it waiting for the server with the GIL released,
# so the responses of a batch are sent by several threads.
SENDERS = 4


class PendingResponse(NamedTuple):
    """A response to be sent. response None: the client gets nothing. stream_id None: the request was invalid."""

    sender: Any
    response: Any
    stream_id: int | None


class TritonPythonModel:
    """Turns each response of the engine into one response to the client, or none."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer that lies beside this file."""
        version = args["model_version"]
        self._tokenizer = Tokenizer.from_directory(Path(args["model_repository"]) / version)
        name = args["model_name"].removesuffix("-detokenizer")
        self._acknowledgements = AcknowledgementSender(pipe_path(name, version))
        self._seal = model_seal(name, version)
        self._streams: OrderedDict[int, Stream] = OrderedDict()
        self._senders = ThreadPoolExecutor(SENDERS, thread_name_prefix="sender")
        self._watchdog = watch(name, version, "detokenizer")

    def execute(self, requests: list[Any]) -> None:
        """Answer every request, then acknowledge them all at once."""
        answers = [self._answer(request) for request in requests]
        self._acknowledgements.send(self._send(answers))

    def finalize(self) -> None:
        """End the threads and close the pipe."""
        self._watchdog.close()
        self._senders.shutdown()
        self._acknowledgements.close()

    def _answer(self, request: Any) -> PendingResponse:
        """Make the response to one request. Anybody may call this model directly: an error stays with its request."""
        sender = request.get_response_sender()
        try:
            progress = self._read(request)
            response = _response(self._outputs(progress)) if progress.updates else None
        except Exception as error:
            log.warning("what came is no response of the engine: %s", one_line(error))
            message = f"output_ids and progress must be what the engine gives: {one_line(error)}"
            invalid = pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG)
            return PendingResponse(sender, pb_utils.InferenceResponse(error=invalid), None)
        return PendingResponse(sender, response, progress.stream_id)

    def _read(self, request: Any) -> Progress:
        """Read what the engine has sealed. A client could otherwise spoil or acknowledge the streams of others."""
        tensors = read_inputs(request)
        ids = tensors[contract.OUTPUT_IDS.name].reshape(-1)
        progress = self._seal.open(scalar(tensors, contract.PROGRESS), ids.tobytes())
        read = Progress.from_json(progress, ids.tolist())
        if not isinstance(read.stream_id, int) or not 0 <= read.stream_id < 2**64:
            raise ValueError(f"the stream's id is {read.stream_id!r}")
        return read

    def _send(self, answers: list[PendingResponse]) -> list[int]:
        """Send every answer, those of one stream in order. Returns the ids of the streams whose answer was sent."""
        shares: dict[int, list[PendingResponse]] = {}
        for answer in answers:
            shares.setdefault((answer.stream_id or 0) % SENDERS, []).append(answer)
        if len(answers) == 1:
            return _send_share(answers)
        return [stream_id for sent in self._senders.map(_send_share, shares.values()) for stream_id in sent]

    def _outputs(self, progress: Progress) -> StreamOutputs:
        stream = self._streams.pop(progress.stream_id, None) or Stream(self._tokenizer, progress.head)
        outputs = stream.push(progress)
        if not progress.is_last:
            self._streams[progress.stream_id] = stream
            if len(self._streams) > MAX_STREAMS:
                self._streams.popitem(last=False)
        return outputs


def _send_share(answers: list[PendingResponse]) -> list[int]:
    sent = []
    for sender, response, stream_id in answers:
        responses = () if response is None else (response,)
        try:  # one call, since each is a round trip to another process
            sender.send(*responses, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as error:  # only this client's channel is broken
            log.error("a response can't be sent", exc_info=error)
            continue
        if stream_id is not None:
            sent.append(stream_id)
    return sent


def _response(outputs: StreamOutputs) -> Any:
    tensors = [pb_utils.Tensor(spec.name, array(spec, values)) for spec, values in outputs.items()]
    return pb_utils.InferenceResponse(tensors)
