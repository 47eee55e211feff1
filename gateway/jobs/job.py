"""Job: a request to one of the gateway's endpoints that is answered later; and the errors of the queue."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PRIORITIES = ("high", "normal", "low", "batch")  # the queue takes them in this order; lines of batches come last
ENDED = ("completed", "failed", "cancelled", "expired")


class QueueError(Exception):
    """Redis doesn't answer now."""


class JobsFullError(Exception):
    """The queue has as many jobs, or as many bytes, as it may."""


class KeyReusedError(Exception):
    """An idempotency key came with another request than before."""


class WebhookRefusedError(Exception):
    """The gateway sends nothing to this URL."""


@dataclass(frozen=True)
class NewJob:
    """What a client submits.

    owner: the API key's id; "" without keys. body: of the request to `endpoint`, JSON. caller, tokens_per_minute: on
    whose account its tokens are. webhook: {"url", "secret"}. idempotency_key: the same one makes no second job.
    """

    owner: str
    endpoint: str
    body: str
    priority: str = "normal"
    ttl_s: float = 86400.0
    max_attempts: int = 5
    caller: str = ""
    tokens_per_minute: int = 0
    webhook: Mapping[str, str] | None = None
    idempotency_key: str = ""


@dataclass(frozen=True)
class QueuedJob:
    """A job as the queue keeps it; times are seconds since 1970.

    status: "queued", "running", or one of `ENDED`. attempts: how often it was begun. response: {"status_code", "body"}
    of the endpoint. error: {"code", "message"} where the queue itself ended it.
    """

    id: str
    owner: str
    endpoint: str
    priority: str
    status: str
    created_at: float
    expires_at: float
    attempts: int
    max_attempts: int
    body: str = ""
    started_at: float | None = None
    finished_at: float | None = None
    response: Any = None
    error: Any = None
    webhook: Mapping[str, str] | None = None
    webhook_status: str | None = None
    caller: str = ""
    tokens_per_minute: int = 0

    @classmethod
    def from_hash(cls, job_id: str, fields: Mapping[bytes, bytes]) -> QueuedJob:
        """The job of a Redis hash."""
        text = {name.decode(): value.decode() for name, value in fields.items()}
        return cls(
            job_id,
            text["owner"],
            text["endpoint"],
            PRIORITIES[int(text["priority"])],
            text["status"],
            int(text["created"]) / 1000,
            int(text["deadline"]) / 1000,
            int(text["attempts"]),
            int(text["max_attempts"]),
            text.get("body", ""),
            _seconds(text.get("started")),
            _seconds(text.get("finished")),
            _value(text.get("response")),
            _value(text.get("error")),
            _value(text.get("webhook")),
            text.get("webhook_status"),
            text.get("caller", ""),
            int(text.get("tokens_per_minute", 0)),
        )

    @property
    def has_ended(self) -> bool:
        """Whether it will change no more."""
        return self.status in ENDED

    def form(self) -> dict[str, Any]:
        """The job as the API tells it. Neither the request nor the webhook's secret is in it."""
        return {
            "id": self.id,
            "object": "job",
            "endpoint": self.endpoint,
            "status": self.status,
            "priority": self.priority,
            "created_at": int(self.created_at),
            "expires_at": int(self.expires_at),
            "started_at": None if self.started_at is None else int(self.started_at),
            "finished_at": None if self.finished_at is None else int(self.finished_at),
            "attempts": self.attempts,
            "max_attempts": self.max_attempts,
            "response": self.response,
            "error": self.error,
            "webhook": self.webhook and {"url": self.webhook["url"], "status": self.webhook_status or "pending"},
        }


def _seconds(text: str | None) -> float | None:
    return int(text) / 1000 if text else None


def _value(text: str | None) -> Any:
    return json.loads(text) if text else None
