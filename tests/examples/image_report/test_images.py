from __future__ import annotations

import time
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from deepseek_triton.examples.image_report.contract import TILE_SIZE
from deepseek_triton.examples.image_report.images import bounds
from deepseek_triton.examples.image_report.images.decode import pixels_of, upright
from deepseek_triton.examples.image_report.images.errors import ImageError
from deepseek_triton.examples.image_report.images.orientation import orientation_of
from tests.examples.image_report.pictures import (
    chunk,
    corner,
    encoded,
    exif,
    jpeg_with_exif,
    png,
    tile_png,
    with_chunk,
)

RED, WHITE = np.array([1.0, 0.0, 0.0]), np.array([1.0, 1.0, 1.0])


def colours(data: bytes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The mean of the upper left and of the lower right quarter's middle."""
    pixels = pixels_of(data)
    assert pixels.shape == (3, TILE_SIZE, TILE_SIZE)
    assert pixels.dtype == np.float32 and pixels.flags.c_contiguous
    near, far = slice(16, 48), slice(80, 112)
    return pixels[:, near, near].mean(axis=(1, 2)), pixels[:, far, far].mean(axis=(1, 2))


ACCEPTED = {
    "png": encoded(corner()),
    "large png": encoded(corner(3000, 2000)),
    "oblong png": encoded(corner(64, 65)),
    "interlaced-like jpeg": encoded(corner(), "JPEG", progressive=True),
    "large jpeg": encoded(corner(4000, 4000), "JPEG"),
    "cmyk jpeg": encoded(corner(mode="CMYK"), "JPEG", quality=95),
    "palette": encoded(corner().quantize(4)),
    "palette with transparency": encoded(corner().quantize(4), transparency=3),
    "alpha": encoded(corner(mode="RGBA")),
    "with a comment and a profile": encoded(corner(), "JPEG", comment=b"hello", icc_profile=b"x" * 70_000),
    "with a second picture behind": encoded(corner(), "JPEG") + encoded(Image.new("RGB", (90, 90)), "JPEG"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_kinds_that_are_accepted(name: str) -> None:
    near, far = colours(ACCEPTED[name])
    assert near == pytest.approx(RED, abs=0.08)
    assert far == pytest.approx(WHITE, abs=0.04)


def test_16_bits_of_grey_are_scaled_and_not_cut() -> None:
    grey = np.full((64, 64), 0x8000, np.uint16)
    near, _ = colours(encoded(Image.fromarray(grey)))
    assert near == pytest.approx([0.5] * 3, abs=0.01)


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey(mode: str) -> None:
    near, far = colours(encoded(Image.new("RGB", (64, 64), "white").convert(mode)))
    assert near == pytest.approx(WHITE) and far == pytest.approx(WHITE)


def test_what_is_transparent_shows_white() -> None:
    near, _ = colours(encoded(Image.new("RGBA", (64, 64), (0, 0, 0, 0))))
    assert near == pytest.approx(WHITE)


# Where the red corner of the file is, once the picture is upright: (right?, lower?).
UPRIGHT = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_exif_orientation(kind: str, orientation: int, order: str) -> None:
    data = exif(orientation, order=order)
    image = corner(64, 32)
    file = jpeg_with_exif(image, data) if kind == "jpeg" else with_chunk(encoded(image), b"eXIf", data)
    picture = upright(file)
    assert picture.size == ((32, 64) if orientation >= 5 else (64, 32))
    right, lower = UPRIGHT[orientation]
    place = (picture.width * (1 + 2 * right) // 4, picture.height * (1 + 2 * lower) // 4)
    opposite = (picture.width - place[0], picture.height - place[1])
    assert picture.getpixel(place)[1] < 40, "red"  # type: ignore[index]
    assert picture.getpixel(opposite)[1] > 200, "white"  # type: ignore[index]


@pytest.mark.parametrize(
    "data",
    [
        b"", b"II*\0", b"XX*\0" + bytes(40), exif(0), exif(9), exif(65_535), exif(6)[:12], b"II*\0\xff\xff\xff\xff",
        exif(6, extra_entries=1100),
    ],
)  # fmt: skip
def test_damaged_exif_has_no_orientation(data: bytes) -> None:
    assert orientation_of(data) == 1


def test_huge_exif_costs_no_time() -> None:
    """Each of the entries claims 60,000 bytes; whoever follows them all reads gigabytes."""
    data = exif(6, extra_entries=1000) + bytes(4 * 2**20)
    start = time.process_time()
    assert upright(with_chunk(encoded(corner(64, 32)), b"eXIf", data)).size == (32, 64)
    assert upright(jpeg_with_exif(corner(64, 32), data[:60_000])).size == (32, 64)
    assert time.process_time() - start < 1.0


GOOD_JPEG = encoded(corner(), "JPEG")
ZEROS = zlib.compress(bytes(10_000_000))
REFUSED = {
    "empty": (b"", "is empty"),
    "text": (b"hello", "neither a JPEG nor a PNG"),
    "an address": (b"https://example.org/a.png", "neither a JPEG nor a PNG"),
    "gif": (encoded(corner(), "GIF"), "neither a JPEG nor a PNG"),
    "webp-like": (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "neither a JPEG nor a PNG"),
    "tiff": (encoded(corner(), "TIFF"), "neither a JPEG nor a PNG"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "neither a JPEG nor a PNG"),
    "too many bytes": (encoded(corner()) + bytes(bounds.MAX_BYTES), "bytes, must have at most"),
    "png bomb by pixels": (png(16_000, 16_000, idat=ZEROS), "must have at most 24,000,000"),
    "png bomb by a side": (png(2**31 - 1, 1, idat=ZEROS), "each side"),
    "png without pixels": (png(0, 0), "each side"),
    "too small": (png(4, 4), "each side"),
    "jpeg bomb": (GOOD_JPEG.replace(b"\x08\x00\x40\x00\x40\x03", b"\x08\xff\xff\xff\xff\x03"), "each side"),
    "animated png": (
        encoded(corner(), save_all=True, append_images=[Image.new("RGB", (64, 64), "blue")]),
        "animated",
    ),
    "png without data": (png(64, 64)[:33] + chunk(b"IEND", b""), "no picture"),
    "png with an unknown critical chunk": (with_chunk(encoded(corner()), b"ABCD", b""), "critical chunk"),
    "png with two headers": (with_chunk(encoded(corner()), b"IHDR", bytes(13)), "one header"),
    "png with a wrong checksum": (encoded(corner())[:29] + b"\0\0\0\0" + encoded(corner())[33:], "can't be decoded"),
    "png of too many chunks": (
        png(64, 64, *[chunk(b"tEXt", b"a\0b")] * bounds.MAX_PARTS),
        "chunks",
    ),
    "png whose data are no zlib": (png(64, 64, idat=b"nonsense"), "can't be decoded"),
    "png whose data are too few": (png(64, 64, idat=zlib.compress(b"\0" * 100)), "can't be decoded"),
    "jpeg without anything": (b"\xff\xd8\xff", "cut off"),
    "jpeg without a picture": (b"\xff\xd8\xff\xd9", "no picture"),
    "jpeg with a segment beyond its end": (b"\xff\xd8\xff\xe0\xff\xff", "cut off"),
    "jpeg of a lossless kind": (GOOD_JPEG.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc3\x00\x11\x08"), "of a kind"),
    "jpeg of many scans": (
        GOOD_JPEG[:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00\x00" * 40 + GOOD_JPEG[-2:],
        "scans",
    ),
    "jpeg of many segments": (GOOD_JPEG[:2] + b"\xff\xfe\x00\x02" * 5000 + GOOD_JPEG[2:], "segments"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why_at_once(name: str) -> None:
    data, message = REFUSED[name]
    start = time.process_time()
    with pytest.raises(ImageError, match=message) as caught:
        pixels_of(data)
    assert "\n" not in str(caught.value)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize("file", [tile_png(), GOOD_JPEG, encoded(corner(), "JPEG", progressive=True)])
def test_truncated_files_are_refused(file: bytes) -> None:
    for length in {*range(1, 60, 7), *range(60, len(file) - 12, max(1, len(file) // 60)), len(file) - 13}:
        with pytest.raises(ImageError):
            pixels_of(file[:length])


def test_damaged_files_give_pixels_or_an_error_and_nothing_else() -> None:
    random = np.random.default_rng(0)
    for file in (encoded(corner()), GOOD_JPEG, encoded(corner(), "JPEG", progressive=True)):
        for _ in range(150):
            damaged = bytearray(file)
            for place in random.integers(2, len(file), 3):
                damaged[place] = int(random.integers(256))
            try:
                assert np.isfinite(pixels_of(bytes(damaged))).all()
            except ImageError:
                continue


def test_a_png_bomb_within_the_bounds_stops_at_its_size() -> None:
    data = png(64, 64, idat=zlib.compress(bytes(30_000_000), 1))
    start = time.process_time()
    pixels_of(data)
    assert time.process_time() - start < 1.0


def test_metadata_never_reaches_the_decoder() -> None:
    """A text chunk that decompresses to 20 MB, which Pillow would read."""
    text = b"comment\0\0" + zlib.compress(bytes(20_000_000), 1)
    near, _ = colours(with_chunk(encoded(corner()), b"zTXt", text))
    assert near == pytest.approx(RED)
