"""The route `/v1/chat/completions`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from deepseek_triton.gateway.apis.openai_chat.answer import completion
from deepseek_triton.gateway.apis.openai_chat.body import ChatBody
from deepseek_triton.gateway.apis.openai_chat.stream import ChatStream
from deepseek_triton.gateway.apis.openai_chat.translate import chat_request, tool_use_of
from deepseek_triton.gateway.apis.wire import counting
from deepseek_triton.gateway.apis.wire.connection import EventStream, left, while_connected
from deepseek_triton.gateway.apis.wire.context import context_of
from deepseek_triton.gateway.apis.wire.large_bodies import BodyRoute, apart
from deepseek_triton.gateway.collection.offer import offer_of
from deepseek_triton.gateway.record import record_of

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/chat/completions", response_model=None)
async def create_chat_completion(request: Request, body: ChatBody) -> Response:
    """Answer a chat, at once or as a stream of server-sent events."""
    context, record = context_of(request), record_of(request.scope)
    record.model, record.is_streamed = body.model, bool(body.stream)
    offer = offer_of(request, body.store, body.safety_identifier or body.user)
    asked, forced = await apart(request, chat_request, body), tool_use_of(body).forced
    if body.stream:
        chunks = offer.stream(asked, counting.stream(context.backend, body.model, asked, record))
        return EventStream(ChatStream(body, chunks, record, forced), context.settings.heartbeat_s)
    generations = await while_connected(request, counting.generate(context.backend, body.model, asked, record))
    if generations is None:
        return left()
    offer.whole(asked, generations)
    return JSONResponse(completion(body, record.request_id, generations, record.usage, forced))
