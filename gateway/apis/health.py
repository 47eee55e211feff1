"""The routes `/health/live` and `/health/ready`, which need no key."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from deepseek_triton.gateway.apis.wire.context import context_of

router = APIRouter()

KEPT_S = 1.0  # strangers may ask: the backend is asked once a second at most


@router.get("/health/live", response_model=None)
async def is_live() -> Response:
    """Say that the gateway runs."""
    return JSONResponse({"status": "live"})


@router.get("/health/ready", response_model=None)
async def is_ready(request: Request) -> Response:
    """Say whether a request would be answered: the models' server is there, and the gateway isn't shutting down.

    `collection`: whether answers are collected.
    """
    state = request.app.state
    asked_at, is_there = getattr(state, "readiness", (0.0, False))
    if time.monotonic() - asked_at > KEPT_S:
        is_there = await context_of(request).backend.is_ready()
        state.readiness = (time.monotonic(), is_there)
    collection = "off" if context_of(request).collector is None else "on"
    status = "ready" if is_there else "not ready"
    return JSONResponse({"status": status, "collection": collection}, 200 if is_there else 503)
