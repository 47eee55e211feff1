"""`/v1/reports`: an image in, the report on it as a stream of events. examples/image_report builds such a model.

The image comes in the body, never as an address: the gateway fetches nothing. The model's server decodes it.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
from collections.abc import AsyncGenerator

from fastapi import APIRouter, Request
from pydantic import Field, field_validator
from starlette.responses import Response

from deepseek_triton.clients import Chunk
from deepseek_triton.gateway.apis.wire import counting, sse
from deepseek_triton.gateway.apis.wire.connection import EventStream
from deepseek_triton.gateway.apis.wire.context import context_of
from deepseek_triton.gateway.apis.wire.errors import ApiError
from deepseek_triton.gateway.apis.wire.openai_forms import usage_form
from deepseek_triton.gateway.apis.wire.validation import Body, field_error
from deepseek_triton.gateway.record import RequestRecord, record_of

router = APIRouter()


class ReportBody(Body):
    """model: one of task `report`. image: the bytes of a JPEG or PNG file in base64, without a `data:` prefix."""

    model: str = Field(min_length=1)
    image: str = Field(min_length=1)

    @field_validator("image")
    @classmethod
    def _check_image(cls, value: str) -> str:
        try:
            base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise field_error("image", "image must be the bytes of a JPEG or PNG file in base64") from None
        return value

    def image_bytes(self) -> bytes:
        """The file."""
        return base64.b64decode(self.image)


@router.post("/v1/reports", response_model=None)
async def create_report(request: Request, body: ReportBody) -> Response:
    """Stream the report on an image: events with a `delta` of its JSON text, and one with `finish_reason`, `usage`."""
    context, record = context_of(request), record_of(request.scope)
    record.model, record.is_streamed = body.model, True
    chunks = counting.report(context.backend, body.model, body.image_bytes(), record)
    return EventStream(ReportStream(chunks, record), context.settings.heartbeat_s)


class ReportStream:
    """The events of one report."""

    def __init__(self, chunks: AsyncGenerator[Chunk, None], record: RequestRecord) -> None:
        self._chunks = chunks
        self._record = record

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Give the events."""
        async with contextlib.aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                if chunk.text:
                    yield sse.event({"delta": chunk.text})
                if chunk.finish_reason:
                    yield sse.event({"finish_reason": chunk.finish_reason, "usage": usage_form(self._record.usage)})
        yield sse.DONE

    def failure(self, error: ApiError) -> bytes:
        """The error, after what has come."""
        return sse.event(error.body("")) + sse.DONE
