"""`/v1/feedback`: what the one who asked says of an answer that was collected."""

from __future__ import annotations

import asyncio
from datetime import datetime, timezone
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import Field, model_validator
from starlette.responses import JSONResponse, Response

from deepseek_triton.gateway.apis.wire.context import context_of
from deepseek_triton.gateway.apis.wire.errors import ApiError
from deepseek_triton.gateway.apis.wire.validation import Body, field_error
from deepseek_triton.gateway.collection.lines import AnswerId, Feedback, label_of
from deepseek_triton.gateway.record import record_of

router = APIRouter()
PREFIXES = ("chatcmpl-", "cmpl-")  # of an answer's `id`, before its request's id
MAX_LOOKUPS = 16  # that wait for one another; each may read all files
MAX_COMMENT_CHARS, MAX_CORRECTION_CHARS = 2000, 100_000
RETRY = {"Retry-After": "1"}


class FeedbackBody(Body):
    """request_id: an answer's X-Request-Id, or its `id`. choice: the answer's index, where there were several.

    label, or a rating from 1 to 5: 4 and 5 are good, 1 and 2 bad. correction: the answer that it should have been.
    """

    request_id: str = Field(min_length=1, max_length=160)
    choice: int = Field(default=0, ge=0, lt=2**31)
    label: Literal["good", "bad"] | None = None
    rating: int | None = Field(default=None, ge=1, le=5)
    correction: str | None = Field(default=None, min_length=1, max_length=MAX_CORRECTION_CHARS)
    comment: str | None = Field(default=None, max_length=MAX_COMMENT_CHARS)

    @model_validator(mode="after")
    def _check_together(self) -> FeedbackBody:
        if self.label is not None and self.rating is not None:
            raise field_error("rating", "rating must not come with label; give one of them")
        if self.label is None and self.rating is None and self.correction is None:
            raise field_error("label", "label, rating or correction is required")
        return self


@router.post("/v1/feedback", response_model=None, status_code=202)
async def give_feedback(request: Request, body: FeedbackBody) -> Response:
    """Keep what is said of an answer. Only the key that asked may say it; what is said last holds."""
    collector, record = context_of(request).collector, record_of(request.scope)
    if collector is None:
        raise ApiError(404, "this gateway collects no answers, and so no feedback", code="collection_off")
    request_id = body.request_id
    for prefix in PREFIXES:
        request_id = request_id.removeprefix(prefix)
    answer = AnswerId(request_id, body.choice, collector.pseudonyms.owner(record.owner))
    if collector.num_lookups >= MAX_LOOKUPS:
        raise ApiError(503, "too much feedback at once; retry later", code="server_overloaded", headers=RETRY)
    if not await asyncio.to_thread(collector.has, answer):
        message = (
            f"no answer of the request {body.request_id[:80]!r}, choice {body.choice}, was collected from this key"
        )
        raise ApiError(404, message, param="request_id", code="answer_not_found")
    label = label_of(body.label, body.rating)
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    if not collector.put(Feedback(answer, now, label, body.correction or "", body.comment or "")):
        raise ApiError(503, "too much waits to be written; retry later", code="server_overloaded", headers=RETRY)
    told = {"object": "feedback", "request_id": request_id, "choice": body.choice, "label": label}
    return JSONResponse(told, 202)
