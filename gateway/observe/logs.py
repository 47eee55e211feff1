"""Log lines as JSON: one for each request that has ended, and those of every logger. They hold no prompt.

`--log-prompts` adds what a client has sent to the model, for an operator who may read it.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import asdict
from typing import Any

from deepseek_triton.clients import GenerateRequest, Message

FIELDS = "fields"  # of a LogRecord: what its line has beside the text
requests = logging.getLogger("deepseek_triton.gateway.requests")


class JsonFormatter(logging.Formatter):
    """One line of JSON for each record: time, level, logger, message, and the record's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up(level: str, *, is_json: bool) -> None:
    """Send the lines of every logger to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if is_json else logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def log_request(message: str, fields: dict[str, Any]) -> None:
    """The line of a request that has ended."""
    requests.info(message, extra={FIELDS: fields})


def log_prompt(request_id: str, model: str, request: GenerateRequest) -> None:
    """What goes to the model, where an operator has asked for it."""
    prompt: Any = request.prompt
    if request.messages is not None:
        prompt = [asdict(each) if isinstance(each, Message) else dict(each) for each in request.messages]
    requests.info("prompt", extra={FIELDS: {"request_id": request_id, "model": model, "prompt": prompt}})
