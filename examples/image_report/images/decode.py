"""The bytes of an image file → pixels for the ResNet.

JPEG and PNG are accepted. The file's own words about its size are checked first (`bounds.py`), its metadata is removed
before a decoder sees it, and a picture that doesn't decode whole is refused. No address is ever fetched.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin
from PIL.ImageFile import ImageFile

from deepseek_triton.examples.image_report.contract import TILE_SIZE
from deepseek_triton.examples.image_report.images import jpeg, png
from deepseek_triton.examples.image_report.images.bounds import MAX_BYTES
from deepseek_triton.examples.image_report.images.container import Container
from deepseek_triton.examples.image_report.images.errors import ImageError
from deepseek_triton.examples.image_report.images.orientation import TURNS, orientation_of


class Format(NamedTuple):
    """One accepted format: its name, its first bytes, who reads its parts and who decodes it."""

    name: str
    magic: bytes
    read: Callable[[bytes], Container]
    decoder: Callable[[io.BytesIO], ImageFile]


FORMATS = (
    Format("JPEG", jpeg.MAGIC, jpeg.read_jpeg, JpegImagePlugin.JpegImageFile),
    Format("PNG", png.MAGIC, png.read_png, PngImagePlugin.PngImageFile),
)
HALF_A_BYTE = 257  # 65535 / 255: from 16 bits to 8


def pixels_of(data: bytes) -> NDArray[np.float32]:
    """RGB pixels [3, TILE_SIZE, TILE_SIZE] in 0 to 1.

    The picture is turned upright; its largest square in the middle is taken, and transparency shows white.

    Raises:
        ImageError: the bytes are no JPEG or PNG, too many, damaged, or a picture that is too large or too small.
    """
    picture = square(upright(data)).resize((TILE_SIZE, TILE_SIZE), Image.Resampling.BOX, reducing_gap=2.0)
    pixels: NDArray[np.float32] = np.asarray(picture, np.float32).transpose(2, 0, 1) / 255
    return np.ascontiguousarray(pixels)


def upright(data: bytes) -> Image.Image:
    """The whole picture in RGB, upright; a large JPEG is reduced while it is decoded. Raises `ImageError`."""
    if not data:
        raise ImageError("the image is empty")
    if len(data) > MAX_BYTES:
        raise ImageError(f"the image has {len(data):,} bytes, must have at most {MAX_BYTES:,}")
    form = next((form for form in FORMATS if data.startswith(form.magic)), None)
    if form is None:
        raise ImageError("the image is neither a JPEG nor a PNG")
    container = form.read(data)
    picture = _rgb(_decode(form, container.pixels))
    turn = TURNS.get(orientation_of(container.exif))
    return picture if turn is None else picture.transpose(turn)


def square(picture: Image.Image) -> Image.Image:
    """The largest square in the middle."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def _decode(form: Format, data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what a decoder warns of is damage too
            picture = form.decoder(io.BytesIO(data))
            picture.draft("RGB", (2 * TILE_SIZE, 2 * TILE_SIZE))
            picture.load()
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever damage leads to
        raise ImageError(f"the {form.name} can't be decoded: it is cut off or damaged") from error
    return picture


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits of grey
        grey = np.asarray(picture).astype(np.uint32) // HALF_A_BYTE
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        layered = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    return picture.convert("RGB")
