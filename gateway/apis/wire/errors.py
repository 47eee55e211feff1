"""ApiError, and what becomes of a request's exception: a status, and a body in the form of the API that was called.

ApiError            status, message, type, code and the field that is wrong
ClientError         the backend's → 400, 502, 503 or 504
UnknownModelError   404
RequestValidationError, HTTPException   FastAPI's own → 400, 404, 405, …
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from deepseek_triton.clients import (
    ClientError,
    ProtocolError,
    RequestRejected,
    RequestTimeout,
    ServerOverloaded,
    ServerUnavailable,
)
from deepseek_triton.gateway.apis.wire.validation import first_fault
from deepseek_triton.gateway.backend.base import NoBackendError, OverloadedError, UnknownModelError
from deepseek_triton.gateway.record import record_of

log = logging.getLogger(__name__)

# OpenAI's `type` of an error with a status.
OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
# Anthropic's.
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
ANTHROPIC_PATHS = ("/v1/messages",)


# The field of `GenerateRequest`, or the input of the model, that an error begins with → the field of OpenAI's API.
API_FIELDS = {
    "guide": "response_format",
    "guided_decoding_guide": "response_format",
    "num_return_sequences": "n",
    "num_top_log_probs": "top_logprobs",
    "stop_words": "stop",
    "text_input": "prompt",
    "thinking_token_budget": "reasoning_effort",
    **{
        name: name
        for name in (
            "bad_words", "chat_template_kwargs", "frequency_penalty", "max_tokens", "messages", "min_p", "min_tokens",
            "presence_penalty", "priority", "prompt", "repetition_penalty", "seed", "temperature", "tools", "top_k",
            "top_p",
        )
    },
}  # fmt: skip


class ApiError(Exception):
    """An error with a status; `param` names the field that is wrong, `code` is OpenAI's machine-readable word."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self, path: str) -> dict[str, Any]:
        """The JSON that tells it, in the form of the API at `path`."""
        if path.startswith(ANTHROPIC_PATHS):
            kind = ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        kind = OPENAI_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def as_api_error(error: BaseException) -> ApiError:
    """What a request's exception means to its client. A fault of the gateway itself is logged and stays untold."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownModelError):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, NoBackendError):  # not logged: it may be each of thousands
        retry_after = str(math.ceil(max(error.retry_after_s, 1.0)))
        return ApiError(
            503, "the model's server is not available", code="server_unavailable", headers={"Retry-After": retry_after}
        )
    if isinstance(error, ServerOverloaded | OverloadedError):
        return ApiError(503, str(error), code="server_overloaded", headers={"Retry-After": "1"})
    if isinstance(error, RequestRejected):
        return _rejection(error)
    if isinstance(error, ServerUnavailable):
        log.warning("the backend is not available: %s", error)
        return ApiError(
            503, "the model's server is not available", code="server_unavailable", headers={"Retry-After": "1"}
        )
    if isinstance(error, RequestTimeout):
        return ApiError(504, "the answer took longer than the gateway's time limit", code="timeout")
    if isinstance(error, ClientError):
        log.warning("the backend failed: %s", error)
        message = "the model's server gave no valid answer" if isinstance(error, ProtocolError) else str(error)
        return ApiError(502, message, code="bad_gateway")
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the gateway failed to answer this request", code="internal_error")


def invalid(message: str) -> ApiError:
    """The error for an option of the request that is wrong: `message` begins with its name there."""
    field = message.split(maxsplit=1)[0].partition(".")[0] if message else ""
    param = API_FIELDS.get(field)
    return ApiError(400, message if param in (None, field) else f"{param}: {message}", param=param)


def add_error_handlers(app: FastAPI) -> None:
    """Give every exception that leaves a route the form of its API."""

    def handler(read: Callable[[Any], ApiError]) -> Callable[[Request, Exception], Awaitable[Response]]:
        async def handle(request: Request, error: Exception) -> Response:
            record_of(request.scope).is_unsent = isinstance(error, NoBackendError)
            return error_response(read(error), request.url.path)

        return handle

    for kind in (ApiError, UnknownModelError, ClientError, Exception):
        app.add_exception_handler(kind, handler(as_api_error))
    app.add_exception_handler(RequestValidationError, handler(_read_validation))
    app.add_exception_handler(HTTPException, handler(_read_http))


def error_response(error: ApiError, path: str) -> Response:
    """The response that tells `error` to a client of the API at `path`."""
    return JSONResponse(error.body(path), status_code=error.status, headers=error.headers)


def _rejection(error: RequestRejected) -> ApiError:
    """The server's error: the client's fault where the model says so, and then its text is for the client."""
    if error.kind == "invalid":
        return invalid(str(error))
    if error.kind == "unavailable":
        is_late = "timed out" in str(error)
        return ApiError(504 if is_late else 503, str(error), code="timeout" if is_late else "server_unavailable")
    log.error("the model's server failed: %s", error)
    return ApiError(502, "the model's server failed to answer this request", code="bad_gateway")


def _read_validation(error: RequestValidationError) -> ApiError:
    param, message = first_fault(error.errors())
    return ApiError(400, message, param=param)


def _read_http(error: HTTPException) -> ApiError:
    return ApiError(error.status_code, str(error.detail), headers=error.headers)
