"""Upload: a body of multipart/form-data with one file, which goes to the disk as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from deepseek_triton.gateway.apis.wire.errors import ApiError
from deepseek_triton.gateway.jobs.files.store import FileWriter

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FILE = "file"
FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
MAX_FIELD = 1024  # bytes
MAX_HEADER = 8192  # bytes of one of a part's headers
MAX_NAME = 255  # characters of a file's name
BLOCK = 1 << 20  # bytes that are written at once


@dataclass
class Upload:
    """What has come of a form. fields: those beside the file; filename: the client's; None: there is no file yet."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None

    async def read(self, content_type: str, body: AsyncIterator[bytes], writer: FileWriter) -> None:
        """Read it all. Raises `ApiError`, and what `writer` raises."""
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not boundary:
            raise ApiError(400, "a file must come as multipart/form-data", param="Content-Type")
        reader = _Reader(self)
        try:
            parser = MultipartParser(boundary, reader.callbacks())
            async for data in body:
                parser.write(data)
                if len(reader.data) >= BLOCK:
                    await asyncio.to_thread(writer.write, reader.take())
            parser.finalize()
        except FormParserError as error:
            raise ApiError(400, f"the body must be multipart/form-data: {error}") from None
        if not reader.is_ended:
            raise ApiError(400, "the body must be multipart/form-data: it has no end")
        await asyncio.to_thread(writer.write, reader.take())
        if self.filename is None:
            raise ApiError(400, "file is required", param=FILE)


class _Reader:
    """Takes what the parser finds. data: of the file, not written yet."""

    def __init__(self, upload: Upload) -> None:
        self._upload = upload
        self.data = bytearray()
        self.is_ended = False
        self._header, self._value = bytearray(), bytearray()
        self._disposition = b""
        self._name = ""
        self._part = bytearray()

    def callbacks(self) -> MultipartCallbacks:
        """What the parser calls."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._add_header,
            "on_header_value": self._add_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._add,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def take(self) -> bytes:
        """The file's bytes that have come."""
        data, self.data = self.data, bytearray()
        return bytes(data)

    def _begin(self) -> None:
        self._disposition, self._name, self._part = b"", "", bytearray()

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]
        self._check_header()

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._check_header()

    def _check_header(self) -> None:
        if len(self._header) + len(self._value) > MAX_HEADER:
            raise ApiError(400, f"a header of a part may have {MAX_HEADER} bytes at most")

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = name = _text(options.get(b"name", b""), "a field's name")
        if name == FILE:
            if self._upload.filename is not None:
                raise ApiError(400, "file must come once", param=FILE)
            filename = _text(options.get(b"filename", b""), "the file's name")
            if not 1 <= len(filename) <= MAX_NAME:
                raise ApiError(400, f"file must have a name of 1 to {MAX_NAME} characters", param=FILE)
            self._upload.filename = filename
        elif name not in FIELDS:
            raise ApiError(400, f"unknown field {name[:80]!r}", param=name[:80])
        elif name in self._upload.fields:
            raise ApiError(400, f"{name} must come once", param=name)

    def _add(self, data: bytes, start: int, end: int) -> None:
        if self._name == FILE:
            self.data += data[start:end]
        else:
            self._part += data[start:end]
            if len(self._part) > MAX_FIELD:
                raise ApiError(400, f"{self._name} may have {MAX_FIELD} bytes at most", param=self._name)

    def _end_part(self) -> None:
        if self._name != FILE:
            self._upload.fields[self._name] = _text(bytes(self._part), self._name)

    def _end(self) -> None:
        self.is_ended = True


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ApiError(400, f"{what} must be UTF-8") from None
