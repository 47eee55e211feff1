"""Server-sent events: pieces of bytes in, the data of each event out. It knows neither HTTP nor JSON."""

from __future__ import annotations

from collections.abc import Iterator


class EventReader:
    r"""Reads a UTF-8 stream of events, however it is cut into pieces.

    Lines end at "\n" or "\r\n" and nowhere else: `str.splitlines`, and so httpx's `iter_lines`, also cut at
    U+2028, U+0085 and others, which JSON leaves unescaped inside a string. An event without its blank line at
    the end of the stream is dropped, as the standard has it.
    """

    def __init__(self) -> None:
        self._rest = b""  # a line without its end
        self._data: list[bytes] = []  # of an event without its end

    def push(self, piece: bytes) -> Iterator[str]:
        """Give the data of each event that `piece` completes. Raises `UnicodeDecodeError`."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line.removeprefix(b"data:").removeprefix(b" "))
            elif not line:
                data, self._data = self._data, []
                if data:
                    yield b"\n".join(data).decode()
