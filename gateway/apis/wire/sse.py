"""Server-sent events: JSON values in, the bytes of events out."""

from __future__ import annotations

import json
from typing import Any

DONE = b"data: [DONE]\n\n"
# A comment line, which every reader of events skips: it keeps an idle connection open.
HEARTBEAT = b": heartbeat\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # made once: dumps makes one each time


def event(data: Any, name: str | None = None) -> bytes:
    """One event. JSON escapes line ends, so its data is one line."""
    text = _encode(data)
    return (f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n").encode("utf-8", "replace")
