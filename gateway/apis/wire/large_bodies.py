"""Large bodies are checked on a thread: tens of thousands of values take half a second, for which nobody else waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

P = ParamSpec("P")
T = TypeVar("T")
LARGE_BYTES = 32 * 1024  # some 20 ms at the most
PARSED = "gateway.parsed_body"  # a large body's JSON value, in the scope of its request


class BodyRoute(APIRoute):
    """A route whose body is validated on a thread where it is large; StrictBodies has parsed it there."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, which finds a large body validated."""
        handler = super().get_route_handler()
        model: Any = None if self.body_field is None else self.body_field.field_info.annotation

        async def handle(request: Request) -> Response:
            if model is None or PARSED not in request.scope:
                return await handler(request)
            value, request.scope[PARSED] = request.scope[PARSED], None
            try:
                body = await asyncio.to_thread(model.model_validate, value)
            except ValidationError as error:
                faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors(include_url=False)]
                raise RequestValidationError(faults, body=value) from None
            return await handler(_Validated(request, body))

        return handle


async def apart(request: Request, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """What `work` makes of a body: on a thread where that is large."""
    if PARSED in request.scope:
        return await asyncio.to_thread(work, *args, **options)
    return work(*args, **options)


class _Validated(Request):
    """A request whose body's JSON value is the object that its route takes."""

    def __init__(self, request: Request, body: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._validated = body

    async def json(self) -> Any:
        """The object."""
        return self._validated
