"""What a middleware does when the app stops."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send


async def run_lifespan(
    app: ASGIApp, scope: Scope, receive: Receive, send: Send, close: Callable[[], Awaitable[None]]
) -> None:
    """Run `app` with a lifespan's scope; `close` is awaited before the server hears that all has stopped."""

    async def send_last(message: Message) -> None:
        if message["type"] != "lifespan.startup.complete":
            await close()
        await send(message)

    await app(scope, receive, send_last)
