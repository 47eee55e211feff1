"""Synthetic tiles that look somewhat like stained tissue, and the findings that are true of each.

No picture of a patient is used. Sizes are in pixels of a tile of TILE_SIZE; what is drawn decides what is true. Some
truths have a soft border (how many nuclei are many?), so that a good model is sometimes uncertain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from deepseek_triton.examples.image_report.contract import TILE_SIZE
from deepseek_triton.examples.image_report.findings import FINDINGS

SCALE = 2  # a tile is drawn larger and reduced, which smooths its edges
MANY_NUCLEI = 60  # from here on a tile is hypercellular
VARIED_SIZES = 0.27  # standard deviation of log(radius) from which nuclei are pleomorphic

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Tile:
    """An image [TILE_SIZE, TILE_SIZE, RGB] and its truths, in the order of FINDINGS."""

    image: Image.Image
    truths: tuple[bool, ...]


def make_tile(seed: int) -> Tile:
    """The tile of this seed: the same seed gives the same tile."""
    random = np.random.default_rng(seed)
    size = TILE_SIZE * SCALE
    stain = random.normal(1.0, 0.1) * random.normal(1.0, 0.03, 3)
    image = Image.new("RGB", (size, size), _stained((236, 190, 212), stain))
    draw = ImageDraw.Draw(image)
    _draw_fibres(draw, random, size, stain)
    num_nuclei = int(random.integers(18, 103))
    variation = float(random.uniform(0.06, 0.48))
    has = {name: bool(random.random() < 0.4) for name in ("mitotic_figures", "necrosis", "inflammation")}
    dead_area = _draw_necrosis(draw, random, size, stain) if has["necrosis"] else None
    places = _places(random, num_nuclei, size, dead_area)
    for place in places:
        radius = 4.6 * SCALE * math.exp(random.normal(0.0, variation) - 0.3 * variation)
        _draw_nucleus(draw, random, place, min(radius, 11.0 * SCALE), stain)
    if has["inflammation"]:
        _draw_lymphocytes(draw, random, size, stain)
    if has["mitotic_figures"]:
        for place in _places(random, int(random.integers(1, 4)), size - 24 * SCALE, None):
            _draw_mitosis(draw, random, (place[0] + 12 * SCALE, place[1] + 12 * SCALE), stain)
    image = image.filter(ImageFilter.GaussianBlur(float(random.uniform(0.6, 2.2))))
    image = image.resize((TILE_SIZE, TILE_SIZE), Image.Resampling.BOX)
    noisy = np.asarray(image, np.float32) + random.normal(0.0, random.uniform(1.0, 7.0), (TILE_SIZE, TILE_SIZE, 3))
    has["hypercellularity"] = len(places) >= MANY_NUCLEI
    has["pleomorphism"] = variation >= VARIED_SIZES
    pixels: NDArray[np.uint8] = noisy.clip(0, 255).astype(np.uint8)
    return Tile(Image.fromarray(pixels), tuple(has[finding] for finding in FINDINGS))


def _stained(colour: Colour, stain: NDArray[np.float64]) -> Colour:
    """`colour`, as much darker or lighter as this tile's stain is."""
    red, green, blue = (int(min(255.0, max(0.0, 255 - (255 - c) * s))) for c, s in zip(colour, stain, strict=True))
    return red, green, blue


def _places(
    random: np.random.Generator, number: int, size: int, apart: tuple[float, float, float] | None
) -> list[tuple[float, float]]:
    """`number` places of nuclei, which seldom overlap and aren't inside the circle `apart` (x, y, radius)."""
    places: list[tuple[float, float]] = []
    while len(places) < number:
        for _ in range(8):  # the last of these tries is taken even if it lies close to another
            x, y = (float(value) for value in random.uniform(0, size, 2))
            if apart and math.dist((x, y), apart[:2]) < apart[2]:
                continue
            if all(abs(x - a) + abs(y - b) > 9 * SCALE for a, b in places):
                break
        if not apart or math.dist((x, y), apart[:2]) >= apart[2]:
            places.append((x, y))
    return places


