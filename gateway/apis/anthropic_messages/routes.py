"""The routes `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from deepseek_triton.gateway.apis.anthropic_messages.body import CountBody, MessagesBody
from deepseek_triton.gateway.apis.anthropic_messages.translate import count_request, message_request, tool_use_of
from deepseek_triton.gateway.apis.anthropic_messages.writer import MessageStream, MessageWriter
from deepseek_triton.gateway.apis.wire import counting
from deepseek_triton.gateway.apis.wire.connection import EventStream, left, while_connected
from deepseek_triton.gateway.apis.wire.context import context_of
from deepseek_triton.gateway.apis.wire.large_bodies import BodyRoute, apart
from deepseek_triton.gateway.record import record_of

router = APIRouter(prefix="/v1/messages", route_class=BodyRoute)


@router.post("", response_model=None)
async def create_message(request: Request, body: MessagesBody) -> Response:
    """Answer a conversation, at once or as a stream of server-sent events."""
    context, record = context_of(request), record_of(request.scope)
    record.model, record.is_streamed = body.model, bool(body.stream)
    asked, forced = await apart(request, message_request, body), tool_use_of(body).forced
    if body.stream:
        chunks = counting.stream(context.backend, body.model, asked, record)
        response: Response = EventStream(MessageStream(chunks, record, forced), context.settings.heartbeat_s)
    else:
        generations = await while_connected(request, counting.generate(context.backend, body.model, asked, record))
        if generations is None:
            return left()
        writer = MessageWriter(record, forced)
        writer.push(generations[0])
        response = JSONResponse(writer.message)
    response.headers["request-id"] = record.request_id  # where Anthropic's clients look for it
    return response


@router.post("/count_tokens", response_model=None)
async def count_tokens(request: Request, body: CountBody) -> Response:
    """Count a prompt's tokens: the server counts them as it answers with one token, and keeps the prompt."""
    context, record = context_of(request), record_of(request.scope)
    record.model = body.model
    asked = await apart(request, count_request, body)
    if await while_connected(request, counting.generate(context.backend, body.model, asked, record)) is None:
        return left()
    return JSONResponse({"input_tokens": record.usage.input})
