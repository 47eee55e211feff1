"""Authentication: every path but the open ones needs a key, where the settings name a place of keys."""

from __future__ import annotations

import logging

from starlette.types import ASGIApp, Receive, Scope, Send

from deepseek_triton.gateway.apis.wire.errors import ApiError, error_response
from deepseek_triton.gateway.protection.keys.api_key import ApiKey, id_of
from deepseek_triton.gateway.protection.keys.caller import Caller, set_caller
from deepseek_triton.gateway.protection.keys.store import KeyStoreError, open_store
from deepseek_triton.gateway.protection.lifespan import run_lifespan
from deepseek_triton.gateway.record import record_of
from deepseek_triton.gateway.settings import GatewaySettings

log = logging.getLogger(__name__)

# They tell nothing of models and clients, and cost nothing.
OPEN_PATHS = frozenset(("/", "/report", "/health/live", "/health/ready"))
# `Authorization: Bearer KEY` is OpenAI's form, `x-api-key: KEY` Anthropic's.
BEARER = b"bearer "


class Authentication:
    """Middleware: tells who calls, or refuses the request before its body is read."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._settings = settings
        self._store = open_store(settings.keys) if settings.keys else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on if it may."""
        if scope["type"] == "lifespan":
            await run_lifespan(self._app, scope, receive, send, self._close)
            return
        if scope["path"] not in OPEN_PATHS:
            try:
                caller = await self._caller(scope)
                set_caller(scope, caller)
                record_of(scope).caller = caller.id
            except ApiError as error:
                await error_response(error, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _close(self) -> None:
        if self._store is not None:
            await self._store.close()

    async def _caller(self, scope: Scope) -> Caller:
        if self._store is None:
            return Caller.of_address(scope, self._settings)
        key = await self._key(_credentials(scope))
        record_of(scope).owner = key.id
        return Caller.of_key(key, self._settings)

    async def _key(self, text: str) -> ApiKey:
        assert self._store is not None
        key_id = id_of(text)
        try:
            key = await self._store.find(key_id) if key_id else None
        except KeyStoreError as error:
            log.error("requests are refused: %s", error)
            raise ApiError(
                503, "keys can't be checked now", code="keys_unavailable", headers={"Retry-After": "1"}
            ) from None
        if key is None or not key.opens(text):
            raise _refusal("the API key is wrong, revoked or expired")
        return key


def _credentials(scope: Scope) -> str:
    """The key that the headers give. Raises `ApiError` for none, and for several that differ."""
    found = set()
    for name, value in scope["headers"]:
        if name == b"x-api-key":
            found.add(value.strip())
        elif name == b"authorization" and value[: len(BEARER)].lower() == BEARER:
            found.add(value[len(BEARER) :].strip())
    if len(found) != 1:
        raise _refusal("several API keys were given" if found else "an API key is needed: Authorization: Bearer KEY")
    return str(found.pop().decode("latin-1"))


def _refusal(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
