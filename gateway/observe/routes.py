"""`/metrics`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

router = APIRouter()
TEXT = "text/plain; version=0.0.4; charset=utf-8"


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    """All metrics in Prometheus's text format."""
    return Response(request.app.state.observer.metrics.text(), media_type=TEXT)
