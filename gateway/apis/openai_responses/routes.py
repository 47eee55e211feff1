"""The routes below `/v1/responses`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from deepseek_triton.gateway.apis.openai_responses.answering import Answering
from deepseek_triton.gateway.apis.openai_responses.body import ResponseBody
from deepseek_triton.gateway.apis.openai_responses.items import Turn, answer_turns
from deepseek_triton.gateway.apis.openai_responses.store import ResponseStore, StoredResponse
from deepseek_triton.gateway.apis.openai_responses.translate import (
    begun_response,
    input_items,
    input_turns,
    response_request,
    tool_use_of,
)
from deepseek_triton.gateway.apis.openai_responses.writer import ResponseWriter
from deepseek_triton.gateway.apis.wire import counting
from deepseek_triton.gateway.apis.wire.connection import EventStream, left, while_connected
from deepseek_triton.gateway.apis.wire.context import context_of
from deepseek_triton.gateway.apis.wire.errors import ApiError
from deepseek_triton.gateway.apis.wire.large_bodies import BodyRoute, apart
from deepseek_triton.gateway.collection.offer import offer_of
from deepseek_triton.gateway.record import record_of

router = APIRouter(prefix="/v1/responses", route_class=BodyRoute)


@router.post("", response_model=None)
async def create_response(request: Request, body: ResponseBody) -> Response:
    """Answer, at once, as a stream of server-sent events, or in the background."""
    context, record = context_of(request), record_of(request.scope)
    record.model, record.is_streamed = body.model, bool(body.stream)
    settings, store = context.settings, store_of(request)
    if settings.workers > 1:
        _refuse_what_one_process_keeps(body)
    turns = [*_earlier_turns(body, store, record.owner), *await apart(request, input_turns, body)]
    tool_use = tool_use_of(body)
    asked, response = await apart(request, response_request, body, turns, tool_use), begun_response(body)
    if settings.workers > 1:
        response["store"] = False
    items = await apart(request, input_items, body, response["id"])
    stored = StoredResponse(record.owner, response, turns, items)
    writer = ResponseWriter(response, record.usage, tool_use.forced, body.has_log_probs)
    # `store: true` asks for what the API itself keeps; only `false` says something of collection.
    offer = offer_of(request, False if body.store is False else None, body.safety_identifier or body.user)
    chunks = offer.stream(asked, counting.stream(context.backend, body.model, asked, record))
    answering = Answering(writer, chunks, stored, store)
    if body.background:
        if store.num_running >= settings.max_background_responses:
            raise ApiError(429, "too many responses are computed in the background; retry later", param="background")
        await context.backend.check_model(body.model)
        record.is_background = True
        record.task = store.start(stored, answering.run(record))
        return JSONResponse(response)
    if body.stream:
        return EventStream(answering, settings.heartbeat_s)
    whole = await while_connected(request, answering.whole())
    return left() if whole is None else JSONResponse(whole)


@router.get("/{response_id}", response_model=None)
async def read_response(request: Request, response_id: str) -> Response:
    """A response that was kept, or that is computed in the background."""
    _refuse_query(request)
    return JSONResponse(_find(request, response_id).response)


@router.delete("/{response_id}", response_model=None)
async def delete_response(request: Request, response_id: str) -> Response:
    """End a response if it runs, and forget it."""
    stored = _find(request, response_id)
    await store_of(request).cancel(stored)
    store_of(request).remove(stored)
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


@router.post("/{response_id}/cancel", response_model=None)
async def cancel_response(request: Request, response_id: str) -> Response:
    """End a response that is computed in the background; one that has ended is given as it is."""
    stored = _find(request, response_id)
    if not stored.response["background"]:
        message = "only a response with background: true can be cancelled; to end another one, close its connection"
        raise ApiError(400, message, param="response_id")
    await store_of(request).cancel(stored)
    return JSONResponse(stored.response)


@router.get("/{response_id}/input_items", response_model=None)
async def list_input_items(request: Request, response_id: str) -> Response:
    """The items of a response's own input, the last one first, in one page."""
    _refuse_query(request, {"order": ("asc", "desc")})
    items = _find(request, response_id).input_items
    items = items if request.query_params.get("order") == "asc" else items[::-1]
    ids = {"first_id": items[0]["id"], "last_id": items[-1]["id"]}
    return JSONResponse({"object": "list", "data": items, "has_more": False, **ids})


def store_of(request: Request) -> ResponseStore:
    """The app's store."""
    store = request.app.state.responses
    assert isinstance(store, ResponseStore)
    return store


def _find(request: Request, response_id: str) -> StoredResponse:
    stored = store_of(request).get(response_id, record_of(request.scope).owner)
    if stored is None:
        raise ApiError(404, f"Response with id '{response_id}' not found.", param="response_id")
    return stored


def _earlier_turns(body: ResponseBody, store: ResponseStore, owner: str) -> list[Turn]:
    """The conversation that `previous_response_id` continues."""
    if body.previous_response_id is None:
        return []
    stored = store.get(body.previous_response_id, owner)
    if stored is None or stored.task is not None:
        what = "is still computed" if stored is not None else "is not, or no longer, kept"
        message = f"the response {body.previous_response_id!r} {what}"
        raise ApiError(400, message, param="previous_response_id", code="previous_response_not_found")
    return [*stored.turns, *answer_turns(stored.response["output"])]


def _refuse_what_one_process_keeps(body: ResponseBody) -> None:
    for name in ("background", "previous_response_id", "store"):
        if getattr(body, name):
            raise ApiError(400, f"{name} is not supported by a gateway with several workers", param=name)


def _refuse_query(request: Request, allowed: dict[str, tuple[str, ...]] | None = None) -> None:
    """Nothing is dropped in silence: a parameter of the address neither."""
    for name, value in request.query_params.items():
        if value not in (allowed or {}).get(name, ()) and (name, value) != ("stream", "false"):
            raise ApiError(400, f"{name} is not supported, got {value!r}", param=name)
