"""A JPEG file → its size, its EXIF data, and the file without metadata. Nothing is decoded.

The file ends with its first picture: what phones append (a second picture, a film) is left out.
"""

from __future__ import annotations

import re

from deepseek_triton.examples.image_report.images.bounds import MAX_PARTS, MAX_SCANS
from deepseek_triton.examples.image_report.images.container import Container, check_size
from deepseek_triton.examples.image_report.images.errors import ImageError

MAGIC = b"\xff\xd8\xff"
START_OF_SCAN, END_OF_IMAGE, COMMENT = 0xDA, 0xD9, 0xFE
# The frames that are accepted: baseline, extended and progressive, all with Huffman codes.
FRAMES = (0xC0, 0xC1, 0xC2)
OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)  # lossless, hierarchical, arithmetic
# The application segments that say how colours are stored; all others are left out.
COLOUR_SEGMENTS = {0xE0: b"JFIF\0", 0xEE: b"Adobe"}
EXIF_SEGMENT = 0xE1
EXIF_MARK = b"Exif\0\0"
# The next marker after a scan's header. Inside a scan, FF is followed by 00, by a restart's number or by another FF.
AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)


def read_jpeg(data: bytes) -> Container:
    """Read the segments of the first picture. Raises `ImageError`."""
    kept = [data[:2]]
    exif = b""
    num_frames = num_scans = 0
    position = 2
    for _ in range(MAX_PARTS):
        start, marker = _next_marker(data, position)
        if marker == END_OF_IMAGE:
            if not num_scans:
                raise ImageError("the JPEG has no picture")
            return Container(b"".join([*kept, data[start : start + 2]]), exif)
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        payload = data[start + 4 : end]
        if end < start + 4 or end > len(data):
            raise ImageError("the JPEG is cut off or damaged: a segment goes beyond its end")
        if marker in OTHER_FRAMES:
            raise ImageError("the JPEG is of a kind that is not accepted: use a baseline or progressive one")
        if marker in FRAMES:
            num_frames += 1
            if num_frames > 1 or len(payload) < 6:
                raise ImageError("the JPEG is damaged: it must have one frame")
            check_size(int.from_bytes(payload[3:5], "big"), int.from_bytes(payload[1:3], "big"))
        if marker == START_OF_SCAN:
            num_scans += 1
            if not num_frames or num_scans > MAX_SCANS:
                raise ImageError(f"the JPEG must have 1 to {MAX_SCANS} scans after its frame")
            end = _end_of_scan(data, end)
        if marker == EXIF_SEGMENT and not exif and payload.startswith(EXIF_MARK):
            exif = payload[len(EXIF_MARK) :]
        if _is_kept(marker, payload):
            kept.append(data[start:end])
        position = end
    raise ImageError(f"the JPEG has over {MAX_PARTS} segments")


def _next_marker(data: bytes, position: int) -> tuple[int, int]:
    """Where the next marker begins, and which it is; any number of FF may stand before it."""
    if data[position : position + 1] != b"\xff":
        raise ImageError("the JPEG is cut off or damaged: a marker is missing")
    while data[position + 1 : position + 2] == b"\xff":
        position += 1
    if position + 1 >= len(data):
        raise ImageError("the JPEG is cut off")
    return position, data[position + 1]


def _end_of_scan(data: bytes, position: int) -> int:
    found = AFTER_SCAN.search(data, position)
    if found is None:
        raise ImageError("the JPEG is cut off")
    return found.start()


def _is_kept(marker: int, payload: bytes) -> bool:
    if marker in COLOUR_SEGMENTS:
        return payload.startswith(COLOUR_SEGMENTS[marker])
    return marker != COMMENT and not 0xE0 <= marker <= 0xEF
