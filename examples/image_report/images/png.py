"""A PNG file → its size, its EXIF data, and the file without metadata. Nothing is decompressed."""

from __future__ import annotations

from deepseek_triton.examples.image_report.images.bounds import MAX_PARTS
from deepseek_triton.examples.image_report.images.container import Container, check_size
from deepseek_triton.examples.image_report.images.errors import ImageError

MAGIC = b"\x89PNG\r\n\x1a\n"
KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
ANIMATION = b"acTL"


def read_png(data: bytes) -> Container:
    """Read all chunks. Raises `ImageError`."""
    kept = [MAGIC]
    exif = b""
    names: list[bytes] = []
    position = len(MAGIC)
    for _ in range(MAX_PARTS):
        length = int.from_bytes(data[position : position + 4], "big")
        name = data[position + 4 : position + 8]
        end = position + 12 + length  # length, name, data, checksum
        if len(name) < 4 or end > len(data):
            raise ImageError("the PNG is cut off or damaged: a chunk goes beyond its end")
        payload = data[position + 8 : end - 4]
        if (name == b"IHDR") != (not names):
            raise ImageError("the PNG is damaged: it must begin with one header")
        if name == b"IHDR":
            if length != 13:
                raise ImageError("the PNG is damaged: its header can't be read")
            check_size(int.from_bytes(payload[:4], "big"), int.from_bytes(payload[4:8], "big"))
        if name == ANIMATION:
            raise ImageError("the PNG is animated: give one picture")
        if name == b"eXIf" and not exif:
            exif = payload
        if name in KEPT:
            kept.append(data[position:end])
        elif not name[0] & 0x20:  # a capital: a decoder that doesn't know the chunk can't show the picture
            raise ImageError(f"the PNG has a critical chunk that is not known: {name!r}")
        names.append(name)
        position = end
        if name == b"IEND":
            if b"IDAT" not in names:
                raise ImageError("the PNG has no picture")
            return Container(b"".join(kept), exif)
    raise ImageError(f"the PNG has over {MAX_PARTS} chunks")
