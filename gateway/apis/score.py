"""`/v1/score`: texts and labels → probabilities."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag, model_validator
from starlette.responses import JSONResponse, Response

from deepseek_triton.clients import ScoreRequest
from deepseek_triton.gateway.apis.openai_chat.messages import ChatMessage
from deepseek_triton.gateway.apis.wire.connection import left, while_connected
from deepseek_triton.gateway.apis.wire.context import backend_of
from deepseek_triton.gateway.apis.wire.counting import call_of
from deepseek_triton.gateway.apis.wire.errors import ApiError
from deepseek_triton.gateway.apis.wire.large_bodies import BodyRoute
from deepseek_triton.gateway.apis.wire.validation import Body, field_error
from deepseek_triton.gateway.record import record_of

router = APIRouter(route_class=BodyRoute)

MAX_TEXTS = 64  # in one request

Texts = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS), Tag("<texts>")],
    Discriminator(lambda value: "<texts>" if isinstance(value, list) else "<text>"),
]


class ScoreBody(Body):
    """Texts for the model's prompt template, or chats; and labels where those of the build aren't meant."""

    model: str = Field(min_length=1)
    input: Texts | None = None
    chats: list[Annotated[list[ChatMessage], Field(min_length=1)]] | None = Field(
        default=None, min_length=1, max_length=MAX_TEXTS
    )
    labels: list[str] | None = Field(default=None, min_length=1, max_length=256)

    @model_validator(mode="after")
    def _check_together(self) -> ScoreBody:
        if (self.input is None) == (self.chats is None):
            raise field_error("input", "exactly one of input and chats must be given")
        return self


@router.post("/v1/score", response_model=None)
async def score(request: Request, body: ScoreBody) -> Response:
    """Score each text's labels."""
    record = record_of(request.scope)
    record.model = body.model
    chats = [[turn.to_turn() for turn in chat] for chat in body.chats] if body.chats else None
    try:
        asked = ScoreRequest(texts=body.input, chats=chats, labels=body.labels)
    except ValueError as error:
        raise ApiError(400, str(error)) from None
    scores = await while_connected(request, backend_of(request).score(body.model, asked, call_of(record)))
    if scores is None:
        return left()
    record.usage.input = sum(one.num_input_tokens for one in scores)
    rows: list[dict[str, Any]] = [
        {
            "object": "score",
            "index": index,
            "label": one.label,
            "probabilities": one.probabilities,
            "log_probs": one.log_probs,
            "is_calibrated": one.is_calibrated,
        }
        for index, one in enumerate(scores)
    ]
    usage = {"prompt_tokens": record.usage.input, "total_tokens": record.usage.input}
    return JSONResponse({"object": "list", "model": body.model, "data": rows, "usage": usage})
