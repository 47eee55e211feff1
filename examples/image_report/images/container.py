"""What is read of an image file before it is decoded, and the checks that both formats share."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_triton.examples.image_report.images.bounds import MAX_PIXELS, MAX_SIDE, MIN_SIDE
from deepseek_triton.examples.image_report.images.errors import ImageError


@dataclass(frozen=True)
class Container:
    """An image file without its metadata.

    pixels: the file with only what a decoder needs: no EXIF, colour profile, text, thumbnail or animation.
    exif: the TIFF structure of its EXIF data; empty without.
    """

    pixels: bytes
    exif: bytes


def check_size(width: int, height: int) -> None:
    """Raise `ImageError` for a size that isn't accepted."""
    if not (MIN_SIDE <= width <= MAX_SIDE and MIN_SIDE <= height <= MAX_SIDE):
        raise ImageError(f"the image has {width} x {height} pixels, each side must have {MIN_SIDE} to {MAX_SIDE}")
    if width * height > MAX_PIXELS:
        raise ImageError(f"the image has {width} x {height} pixels, must have at most {MAX_PIXELS:,} in all")
