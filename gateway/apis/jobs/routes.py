"""The routes below `/v1/jobs`."""

from __future__ import annotations

import json

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from deepseek_triton.gateway.apis.jobs.body import JobBody, check_request, idempotency_key
from deepseek_triton.gateway.apis.jobs.events import JobEvents
from deepseek_triton.gateway.apis.jobs.queue import queue_of, told
from deepseek_triton.gateway.apis.wire.connection import EventStream
from deepseek_triton.gateway.apis.wire.context import context_of
from deepseek_triton.gateway.apis.wire.errors import ApiError
from deepseek_triton.gateway.jobs.addresses import check_url
from deepseek_triton.gateway.jobs.job import NewJob, QueuedJob, WebhookRefusedError
from deepseek_triton.gateway.protection.keys.caller import caller_of
from deepseek_triton.gateway.record import record_of

router = APIRouter(prefix="/v1/jobs")


@router.post("", response_model=None, status_code=202)
async def submit_job(request: Request, body: JobBody) -> Response:
    """Keep a request, to be answered later."""
    queue, settings = queue_of(request), context_of(request).settings
    check_request(body.endpoint, body.body, "body.")
    if body.webhook is not None:
        try:
            check_url(body.webhook.url, settings.webhook_hosts)
        except WebhookRefusedError as error:
            raise ApiError(400, f"webhook.url: {error}", param="webhook.url") from None
    if body.ttl_s is not None and body.ttl_s > settings.job_ttl_s:
        raise ApiError(400, f"ttl_s must be at most {settings.job_ttl_s:g}, got {body.ttl_s:g}", param="ttl_s")
    caller, record = caller_of(request.scope), record_of(request.scope)
    model = body.body.get("model")
    record.model = model if isinstance(model, str) else None
    new = NewJob(
        record.owner,
        body.endpoint,
        json.dumps(body.body, ensure_ascii=False, separators=(",", ":")),
        body.priority,
        body.ttl_s or settings.job_ttl_s,
        body.max_attempts or settings.job_attempts,
        caller.id if caller else "",
        caller.tokens_per_minute if caller else 0,
        body.webhook.model_dump() if body.webhook is not None else None,
        idempotency_key(request),
    )
    with told():
        job = await queue.submit(new)
    return JSONResponse(job.form(), 202, {"Location": f"{router.prefix}/{job.id}"})


@router.get("/{job_id}", response_model=None)
async def read_job(request: Request, job_id: str) -> Response:
    """A job as it is now, with its answer if it has one."""
    return JSONResponse((await _find(request, job_id)).form())


@router.get("/{job_id}/events", response_model=None)
async def follow_job(request: Request, job_id: str) -> Response:
    """What becomes of a job, as server-sent events; `Last-Event-ID` goes on behind that event."""
    job = await _find(request, job_id)
    after = request.headers.get("last-event-id") or request.query_params.get("after") or "0-0"
    record_of(request.scope).is_streamed = True
    return EventStream(JobEvents(queue_of(request), job, after), context_of(request).settings.heartbeat_s)


@router.post("/{job_id}/cancel", response_model=None)
async def cancel_job(request: Request, job_id: str) -> Response:
    """End a job, whether it waits or runs; one that has ended is given as it is."""
    queue = queue_of(request)
    with told():
        job = await queue.cancel(job_id, record_of(request.scope).owner)
    if job is None:
        raise _missing(job_id)
    return JSONResponse(job.form())


async def _find(request: Request, job_id: str) -> QueuedJob:
    queue = queue_of(request)
    with told():
        job = await queue.find(job_id, record_of(request.scope).owner)
    if job is None:
        raise _missing(job_id)
    return job


def _missing(job_id: str) -> ApiError:
    return ApiError(404, f"there is no job {job_id[:80]!r}", param="job_id", code="job_not_found")
