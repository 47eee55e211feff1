"""`/v1/embeddings`: texts → hidden states of unit length, by a scoring model that was built with --embeddings."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import ClassVar, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from deepseek_triton.gateway.apis.score import Texts
from deepseek_triton.gateway.apis.wire.connection import left, while_connected
from deepseek_triton.gateway.apis.wire.context import backend_of
from deepseek_triton.gateway.apis.wire.counting import call_of
from deepseek_triton.gateway.apis.wire.large_bodies import BodyRoute
from deepseek_triton.gateway.apis.wire.validation import Body
from deepseek_triton.gateway.record import record_of

router = APIRouter(route_class=BodyRoute)


class EmbeddingsBody(Body):
    """One text or several. dimensions: no part of a hidden state means anything by itself, so none can be cut off."""

    NOT_SUPPORTED: ClassVar = {"dimensions": ()}

    model: str = Field(min_length=1)
    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


@router.post("/v1/embeddings", response_model=None)
async def embed(request: Request, body: EmbeddingsBody) -> Response:
    """Embed each text."""
    record = record_of(request.scope)
    record.model = body.model
    texts = [body.input] if isinstance(body.input, str) else body.input
    embeddings = await while_connected(request, backend_of(request).embed(body.model, texts, call_of(record)))
    if embeddings is None:
        return left()
    record.usage.input = sum(one.num_input_tokens for one in embeddings)
    rows = [
        {"object": "embedding", "index": index, "embedding": _encoded(one.values, body.encoding_format)}
        for index, one in enumerate(embeddings)
    ]
    usage = {"prompt_tokens": record.usage.input, "total_tokens": record.usage.input}
    return JSONResponse({"object": "list", "model": body.model, "data": rows, "usage": usage})


def _encoded(values: Sequence[float], encoding: str) -> list[float] | str:
    """The values at unit length; "base64": as little-endian float32."""
    length = sum(value * value for value in values) ** 0.5
    unit = [value / length for value in values] if length else list(values)
    return base64.b64encode(struct.pack(f"<{len(unit)}f", *unit)).decode() if encoding == "base64" else unit
