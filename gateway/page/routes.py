"""The routes `/` and `/report`: an HTML file each, which may load nothing and talk to nobody but this gateway."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from deepseek_triton.gateway.apis.wire.context import backend_of
from deepseek_triton.gateway.apis.wire.errors import ApiError

router = APIRouter()

PAGE = Path(__file__).with_name("index.html").read_bytes()
REPORT_PAGE = Path(__file__).with_name("report.html").read_bytes()


def _policy(page: bytes) -> str:
    """The Content-Security-Policy under which the page's own script and style run, and no others."""
    rules = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    for element in ("script", "style"):
        (text,) = re.findall(rb"<%b>(.*?)</%b>" % (element.encode(), element.encode()), page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
        rules.append(f"{element}-src 'sha256-{digest}'")
    return "; ".join([*rules, "frame-ancestors 'none'"])


def _headers(page: bytes) -> dict[str, str]:
    return {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": _policy(page),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


HEADERS = _headers(PAGE)
REPORT_HEADERS = _headers(REPORT_PAGE)


@router.get("/", include_in_schema=False)
async def read_page() -> Response:
    """The page."""
    return Response(PAGE, media_type="text/html; charset=utf-8", headers=HEADERS)


@router.get("/report", include_in_schema=False)
async def read_report_page(request: Request) -> Response:
    """The page that takes an image, where a model is served that reports on images."""
    if not any(model.task == "report" for model in await backend_of(request).models()):
        raise ApiError(404, "no model that reports on images is served; examples/image_report builds one")
    return Response(REPORT_PAGE, media_type="text/html; charset=utf-8", headers=REPORT_HEADERS)
