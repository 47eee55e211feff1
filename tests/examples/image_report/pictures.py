"""Image files that the tests send."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

from deepseek_triton.examples.image_report.tiles import make_tile


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tile_png(seed: int = 0) -> bytes:
    return encoded(make_tile(seed).image)


def corner(width: int = 64, height: int = 64, mode: str = "RGB") -> Image.Image:
    """White, with a red corner at the upper left."""
    image = Image.new("RGB", (width, height), "white")
    image.paste((255, 0, 0), (0, 0, width // 2, height // 2))
    return image.convert(mode)


def exif(orientation: int, *, order: str = "<", extra_entries: int = 0) -> bytes:
    """A TIFF structure whose first directory has `extra_entries` that point far away, then the orientation."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    body = struct.pack(f"{order}IH", 8, extra_entries + 1)
    for tag in range(extra_entries):
        body += struct.pack(f"{order}HHII", 0x2000 + tag, 7, 60_000, 0)
    return mark + body + struct.pack(f"{order}HHIHHI", 0x0112, 3, 1, orientation, 0, 0)


def jpeg_with_exif(image: Image.Image, data: bytes) -> bytes:
    plain = encoded(image, "JPEG", quality=95, subsampling=0)
    payload = b"Exif\0\0" + data
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + plain[2:]


def chunk(name: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2, idat: bytes = b"") -> bytes:
    """A PNG of the given header, whatever its data are."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), *chunks, chunk(b"IDAT", idat), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def with_chunk(data: bytes, name: bytes, payload: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    return data[:33] + chunk(name, payload) + data[33:]
