"""The orientation in EXIF data, and nothing else of it.

Only the first directory's entry of two bytes is read: no value elsewhere, no other directory, no thumbnail. So EXIF
data costs no more time than it has entries, however it is made. Damaged data has no orientation, as in browsers.
"""

from __future__ import annotations

from typing import Literal

from PIL import Image

ORIENTATION = 0x0112
SHORT = 3
MAX_ENTRIES = 1024
BYTE_ORDERS: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}
# How a picture with this orientation is turned upright; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation_of(exif: bytes) -> int:
    """The orientation, 1 to 8, in a TIFF structure; 1 if there is none."""
    order = BYTE_ORDERS.get(exif[:4])
    if order is None:
        return 1
    start = int.from_bytes(exif[4:8], order)
    number = min(int.from_bytes(exif[start : start + 2], order), MAX_ENTRIES)
    for entry in range(start + 2, start + 2 + 12 * number, 12):
        tag, kind = (int.from_bytes(exif[at : at + 2], order) for at in (entry, entry + 2))
        if tag == ORIENTATION and kind == SHORT:
            value = int.from_bytes(exif[entry + 8 : entry + 10], order)
            return value if value in TURNS else 1
    return 1
