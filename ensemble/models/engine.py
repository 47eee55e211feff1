"""Triton's adapter for the engine: requests in, decoupled responses out.

A repository's model.py imports it. It translates tensors and errors and owns the loop. Scheduling is in
`ensemble/engine`; this model handles token ids, never text.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.engine.admission import Admission
from deepseek_triton.ensemble.engine.loop import EngineLoop, QueueFullError
from deepseek_triton.ensemble.engine.runners.load import load_runner
from deepseek_triton.ensemble.engine.sequence import FailureKind, Request
from deepseek_triton.ensemble.models.metrics import MetricsPublisher
from deepseek_triton.ensemble.models.options import read_options
from deepseek_triton.ensemble.models.tensors import RequestError, array, read_inputs, scalar
from deepseek_triton.ensemble.processes.acknowledgements import AcknowledgementReceiver, pipe_path
from deepseek_triton.ensemble.processes.watchdog import watch
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.progress import Progress, Update
from deepseek_triton.ensemble.protocol.settings import EngineSettings, SettingsError
from deepseek_triton.ensemble.text.errors import one_line

log = logging.getLogger(__name__)

CANCELLATION_POLL_S = 0.1  # seconds; each poll is a round trip to the server's process
# Names instead of values: pb_utils is empty until Triton's stub process runs it.
ERROR_CODES: dict[FailureKind, str] = {
    "invalid": "INVALID_ARG",
    "unavailable": "UNAVAILABLE",
    "internal": "INTERNAL",
}


class TritonPythonModel:
    """A decoupled model: `execute` queues requests and returns; the loop's thread answers them."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the artefacts that lie beside this file and start the loop."""
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
        version = args["model_version"]
        directory = Path(args["model_repository"]) / version
        try:
            settings = EngineSettings.from_model_config(args["model_config"])
        except SettingsError:
            Manifest.load(directory)  # raises if an earlier version, which had other settings, built the model
            raise
        served_name = args["model_name"].removesuffix("-engine")
        manifest, runner = load_runner(directory, settings)
        self._admission = Admission(directory, runner.vocab_size, manifest.end_ids, settings)
        self._acknowledgements = AcknowledgementReceiver(pipe_path(served_name, version))
        # From a random base: a restarted engine must not continue the streams of the one before.
        self._stream_ids = itertools.count(secrets.randbits(31) << 32)
        self._loop = EngineLoop(runner, settings=settings, acknowledgements=self._acknowledgements)
        self._loop.start()
        self._watchdog = watch(served_name, version, "engine")
        labels = {"model": served_name, "version": version}
        self._metrics = MetricsPublisher(self._loop.metrics, pb_utils.MetricFamily, labels)
        self._metrics.start()

    def execute(self, requests: list[Any]) -> None:
        """Queue every request; an invalid one is answered at once with its error."""
        for request in requests:
            sink = TritonSink(request.get_response_sender())
            try:
                self._accept(request, sink)
            except QueueFullError as error:
                sink.fail(str(error), "unavailable")
            except ValueError as error:
                sink.fail(one_line(error), "invalid")
            except Exception as error:  # this request needs an answer, and the next ones their turn
                log.error("a request can't be taken in", exc_info=error)
                sink.fail(f"the request can't be taken in: {one_line(error)}", "internal")

    def finalize(self) -> None:
        """End the running requests and the threads."""
        self._watchdog.close()
        self._loop.close()
        self._metrics.close()
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
        options = read_options(inputs)
        # In an ensemble, Triton never reports that the client has disconnected; it does so for a direct call only.
        sink.polls_cancellation = options.prompt_info is None
        self._loop.submit(
            self._admission.make_request(
                stream_id=next(self._stream_ids),
                request_id=request.request_id(),
                prompt_ids=inputs[contract.INPUT_IDS.name].reshape(-1).astype(np.int64),
                options=options,
                sink=sink,
                now=self._loop.clock(),
            )
        )


class TritonSink:
    """Sends one request's responses."""

    def __init__(self, sender: Any) -> None:
        self._sender = sender
        self.polls_cancellation = False
        self._next_poll = 0.0
        self._is_begun = False

    def send(self, request: Request, updates: Sequence[Update]) -> None:
        """Send `updates` with the request's progress; without updates it is a heartbeat."""
        is_last = request.is_finished and bool(updates)
        head = None if self._is_begun or not updates else request.head
        self._is_begun = self._is_begun or bool(updates)
        progress = Progress(
            stream_id=request.stream_id,
            updates=tuple(updates),
            head=head,
            num_input_tokens=len(request.prompt_ids) if request.returns_input_count else None,
            shows_output_tokens=request.returns_output_count,
            shows_index=len(request.sequences) > 1,
            is_last=is_last,
        )
        self._send(progress)

    def send_stopped(self) -> None:
        """Answer a stop request."""
        self._send(Progress(0, (Update(0, (), 0, "cancelled"),), is_last=True))

    def fail(self, message: str, kind: FailureKind = "internal") -> None:
        """End the request with an error."""
        code = getattr(pb_utils.TritonError, ERROR_CODES[kind])
        response = pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
        self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_cancelled(self) -> bool:
        """Whether the client of a direct call has disconnected; asks the server at most ten times a second."""
        now = time.monotonic()
        if not self.polls_cancellation or now < self._next_poll:
            return False
        self._next_poll = now + CANCELLATION_POLL_S
        return bool(self._sender.is_cancelled())

    def _send(self, progress: Progress) -> None:
        values = ((contract.OUTPUT_IDS, progress.ids), (contract.PROGRESS, progress.to_json().encode()))
        tensors = [pb_utils.Tensor(spec.name, array(spec, value)) for spec, value in values]
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if progress.is_last else 0
        self._sender.send(pb_utils.InferenceResponse(tensors), flags=flags)
