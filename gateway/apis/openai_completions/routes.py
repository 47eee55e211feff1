"""The route `/v1/completions`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from deepseek_triton.gateway.apis.openai_completions.answer import (
    CompletionForm,
    CompletionStream,
    completion_requests,
)
from deepseek_triton.gateway.apis.openai_completions.body import CompletionBody
from deepseek_triton.gateway.apis.wire import counting
from deepseek_triton.gateway.apis.wire.connection import EventStream, left, while_connected
from deepseek_triton.gateway.apis.wire.context import context_of
from deepseek_triton.gateway.apis.wire.large_bodies import BodyRoute, apart
from deepseek_triton.gateway.apis.wire.together import gather_all, merge
from deepseek_triton.gateway.collection.offer import offer_of
from deepseek_triton.gateway.record import record_of

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/completions", response_model=None)
async def create_completion(request: Request, body: CompletionBody) -> Response:
    """Continue one or several texts, at once or as a stream of server-sent events."""
    context, record = context_of(request), record_of(request.scope)
    record.model, record.is_streamed = body.model, bool(body.stream)
    offer, num_choices = offer_of(request, body.store, body.user), body.n or 1
    asked = await apart(request, completion_requests, body)
    suffixes = [f"-{index}" for index in range(len(asked))] if len(asked) > 1 else [""]
    if body.stream:
        sources = [
            offer.stream(one, counting.stream(context.backend, body.model, one, record, suffix), index * num_choices)
            for index, (one, suffix) in enumerate(zip(asked, suffixes, strict=True))
        ]
        return EventStream(CompletionStream(body, merge(sources), record), context.settings.heartbeat_s)
    works = [
        counting.generate(context.backend, body.model, one, record, suffix)
        for one, suffix in zip(asked, suffixes, strict=True)
    ]
    answers = await while_connected(request, gather_all(works))
    if answers is None:
        return left()
    for index, (one, generations) in enumerate(zip(asked, answers, strict=True)):
        offer.whole(one, generations, index * num_choices)
    return JSONResponse(CompletionForm(body, record).whole(answers))
