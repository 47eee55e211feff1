"""Triton's adapter for `NAME-infer`: one response to each request, for clients that call KServe's `infer`.

A repository's model.py imports it. The ensemble is decoupled, which Triton answers to gRPC's stream call and to HTTP's
`generate` alone. This model isn't: it asks the ensemble from a thread of its own, waits for every answer, and sends one
response. Its tensors are the ensemble's; `stream` has no effect. An error keeps its kind.
"""

from __future__ import annotations

import logging
import secrets
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from deepseek_triton.ensemble.engine.remote.calls import Calls
from deepseek_triton.ensemble.models.fields import check_fields
from deepseek_triton.ensemble.models.tensors import RequestError, array, parameters
from deepseek_triton.ensemble.processes.low_priority import BusyError
from deepseek_triton.ensemble.processes.watchdog import watch
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.error_kind import ERROR_CODES, KIND_PARAMETER, FailureKind, split_kind
from deepseek_triton.ensemble.protocol.pipelines import ENGINE_SUFFIX, INFER_SUFFIX, model_name
from deepseek_triton.ensemble.text.errors import one_line

log = logging.getLogger(__name__)

MAX_CALLS = 256  # requests under way; more wait for one of them
MAX_WAITING = 4096
POLL_S = 0.2  # seconds between two looks whether a client has gone
OUTPUTS = [spec.name for spec in contract.ENSEMBLE.outputs]
Outputs = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class InferCall:
    """One request, and what the call of the ensemble for it has: its id, and the key that stops it and no other.

    lock: held to ask Triton whether the client has gone, and to end the call before its response is sent. Triton frees
    with the last response what the question is about, and a server that is asked later crashes.
    """

    request: Any
    id: str
    stop_key: str
    lock: threading.Lock = field(default_factory=threading.Lock)


class TritonPythonModel:
    """Answers each request with one response, when the ensemble has ended."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start the threads; the ensemble is called by its name."""
        self._served_name = args["model_name"].removesuffix(f"-{INFER_SUFFIX}")
        self._calls = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="infer")
        self._open: set[InferCall] = set()
        self._sent = Calls()
        self._lock = threading.Lock()
        self._is_closed = threading.Event()
        self._poller = threading.Thread(target=self._poll, name="poller", daemon=True)
        self._poller.start()
        self._watchdog = watch(self._served_name, args["model_version"], INFER_SUFFIX)

    def execute(self, requests: list[Any]) -> None:
        """Begin every request and return; each is answered from its thread."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                call = self._accept(request)
            except RequestError as error:
                _send(sender, _failure(str(error), "invalid"))
            except BusyError as error:
                _send(sender, _failure(str(error), "unavailable"))
            except Exception as error:  # the client needs an answer, and the next ones their turn
                log.error("a request can't be taken in", exc_info=error)
                _send(sender, _failure(f"the request can't be taken in: {one_line(error)}", "internal"))
            else:
                self._calls.submit(self._answer, call, sender)

    def finalize(self) -> None:
        """Wait for the requests under way and end the threads."""
        self._watchdog.close()
        self._calls.shutdown()
        self._is_closed.set()
        self._poller.join()
        self._sent.close()

    def _accept(self, request: Any) -> InferCall:
        check_fields(request, contract.ENSEMBLE.inputs)
        names = {tensor.name() for tensor in request.inputs()}
        if names.isdisjoint({contract.TEXT_INPUT.name, contract.MESSAGES.name}):
            raise RequestError("give either text_input or messages")
        key = parameters(request).get(contract.STOP_KEY)
        key = key if isinstance(key, str) and key else secrets.token_urlsafe(16)
        call = InferCall(request, request.request_id() or uuid.uuid4().hex, key)
        with self._lock:
            if len(self._open) >= MAX_CALLS + MAX_WAITING:
                raise BusyError(f"too many requests wait for {self._served_name}{contract.RETRY}")
            self._open.add(call)
        return call

    def _answer(self, call: InferCall, sender: Any) -> None:
        try:
            response = self._ask(call)
        except Exception as error:  # the client needs an answer
            log.error("a request can't be answered", exc_info=error)
            response = _failure(f"the request can't be answered: {one_line(error)}", "internal")
        finally:
            with call.lock:
                self._close(call)
        _send(sender, response)

    def _ask(self, call: InferCall) -> Any:
        if call not in self._open:
            return _failure("the client has gone", "unavailable")
        ask = pb_utils.InferenceRequest(
            model_name=self._served_name,
            requested_output_names=OUTPUTS,
            inputs=[tensor for tensor in call.request.inputs() if tensor.name() != contract.STREAM.name],
            request_id=call.id,
            parameters={contract.STOP_KEY: call.stop_key, KIND_PARAMETER: True},
        )
        answers: list[Outputs] = []
        with self._sent.responses(ask) as responses:
            for response in responses:
                if response.has_error():
                    return _failure(*split_kind(response.error().message()))
                if tensors := response.output_tensors():
                    answers.append({tensor.name(): tensor.as_numpy() for tensor in tensors})
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, values) for name, values in joined(answers).items()])

    def _close(self, call: InferCall) -> None:
        with self._lock:
            self._open.discard(call)

    def _poll(self) -> None:
        """Stop the requests whose client has gone."""
        while not self._is_closed.wait(POLL_S):
            with self._lock:
                calls = list(self._open)
            for call in calls:
                with call.lock:
                    has_gone = call in self._open and call.request.is_cancelled()
                if has_gone:
                    self._close(call)
                    self._stop(call)

    def _stop(self, call: InferCall) -> None:
        stop = pb_utils.InferenceRequest(
            model_name=model_name(self._served_name, ENGINE_SUFFIX),
            requested_output_names=[contract.PROGRESS.name],
            inputs=[pb_utils.Tensor(contract.STOP.name, array(contract.STOP, [True]))],
            request_id=call.id,
            parameters={contract.STOP_KEY: call.stop_key},
        )
        try:
            with self._sent.responses(stop) as responses:
                for _ in responses:
                    pass
        except Exception as error:  # the request then runs to its end
            log.error("an abandoned request can't be stopped", exc_info=error)


def _send(sender: Any, response: Any) -> None:
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _failure(message: str, kind: FailureKind) -> Any:
    code = getattr(pb_utils.TritonError, ERROR_CODES[kind])
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def joined(answers: Sequence[Outputs]) -> Outputs:
    """The outputs of several prompts as one response's, in the prompts' order; shorter rows are filled up."""
    if len(answers) == 1:
        return dict(answers[0])
    ordered = sorted(answers, key=lambda outputs: int(outputs[contract.BATCH_INDEX.name].flat[0]))
    return {name: _stacked([outputs[name] for outputs in ordered]) for name in ordered[0]}


def _stacked(rows: Sequence[NDArray[Any]]) -> NDArray[Any]:
    longest = max(row.shape[-1] for row in rows)
    if rows[0].ndim == 1:  # text_output
        return np.concatenate(rows)
    filler: Any = b"" if rows[0].dtype == np.object_ else 0
    widths = [[(0, 0)] * (row.ndim - 1) + [(0, longest - row.shape[-1])] for row in rows]
    return np.concatenate([np.pad(row, width, constant_values=filler) for row, width in zip(rows, widths, strict=True)])
