"""Server-sent events: pieces of bytes in, the data of each event out. It knows neither HTTP nor JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def iter_events(pieces: Iterable[bytes]) -> Iterator[str]:
    r"""Give the data of each complete event of a UTF-8 stream, however it was cut into `pieces`.

    Lines end at "\n" or "\r\n" and nowhere else: `str.splitlines`, and so httpx's `iter_lines`, also cut at
    U+2028, U+0085 and others, which JSON leaves unescaped inside a string. An event without its blank line at
    the end of the stream is dropped, as the standard has it. Raises `UnicodeDecodeError`.
    """
    data: list[bytes] = []
    for line in _iter_lines(pieces):
        if not line:
            if data:
                yield b"\n".join(data).decode()
            data = []
        elif line.startswith(b"data:"):
            data.append(line.removeprefix(b"data:").removeprefix(b" "))


def _iter_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r")
