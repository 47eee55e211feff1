"""The queue as the routes see it: there or off, and its errors as the API tells them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from fastapi import Request

from deepseek_triton.gateway.apis.wire.errors import ApiError
from deepseek_triton.gateway.jobs.job import JobsFullError, KeyReusedError, QueueError
from deepseek_triton.gateway.jobs.queue import JobQueue
from deepseek_triton.gateway.jobs.service import JobService

log = logging.getLogger(__name__)

RETRY_FULL_S = 5


def service_of(request: Request) -> JobService:
    """The app's jobs. Raises `ApiError`: the queue is off."""
    service = request.app.state.jobs
    if service is None:
        raise ApiError(503, "the queue is off: the gateway runs without --redis-url", code="queue_off")
    assert isinstance(service, JobService)
    return service


def queue_of(request: Request) -> JobQueue:
    """The app's queue. Raises `ApiError`: it is off."""
    return service_of(request).queue


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Raise the queue's errors as `ApiError`."""
    try:
        yield
    except JobsFullError as error:
        headers = {"Retry-After": str(RETRY_FULL_S)}
        raise ApiError(429, str(error), code="queue_full", headers=headers) from None
    except KeyReusedError as error:
        raise ApiError(409, str(error), param="Idempotency-Key", code="idempotency_key_reused") from None
    except QueueError as error:
        log.error("%s", error)
        raise ApiError(
            503, "the queue doesn't answer now", code="queue_unavailable", headers={"Retry-After": "1"}
        ) from None