def _outline(
    random: np.random.Generator, place: tuple[float, float], radii: tuple[float, float], roughness: float, turn: float
) -> list[tuple[float, float]]:
    """The corners of a rough ellipse."""
    corners = []
    for angle in np.linspace(0, 2 * math.pi, 14, endpoint=False):
        factor = 1 + random.normal(0, roughness)
        x, y = radii[0] * factor * math.cos(angle), radii[1] * factor * math.sin(angle)
        corners.append(
            (place[0] + x * math.cos(turn) - y * math.sin(turn), place[1] + x * math.sin(turn) + y * math.cos(turn))
        )
    return corners


def _draw_fibres(draw: ImageDraw.ImageDraw, random: np.random.Generator, size: int, stain: NDArray[np.float64]) -> None:
    slope = random.uniform(-0.6, 0.6)
    for start in random.uniform(-0.5 * size, 1.5 * size, 22):
        shade = int(random.integers(-14, 10))
        colour = _stained((228 + shade, 172 + shade, 200 + shade), stain)
        draw.line((0, start, size, start + slope * size), fill=colour, width=int(random.integers(3, 12)))


def _draw_nucleus(
    draw: ImageDraw.ImageDraw,
    random: np.random.Generator,
    place: tuple[float, float],
    radius: float,
    stain: NDArray[np.float64],
) -> None:
    shade = int(random.integers(-18, 19))
    radii = (radius * random.uniform(0.95, 1.3), radius * random.uniform(0.75, 1.0))
    corners = _outline(random, place, radii, 0.05, random.uniform(0, math.pi))
    draw.polygon(
        corners,
        fill=_stained((132 + shade, 92 + shade, 160 + shade), stain),
        outline=_stained((96, 62, 130), stain),
    )


def _draw_lymphocytes(
    draw: ImageDraw.ImageDraw, random: np.random.Generator, size: int, stain: NDArray[np.float64]
) -> None:
    """A cluster of small, round, dark nuclei."""
    middle = random.uniform(0.2 * size, 0.8 * size, 2)
    for x, y in random.normal(middle, 11 * SCALE, (int(random.integers(9, 24)), 2)):
        radius = random.uniform(2.1, 2.9) * SCALE
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_stained((70, 48, 112), stain))


def _draw_necrosis(
    draw: ImageDraw.ImageDraw, random: np.random.Generator, size: int, stain: NDArray[np.float64]
) -> tuple[float, float, float]:
    """A pale area of debris without nuclei; returns its circle (x, y, radius)."""
    x, y = (float(value) for value in random.uniform(0.15 * size, 0.85 * size, 2))
    radius = float(random.uniform(16, 34)) * SCALE
    draw.polygon(_outline(random, (x, y), (radius, radius), 0.1, 0.0), fill=_stained((244, 208, 206), stain))
    for _ in range(int(radius * 1.2)):
        angle, distance = random.uniform(0, 2 * math.pi), radius * math.sqrt(random.uniform(0, 0.8))
        a, b, dot = x + distance * math.cos(angle), y + distance * math.sin(angle), random.uniform(0.6, 1.8)
        draw.ellipse((a - dot, b - dot, a + dot, b + dot), fill=_stained((176, 120, 150), stain))
    return x, y, radius


def _draw_mitosis(
    draw: ImageDraw.ImageDraw, random: np.random.Generator, place: tuple[float, float], stain: NDArray[np.float64]
) -> None:
    """A clear cell with one or two dark, ragged plates of chromosomes."""
    x, y = place
    turn = random.uniform(0, math.pi)
    draw.polygon(_outline(random, place, (8.5 * SCALE, 7.5 * SCALE), 0.03, turn), fill=_stained((240, 206, 224), stain))
    gap = 0.0 if random.random() < 0.4 else random.uniform(2.4, 3.6) * SCALE
    for side in (-1.0, 1.0) if gap else (0.0,):
        middle = (x - side * gap * math.sin(turn), y + side * gap * math.cos(turn))
        corners = _outline(random, middle, (5.2 * SCALE, 1.5 * SCALE), 0.16, turn)
        draw.polygon(corners, fill=_stained((44, 26, 80), stain))
