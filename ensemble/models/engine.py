"""Triton's adapter for the engine: requests in, decoupled responses out.

Copied into the model repository as model.py. It translates tensors and errors and owns nothing but the loop: scheduling
is `ensemble/engine`'s business, and text nobody's here.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from ensemble import contract
from ensemble.acknowledge import AcknowledgementReceiver, pipe_path
from ensemble.engine.loop import EngineLoop
from ensemble.engine.runners.load import load_runner
from ensemble.engine.sequence import Sequence
from ensemble.models.tensors import RequestError, array, read_inputs, scalar
from ensemble.sampling import SamplingError, SamplingParams
from ensemble.settings import EngineSettings

CANCELLATION_POLL_S = 0.1  # asking the server crosses to its process and back


class TritonPythonModel:
    """Decoupled: `execute` queues and returns, the loop's thread answers."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the artefacts that lie beside this file and start the loop."""
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
        settings = EngineSettings.from_model_config(args["model_config"])
        version = args["model_version"]
        manifest, runner = load_runner(Path(args["model_repository"]) / version, settings)
        self._acknowledgements = AcknowledgementReceiver(pipe_path(args["model_name"].removesuffix("-engine"), version))
        # From a random base: a restarted engine must not continue the streams of the one before.
        self._sequence_ids = itertools.count(secrets.randbits(31) << 32)
        self._loop = EngineLoop(
            runner,
            end_ids=manifest.end_ids,
            prefill_chunk=settings.prefill_chunk,
            acknowledgements=self._acknowledgements,
            cancel_after_s=settings.cancel_after_s,
        )
        self._loop.start()

    def execute(self, requests: list[Any]) -> None:
        """Queue every request; one that is at fault is answered at once."""
        for request in requests:
            sink = TritonSink(request.get_response_sender())
            try:
                self._accept(request, sink)
            except (RequestError, SamplingError, ValueError) as error:
                sink.fail(str(error), pb_utils.TritonError.INVALID_ARG)

    def finalize(self) -> None:
        """End what still runs."""
        self._loop.close()
        self._acknowledgements.close()

    def _accept(self, request: Any, sink: TritonSink) -> None:
        inputs = read_inputs(request)
        if scalar(inputs, contract.STOP):
            if not request.request_id():
                raise RequestError("stop needs the id of the request to stop")
            self._loop.stop(request.request_id(), sink.send_stopped)
            return
        if contract.INPUT_IDS.name not in inputs:
            raise RequestError("input_ids is missing")
        top_p, top_k = scalar(inputs, contract.TOP_P), scalar(inputs, contract.TOP_K)
        params = SamplingParams(
            max_tokens=scalar(inputs, contract.MAX_TOKENS),
            temperature=scalar(inputs, contract.TEMPERATURE),
            top_k=0 if top_k is None else top_k,
            top_p=1.0 if top_p is None else top_p,
            seed=scalar(inputs, contract.SEED),
        )
        is_acknowledged = bool(scalar(inputs, contract.ACKNOWLEDGE))
        sink.polls_cancellation = not is_acknowledged
        self._loop.submit(
            Sequence(
                sequence_id=next(self._sequence_ids),
                request_id=request.request_id(),
                prompt_ids=inputs[contract.INPUT_IDS.name].reshape(-1).astype(np.int64),
                params=params,
                sink=sink,
                stream=bool(scalar(inputs, contract.STREAM)),
                expects_acknowledgement=is_acknowledged,
            )
        )


class TritonSink:
    """Sends one request's responses."""

    def __init__(self, sender: Any) -> None:
        self._sender = sender
        # Through an ensemble the server never says that the client has gone; only a direct caller's can be asked for.
        self.polls_cancellation = False
        self._next_poll = 0.0

    def send(self, sequence: Sequence, ids: Any) -> None:
        """Deliver `ids` with the sequence's progress."""
        self._send(
            ids,
            sequence_id=sequence.sequence_id,
            finish_reason=sequence.finish_reason or "",
            num_input_tokens=len(sequence.prompt_ids),
            num_output_tokens=len(sequence.output_ids),
        )

    def send_stopped(self) -> None:
        """Answer a stop request."""
        self._send([], sequence_id=0, finish_reason="cancelled", num_input_tokens=0, num_output_tokens=0)

    def fail(self, message: str, code: int | None = None) -> None:
        """End the request with an error."""
        code = pb_utils.TritonError.INTERNAL if code is None else code
        response = pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
        self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_cancelled(self) -> bool:
        """Whether the client of a direct call has gone; asks the server ten times a second at most."""
        now = time.monotonic()
        if not self.polls_cancellation or now < self._next_poll:
            return False
        self._next_poll = now + CANCELLATION_POLL_S
        return bool(self._sender.is_cancelled())

    def _send(
        self, ids: Any, *, sequence_id: int, finish_reason: str, num_input_tokens: int, num_output_tokens: int
    ) -> None:
        values = (
            (contract.OUTPUT_IDS, ids),
            (contract.SEQUENCE_ID, sequence_id),
            (contract.FINISH_REASON, finish_reason.encode()),
            (contract.NUM_INPUT_TOKENS, num_input_tokens),
            (contract.NUM_OUTPUT_TOKENS, num_output_tokens),
        )
        response = pb_utils.InferenceResponse(
            [pb_utils.Tensor(spec.name, array(spec, value)) for spec, value in values]
        )
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if finish_reason else 0
        self._sender.send(response, flags=flags)
