"""TritonSink: the engine's output of one prompt → responses of Triton's Python backend.

A request may hold several prompts. They share its response sender, and the last prompt's last response ends it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import triton_python_backend_utils as pb_utils

from deepseek_triton.ensemble.engine.sequence import Request
from deepseek_triton.ensemble.models.tensors import array
from deepseek_triton.ensemble.processes.seal import Seal
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.error_kind import ERROR_CODES, FailureKind, with_kind
from deepseek_triton.ensemble.protocol.progress import Progress, StreamHead, Update

CANCELLATION_POLL_S = 0.1  # seconds; each poll is a round trip to the server's process


@dataclass(frozen=True)
class AnswerForm:
    """How an answer comes, beside its text.

    is_apart: each response reports on one sequence; else on all that have something new.
    counts_new_tokens: `num_output_tokens` counts a response's own tokens; else the sequence's so far.
    batch_index: the prompt's index in its request where the client reads it, else None.
    tells_details: as in `StreamHead`.
    """

    is_apart: bool = False
    counts_new_tokens: bool = False
    batch_index: int | None = None
    tells_details: bool = False


class Responses:
    """Sends the responses to one request of Triton's; `num_prompts` prompts share them. Any thread may call it.

    marks_kind: whether an error's text begins with its kind.
    """

    def __init__(self, sender: Any, *, marks_kind: bool = False) -> None:
        self._sender = sender
        self._marks_kind = marks_kind
        self._lock = threading.Lock()
        self.num_prompts = 1
        self.is_over = False

    def send(self, progress: Progress, seal: Seal | None = None) -> None:
        """Send one response, the last one if `progress` is its prompt's last and no other prompt is open.

        `seal`: closes it for the detokenizer; None: it is for a client.
        """
        ids, text = array(contract.OUTPUT_IDS, progress.ids), progress.to_json().encode()
        if seal is not None:
            text = seal.close(text, ids.tobytes())
        values = ((contract.OUTPUT_IDS, ids), (contract.PROGRESS, array(contract.PROGRESS, text)))
        response = pb_utils.InferenceResponse([pb_utils.Tensor(spec.name, value) for spec, value in values])
        with self._lock:
            if self.is_over:
                return
            self.num_prompts -= progress.is_last
            self.is_over = self.num_prompts == 0
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if self.is_over else 0)

    def send_description(self, max_seq_len: int) -> None:
        """Answer a request to describe the engine."""
        tensor = pb_utils.Tensor(contract.MAX_SEQ_LEN.name, array(contract.MAX_SEQ_LEN, max_seq_len))
        response = pb_utils.InferenceResponse([tensor])
        with self._lock:
            self.is_over = True
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def fail(self, message: str, kind: FailureKind) -> None:
        """End the request, with all its prompts, with an error."""
        code = getattr(pb_utils.TritonError, ERROR_CODES[kind])
        text = with_kind(message, kind) if self._marks_kind else message
        response = pb_utils.InferenceResponse(error=pb_utils.TritonError(text, code))
        with self._lock:
            if not self.is_over:
                self.is_over = True
                self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_cancelled(self) -> bool:
        """Whether Triton says that the client has gone. Nothing may be asked after the last response."""
        with self._lock:
            return self.is_over or bool(self._sender.is_cancelled())


class TritonSink:
    """Sends the responses to one prompt.

    seal: of the model; None for a direct call. Such a call is told no stream's id, and Triton reports of it alone that
    its client has disconnected.
    """

    def __init__(self, responses: Responses, form: AnswerForm | None = None, *, seal: Seal | None = None) -> None:
        self._responses = responses
        self._form = form or AnswerForm()
        self._seal = seal
        self._next_poll = 0.0
        self._is_begun = False

    def send(self, request: Request, updates: Sequence[Update]) -> None:
        """Send `updates` with the request's progress; without updates it is a heartbeat."""
        is_last = request.is_finished and bool(updates)
        shares = [[update] for update in updates] if self._form.is_apart and len(updates) > 1 else [updates]
        for number, share in enumerate(shares, 1):
            self._send(request, share, is_last=is_last and number == len(shares))

    def send_stopped(self) -> None:
        """Answer a stop request."""
        self._responses.send(Progress(0, (Update(0, (), 0, "cancelled"),), is_last=True))

    def fail(self, message: str, kind: FailureKind = "internal") -> None:
        """End the request with an error."""
        self._responses.fail(message, kind)

    def is_cancelled(self) -> bool:
        """Whether the client has disconnected, or another prompt of the request has failed.

        It asks the server at most ten times a second.
        """
        if self._responses.is_over:
            return True
        now = time.monotonic()
        if self._seal is not None or now < self._next_poll:
            return False
        self._next_poll = now + CANCELLATION_POLL_S
        return self._responses.is_cancelled()

    def _send(self, request: Request, updates: Sequence[Update], *, is_last: bool) -> None:
        head = None if self._is_begun or not updates else self._head(request)
        self._is_begun = self._is_begun or bool(updates)
        progress = Progress(
            stream_id=0 if self._seal is None else request.stream_id,
            updates=tuple(updates),
            head=head,
            num_input_tokens=len(request.prompt_ids) if request.returns_input_count else None,
            shows_output_tokens=request.returns_output_count,
            shows_index=len(request.sequences) > 1,
            is_last=is_last,
        )
        self._responses.send(progress, self._seal)

    def _head(self, request: Request) -> StreamHead | None:
        form = self._form
        if request.head is None:
            return None
        return replace(
            request.head,
            counts_new_tokens=form.counts_new_tokens,
            batch_index=form.batch_index,
            tells_details=form.tells_details,
        )
