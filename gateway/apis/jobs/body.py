"""The body of `POST /v1/jobs`, and the endpoints that a job may go to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fastapi import Request
from pydantic import BaseModel, Field, ValidationError, model_validator

from deepseek_triton.gateway.apis.anthropic_messages.body import MessagesBody
from deepseek_triton.gateway.apis.embeddings import EmbeddingsBody
from deepseek_triton.gateway.apis.openai_chat.body import ChatBody
from deepseek_triton.gateway.apis.openai_completions.body import CompletionBody
from deepseek_triton.gateway.apis.openai_responses.body import ResponseBody
from deepseek_triton.gateway.apis.score import ScoreBody
from deepseek_triton.gateway.apis.wire.errors import ApiError
from deepseek_triton.gateway.apis.wire.validation import Body, first_fault
from deepseek_triton.gateway.jobs.webhooks import secret_bytes

ENDPOINTS: Mapping[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/responses": ResponseBody,
    "/v1/messages": MessagesBody,
    "/v1/score": ScoreBody,
    "/v1/embeddings": EmbeddingsBody,
}
# Fields that ask for what a job hasn't: an answer that lies in one process's memory.
NOT_IN_JOBS = ("background", "previous_response_id")
MIN_SECRET, MAX_SECRET, MAX_URL = 16, 256, 2048


class WebhookBody(Body):
    """Who is told of the job's end. secret: the key of the signature."""

    url: str = Field(min_length=1, max_length=MAX_URL)
    secret: str = Field(min_length=MIN_SECRET, max_length=MAX_SECRET)

    @model_validator(mode="after")
    def _check_secret(self) -> WebhookBody:
        secret_bytes(self.secret)
        return self


class JobBody(Body):
    """One request to an endpoint, and how it is to be treated."""

    endpoint: str
    body: dict[str, Any]
    priority: Literal["high", "normal", "low"] = "normal"
    ttl_s: float | None = Field(default=None, ge=1)
    max_attempts: int | None = Field(default=None, ge=1, le=20)
    webhook: WebhookBody | None = None


def check_request(endpoint: str, body: Mapping[str, Any], place: str = "") -> None:
    """Raise `ApiError` for a request that its endpoint would refuse; `place` stands before the field's name."""
    kind = ENDPOINTS.get(endpoint)
    if kind is None:
        raise ApiError(400, f"endpoint must be one of {', '.join(ENDPOINTS)}, got {endpoint[:80]!r}", param="endpoint")
    for name in NOT_IN_JOBS:
        if body.get(name):
            raise ApiError(400, f"{place}{name} is not supported in a job", param=place + name)
    try:
        kind.model_validate(body)
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]
        param, message = first_fault(faults)
        raise ApiError(400, place + message, param=place + param if param else None) from None


def idempotency_key(request: Request) -> str:
    """The header Idempotency-Key; "": none. Raises `ApiError`."""
    text = str(request.headers.get("idempotency-key", ""))
    if len(text) > 255:
        raise ApiError(400, "Idempotency-Key may have 255 characters at most", param="Idempotency-Key")
    return text
