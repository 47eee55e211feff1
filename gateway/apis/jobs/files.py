"""The routes below `/v1/files`: OpenAI's files, for batches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, ParamSpec, TypeVar

from fastapi import APIRouter, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse

from deepseek_triton.gateway.apis.jobs.queue import log, service_of
from deepseek_triton.gateway.apis.jobs.upload import Upload
from deepseek_triton.gateway.apis.wire.connection import left
from deepseek_triton.gateway.apis.wire.errors import ApiError
from deepseek_triton.gateway.jobs.files.store import FileStore
from deepseek_triton.gateway.jobs.files.stored_file import FilesError, FilesFullError, StoredFile
from deepseek_triton.gateway.record import record_of

P = ParamSpec("P")
T = TypeVar("T")
router = APIRouter(prefix="/v1/files")

PURPOSE = "batch"
EXPIRES_S = range(3600, 30 * 86400 + 1)  # that a client may ask for
BLOCK = 256 << 10  # bytes of content that are read at once
FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "enum": [PURPOSE]}},
}
OPENAPI = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM}}}}


@router.post("", response_model=None, openapi_extra=OPENAPI)
async def upload_file(request: Request) -> Response:
    """Keep a file for a batch. It is written as it comes."""
    files, owner, upload = files_of(request), record_of(request.scope).owner, Upload()
    writer = await on_disk(files.create, owner)
    try:
        with told():
            await upload.read(request.headers.get("content-type", ""), request.stream(), writer)
        purpose = upload.fields.get("purpose")
        if purpose != PURPOSE:
            message = "purpose is required" if purpose is None else f"purpose must be {PURPOSE}, got {purpose[:80]!r}"
            raise ApiError(400, message, param="purpose")
        expires_s = _expires_s(upload.fields)
        file = await on_disk(writer.commit, upload.filename or "", purpose, expires_s)
    except ClientDisconnect:
        record_of(request.scope).has_left = True
        return left()
    finally:
        await asyncio.to_thread(writer.abandon)
    return JSONResponse(file.form())


@router.get("", response_model=None)
async def list_files(
    request: Request,
    purpose: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> Response:
    """The files of this key, the newest first."""
    files, owner = files_of(request), record_of(request.scope).owner

    def read() -> list[StoredFile]:
        """One more than is asked for, if there are."""
        ids = sorted(files.ids(owner), reverse=order == "desc")
        if after is not None:
            if after not in ids:
                raise ApiError(400, f"after must be the id of a file, got {after[:80]!r}", param="after")
            ids = ids[ids.index(after) + 1 :]
        found: list[StoredFile] = []
        for file_id in ids:
            file = files.find(owner, file_id)
            if file is not None and purpose in (None, file.purpose):
                found.append(file)
                if len(found) > limit:
                    break
        return found

    return JSONResponse(page([file.form() for file in await on_disk(read)], limit))


@router.get("/{file_id}", response_model=None)
async def read_file(request: Request, file_id: str) -> Response:
    """What is known of a file."""
    return JSONResponse((await find_file(request, file_id)).form())


@router.get("/{file_id}/content", response_model=None)
async def read_content(request: Request, file_id: str) -> Response:
    """A file's bytes."""
    file = await find_file(request, file_id)
    path = files_of(request).path(record_of(request.scope).owner, file)
    stream = await on_disk(_opened, path)
    if stream is None:
        raise missing(request, file_id)
    headers = {"Content-Length": str(file.num_bytes), "X-Content-Type-Options": "nosniff"}
    return StreamingResponse(_blocks(stream), media_type="application/octet-stream", headers=headers)


@router.delete("/{file_id}", response_model=None)
async def delete_file(request: Request, file_id: str) -> Response:
    """Remove a file. A batch that reads it goes on."""
    if not await on_disk(files_of(request).delete, record_of(request.scope).owner, file_id):
        raise missing(request, file_id)
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})


def files_of(request: Request) -> FileStore:
    """The app's files. Raises `ApiError`: the queue is off."""
    return service_of(request).files


async def find_file(request: Request, file_id: str) -> StoredFile:
    """The file. Raises `ApiError`."""
    file = await on_disk(files_of(request).find, record_of(request.scope).owner, file_id)
    if file is None:
        raise missing(request, file_id)
    return file


def missing(request: Request, file_id: str, param: str = "file_id") -> ApiError:
    """The error of a file that isn't there."""
    count = service_of(request).num_stores
    hint = f"; the gateways of this Redis keep files in {count} directories: give all one --files-dir"
    message = f"there is no file {file_id[:80]!r}{hint if count > 1 else ''}"
    return ApiError(404, message, param=param, code="file_not_found")


def page(rows: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A page of a list; `rows` may have one that belongs to the next."""
    shown = rows[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(rows) > limit,
    }


async def on_disk(work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """What `work` gives, on a thread. Raises `ApiError`."""
    with told():
        return await asyncio.to_thread(work, *args, **options)


@contextmanager
def told() -> Iterator[None]:
    """Raise the files' errors as `ApiError`."""
    try:
        yield
    except FilesFullError as error:
        raise ApiError(413 if error.is_own_size else 429, str(error), param="file", code="files_full") from None
    except FilesError as error:
        log.error("%s", error)
        raise ApiError(503, "files can't be kept now", code="files_unavailable", headers={"Retry-After": "5"}) from None


def _expires_s(fields: dict[str, str]) -> float | None:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise ApiError(400, "expires_after.anchor must be created_at", param="expires_after")
    if seconds is None or not seconds.isdecimal() or len(seconds) > 9 or int(seconds) not in EXPIRES_S:
        message = f"expires_after.seconds must be {EXPIRES_S[0]} to {EXPIRES_S[-1]}"
        raise ApiError(400, message, param="expires_after")
    return float(seconds)


def _opened(path: Path) -> BinaryIO | None:
    try:
        return path.open("rb")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FilesError(str(error)) from error


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    with stream:
        while block := stream.read(BLOCK):
            yield block
