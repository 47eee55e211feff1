"""The routes below `/v1/batches`: OpenAI's batches."""

from __future__ import annotations

import asyncio
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from deepseek_triton.gateway.apis.jobs.files import EXPIRES_S, files_of, find_file, missing, on_disk, page
from deepseek_triton.gateway.apis.jobs.queue import RETRY_FULL_S, service_of
from deepseek_triton.gateway.apis.jobs.queue import told as queue_told
from deepseek_triton.gateway.apis.wire.errors import ApiError
from deepseek_triton.gateway.apis.wire.validation import Body
from deepseek_triton.gateway.jobs.batches.batch import Batch, BatchEndedError, BatchesFullError, NewBatch
from deepseek_triton.gateway.jobs.batches.run import INPUT
from deepseek_triton.gateway.jobs.batches.scripts import LONGEST_WINDOW_S
from deepseek_triton.gateway.jobs.files.store import FileStore, share
from deepseek_triton.gateway.jobs.files.stored_file import FilesError, StoredFile
from deepseek_triton.gateway.protection.keys.caller import caller_of
from deepseek_triton.gateway.record import record_of

router = APIRouter(prefix="/v1/batches")

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
WINDOW = re.compile(r"([1-9][0-9]{0,5})([smhd])")
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class ExpiryBody(Body):
    """How long a batch's results are kept."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=EXPIRES_S[0], le=EXPIRES_S[-1])


class BatchBody(Body):
    """A file of requests to one endpoint. completion_window: OpenAI's "24h", or any other number of s, m, h or d."""

    input_file_id: str = Field(min_length=1, max_length=64)
    endpoint: str
    completion_window: str
    metadata: dict[MetadataKey, MetadataValue] | None = Field(default=None, max_length=16)
    output_expires_after: ExpiryBody | None = None


@router.post("", response_model=None)
async def create_batch(request: Request, body: BatchBody) -> Response:
    """Let the requests in a file be answered."""
    service, files = service_of(request), files_of(request)
    owner, caller = record_of(request.scope).owner, caller_of(request.scope)
    if body.endpoint not in ENDPOINTS:
        message = f"endpoint must be one of {', '.join(ENDPOINTS)}, got {body.endpoint[:80]!r}"
        raise ApiError(400, message, param="endpoint")
    window_s = _window_s(body.completion_window)
    try:
        file = await find_file(request, body.input_file_id)
    except ApiError as error:
        raise missing(request, body.input_file_id, "input_file_id") if error.status == 404 else error from None
    if file.purpose != "batch":
        raise ApiError(400, f"the purpose of input_file_id must be batch, is {file.purpose}", param="input_file_id")
    batch_id = f"batch_{secrets.token_hex(16)}"
    folder = files.work(batch_id)
    new = NewBatch(
        owner,
        body.endpoint,
        file.id,
        body.completion_window,
        window_s,
        body.metadata,
        await on_disk(_prepare, files, owner, file, folder),
        caller.id if caller else "",
        None if body.output_expires_after is None else body.output_expires_after.seconds,
    )
    try:
        with told():
            batch = await service.batches.create(new, batch_id)
    except ApiError as error:
        if error.status == 429:  # otherwise Redis may have it
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        raise
    return JSONResponse(batch.form())


@router.get("", response_model=None)
async def list_batches(
    request: Request, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str | None = None
) -> Response:
    """The batches of this key, the newest first."""
    with told():
        batches = await service_of(request).batches.page(record_of(request.scope).owner, after or "", limit + 1)
    if batches is None:
        raise ApiError(400, f"after must be the id of a batch, got {(after or '')[:80]!r}", param="after")
    return JSONResponse(page([batch.form() for batch in batches], limit))


@router.get("/{batch_id}", response_model=None)
async def read_batch(request: Request, batch_id: str) -> Response:
    """A batch as it is now."""
    with told():
        batch = await service_of(request).batches.find(batch_id, record_of(request.scope).owner)
    return JSONResponse(_there(batch, batch_id).form())


@router.post("/{batch_id}/cancel", response_model=None)
async def cancel_batch(request: Request, batch_id: str) -> Response:
    """End a batch; what has been answered is kept."""
    with told():
        batch = await service_of(request).batches.cancel(batch_id, record_of(request.scope).owner)
    return JSONResponse(_there(batch, batch_id).form())


def _there(batch: Batch | None, batch_id: str) -> Batch:
    if batch is None:
        raise ApiError(404, f"there is no batch {batch_id[:80]!r}", param="batch_id", code="batch_not_found")
    return batch


def _prepare(files: FileStore, owner: str, file: StoredFile, folder: Path) -> str:
    """Give a batch its own name of its file, which may be deleted meanwhile; the directory's id."""
    files.check_room(owner)
    try:
        folder.mkdir(mode=0o700)
        share(files.path(owner, file), folder / INPUT)
    except OSError as error:
        raise FilesError(f"a batch's folder can't be made: {error}") from error
    return files.id()


def _window_s(text: str) -> float:
    match = WINDOW.fullmatch(text)
    window_s = int(match[1]) * UNITS_S[match[2]] if match else 0
    if not 1 <= window_s <= LONGEST_WINDOW_S:
        days = LONGEST_WINDOW_S // UNITS_S["d"]
        message = f"completion_window must be as 24h, and at most {days}d, got {text[:80]!r}"
        raise ApiError(400, message, param="completion_window")
    return float(window_s)


@contextmanager
def told() -> Iterator[None]:
    """Raise errors of batches and of the queue as `ApiError`."""
    try:
        with queue_told():
            yield
    except BatchesFullError as error:
        headers = {"Retry-After": str(RETRY_FULL_S)}
        raise ApiError(429, str(error), code="too_many_batches", headers=headers) from None
    except BatchEndedError as error:
        raise ApiError(409, str(error), param="batch_id", code="batch_ended") from None
