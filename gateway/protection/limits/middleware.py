"""CallerLimits: what one caller takes; and the headers that tell it what is left."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Coroutine
from datetime import datetime, timedelta, timezone
from typing import Any

from limits.errors import StorageError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepseek_triton.gateway.apis.wire.errors import ANTHROPIC_PATHS, ApiError, error_response
from deepseek_triton.gateway.protection.keys.caller import Caller, caller_of
from deepseek_triton.gateway.protection.lifespan import run_lifespan
from deepseek_triton.gateway.protection.limits.rates import CallerRates, RateState
from deepseek_triton.gateway.protection.limits.slots import CallerSlots, NoSlotError, OwnSlots, SharedSlots, SlotsError
from deepseek_triton.gateway.record import record_of
from deepseek_triton.gateway.settings import GatewaySettings

log = logging.getLogger(__name__)

_CHARGED = "gateway.charged_tokens"

Headers = list[tuple[bytes, bytes]]


class CallerLimits:
    """Middleware: refuses what is too much with 429, counts tokens when the answer has ended, however it ended."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._rates = CallerRates(settings.redis_url)
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots: CallerSlots = OwnSlots(settings.max_running)
        if settings.redis_url:
            lease_s = settings.request_timeout_s + settings.body_timeout_s + settings.drain_s
            self._slots = SharedSlots(settings.redis_url, settings.max_running, lease_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on if there is room for it."""
        if scope["type"] == "lifespan":
            await run_lifespan(self._app, scope, receive, send, self._close)
            return
        caller = caller_of(scope)
        if caller is None:
            await self._app(scope, receive, send)
            return
        try:
            slot = await self._take_slot(caller)
        except ApiError as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        record = record_of(scope)
        # An answer in the background keeps its slot until it is complete.
        record.settle = lambda: self._begin(self._settle(caller, slot, scope))
        try:
            await self._run(caller, scope, receive, send)
        finally:
            if not record.is_background:
                # Shielded: a request that is cancelled gives back what it took, too.
                await asyncio.shield(self._settle(caller, slot, scope))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _close(self) -> None:
        await self._rates.close()
        await self._slots.close()

    async def _take_slot(self, caller: Caller) -> str:
        try:
            return await self._slots.take(caller)
        except NoSlotError as error:
            whose = "of this key" if error.is_own else "in all"
            raise ApiError(
                429 if error.is_own else 503,
                f"too many requests {whose} run at this time; retry later",
                code="too_many_running",
                headers={"Retry-After": "1"},
            ) from None
        except SlotsError as error:
            raise _unavailable(error) from None

    async def _run(self, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            states = await self._rates.take(caller)
            headers = _headers(states, scope["path"])
            _check(states, headers)
        except StorageError as error:
            await error_response(_unavailable(error), scope["path"])(scope, receive, send)
            return
        except ApiError as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return

        async def send_told(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *headers]}
            elif not message.get("more_body", False):
                await self._charge(caller, scope)  # before the client knows that it may send the next
            await send(message)

        await self._app(scope, receive, send_told if headers else send)

    async def _settle(self, caller: Caller, slot: str, scope: Scope) -> None:
        await self._charge(caller, scope)
        try:
            await self._slots.release(caller, slot)
        except SlotsError as error:
            log.error("a slot is given back when its lease ends: %s", error)

    async def _charge(self, caller: Caller, scope: Scope) -> None:
        """Count the tokens that the request has used and that aren't counted yet."""
        usage = record_of(scope).usage
        num_tokens = usage.input + usage.output - scope.get(_CHARGED, 0)
        if num_tokens <= 0:
            return
        scope[_CHARGED] = scope.get(_CHARGED, 0) + num_tokens
        try:
            await self._rates.charge(caller, num_tokens)
        except StorageError as error:
            log.error("tokens aren't counted: %s", error)


def _check(states: tuple[RateState, ...], headers: Headers) -> None:
    """Raise `ApiError` if there is no room."""
    full = [state for state in states if state.wait_s]
    if full:
        state = max(full, key=lambda state: state.wait_s)
        raise ApiError(
            429,
            f"this key may use {state.limit} {state.kind} a minute; retry after {math.ceil(state.wait_s)} s",
            code="rate_limit_exceeded",
            headers={
                "Retry-After": str(math.ceil(state.wait_s)),
                **{name.decode(): value.decode() for name, value in headers},
            },
        )


def _headers(states: tuple[RateState, ...], path: str) -> Headers:
    """What is left, in the form of the API at `path`."""
    headers: dict[str, str] = {}
    for state in states:
        if path.startswith(ANTHROPIC_PATHS):
            reset = datetime.now(timezone.utc) + timedelta(seconds=state.reset_s)
            head = f"anthropic-ratelimit-{state.kind}"
            reset_text = reset.strftime("%Y-%m-%dT%H:%M:%SZ")
            headers |= {
                f"{head}-limit": str(state.limit),
                f"{head}-remaining": str(state.remaining),
                f"{head}-reset": reset_text,
            }
        else:
            headers |= {
                f"x-ratelimit-limit-{state.kind}": str(state.limit),
                f"x-ratelimit-remaining-{state.kind}": str(state.remaining),
                f"x-ratelimit-reset-{state.kind}": f"{math.ceil(state.reset_s)}s",
            }
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def _unavailable(error: Exception) -> ApiError:
    log.error("requests are refused, because limits can't be counted: %s", error)
    return ApiError(503, "limits can't be checked now", code="limits_unavailable", headers={"Retry-After": "1"})
