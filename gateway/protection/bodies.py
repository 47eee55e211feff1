"""StrictBodies: a JSON body is read within its bounds and checked as a whole before a route sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepseek_triton.gateway.apis.wire.connection import left
from deepseek_triton.gateway.apis.wire.errors import ApiError, error_response
from deepseek_triton.gateway.apis.wire.large_bodies import LARGE_BYTES, PARSED
from deepseek_triton.gateway.protection.strict_json import JsonBounds, JsonError, JsonTooLargeError, parse, texts
from deepseek_triton.gateway.record import record_of
from deepseek_triton.gateway.settings import GatewaySettings

# Fields, of all APIs, whose texts become the prompt.
PROMPT_FIELDS = ("messages", "prompt", "suffix", "input", "instructions", "system", "tools", "query", "documents")
NOT_JSON = (b"multipart/form-data", b"application/octet-stream")


class StrictBodies:
    """Middleware: refuses a body that isn't strict JSON with 400, and one beyond a bound with 413."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._settings = settings
        self._bounds = JsonBounds(settings.max_json_depth, settings.max_json_members)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on whose body is right."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS") or _is_other(scope):
            await self._app(scope, receive, send)
            return
        body = await _read(receive)
        if body is None:
            record_of(scope).has_left = True
            await left()(scope, receive, send)
            return
        try:
            if len(body) > LARGE_BYTES:
                scope[PARSED] = await asyncio.to_thread(self._check, body)
            else:
                self._check(body)
        except JsonError as error:
            status = 413 if isinstance(error, JsonTooLargeError) else 400
            await error_response(ApiError(status, str(error)), scope["path"])(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    def _check(self, body: bytes) -> dict[str, Any]:
        """The JSON object. Raises `JsonError`. An empty body is the route's affair."""
        if not body:
            return {}
        value = parse(body, self._bounds)
        if not isinstance(value, dict):
            raise JsonError("the body must be a JSON object")
        limit = self._settings.max_prompt_chars
        if len(body) > limit:  # a character is a byte at least
            prompt = [value[name] for name in PROMPT_FIELDS if name in value]
            num_chars = sum(map(len, texts(prompt)))
            if num_chars > limit:
                raise JsonTooLargeError(f"the prompt has {num_chars} characters; {limit} are allowed")
        limit = self._settings.max_schema_chars
        if len(body) > limit:
            for place, schema in _schemas(value):
                num_chars = len(json.dumps(schema, ensure_ascii=False, separators=(",", ":")))
                if num_chars > limit:
                    raise JsonTooLargeError(f"{place} has {num_chars} characters; {limit} are allowed")
        return value


def _schemas(body: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The parts of a body that hold schemas, and their names."""
    for name in ("response_format", "text", "output_config", "output_format"):
        if name in body:
            yield name, body[name]
    tools = body.get("tools")
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        yield f"tools[{index}]", tool


def _is_other(scope: Scope) -> bool:
    """Whether the body is of another kind than JSON: its route reads it."""
    kind: bytes = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    return kind.lower().startswith(NOT_JSON)


async def _read(receive: Receive) -> bytes | None:
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body first."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed
