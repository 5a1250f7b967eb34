"""Coverage: how much of each pixel a letter, shape, group of dots or pattern covers.

Every function returns float32 of shape (32, 32) with values in [0, 1]. Positions and lengths are fractions of the
image side, angles are degrees.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from talos_fast.errors import needs

SIDE = 32
_FINE = 3 * SIDE  # drawn three times finer, then averaged: smooth edges

Coverage = npt.NDArray[np.float32]


def glyph(text: str, font: str, *, centre: tuple[float, float], height: float, tilt: float) -> Coverage:
    """`text` in one of the fonts that matplotlib ships, such as "DejaVuSans.ttf"."""
    canvas, draw = _canvas()
    points = max(6, round(1.35 * height * _FINE))
    draw.text((_FINE / 2, _FINE / 2), text, fill=255, font=_font(font, points), anchor="mm")
    # the anchor centres the line, not the ink: "mm" of an italic or a small letter is off by a few pixels
    left, top, right, bottom = canvas.getbbox() or (0, 0, _FINE, _FINE)
    shift = (centre[0] * _FINE - (left + right) / 2, centre[1] * _FINE - (top + bottom) / 2)
    moved = canvas.rotate(
        tilt,
        Image.Resampling.BILINEAR,
        center=((left + right) / 2, (top + bottom) / 2),
        translate=shift,  # type: ignore[arg-type]  # Pillow takes fractions, its annotation does not
    )
    return _reduce(moved)


def shape(name: str, *, centre: tuple[float, float], radius: float, tilt: float, outline: bool = False) -> Coverage:
    """One of `concepts.SHAPES`, filled or as an outline."""
    canvas, draw = _canvas()
    x, y, r = centre[0] * _FINE, centre[1] * _FINE, radius * _FINE
    stroke = max(3, round(0.2 * r))
    if name in ("circle", "ring"):
        fill = None if name == "ring" or outline else 255
        # an outlined circle has a thin line, a ring a thick one: that is all that tells the two apart
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline=255, width=2 * stroke if name == "ring" else 3)
    elif name == "crescent":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        dx, dy = 0.55 * r * np.cos(np.radians(tilt)), 0.55 * r * np.sin(np.radians(tilt))
        draw.ellipse((x - 0.8 * r + dx, y - 0.8 * r + dy, x + 0.8 * r + dx, y + 0.8 * r + dy), fill=0)
    else:
        angle = np.radians(tilt)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        corners = [tuple(point) for point in np.asarray(_POLYGONS[name]) @ turn * r + (x, y)]
        if outline:
            draw.line([*corners, corners[0], corners[1]], fill=255, width=stroke, joint="curve")
        else:
            draw.polygon(corners, fill=255)
    return _reduce(canvas)


def dots(centres: npt.NDArray[np.float64], radii: npt.NDArray[np.float64]) -> Coverage:
    """Filled dots at `centres` (N, 2) with `radii` (N,)."""
    canvas, draw = _canvas()
    for (x, y), radius in zip(centres * _FINE, radii * _FINE, strict=True):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return _reduce(canvas)


def strokes(ends: npt.NDArray[np.float64], width: float) -> Coverage:
    """Straight lines between `ends` (N, 2 ends, 2 coordinates): clutter."""
    canvas, draw = _canvas()
    for start, end in ends * _FINE:
        draw.line((*start, *end), fill=255, width=max(1, round(width * _FINE)))
    return _reduce(canvas)


def pattern(name: str, *, period: float, phase: tuple[float, float], tilt: float, rng: np.random.Generator) -> Coverage:
    """One of `concepts.PATTERNS` over the whole image; `rng` places the speckles."""
    axis = (np.arange(_FINE) + 0.5) / _FINE / period
    x, y = np.meshgrid(axis + phase[0], axis + phase[1])
    if name == "speckles":
        coarse = rng.random((SIDE // 2, SIDE // 2)) > 0.6
        return np.asarray(coarse.repeat(2, 0).repeat(2, 1), np.float32)
    base = {"vertical stripes": 90.0, "diagonal stripes": 45.0}.get(name, 0.0)
    cos, sin = np.cos(np.radians(base + tilt)), np.sin(np.radians(base + tilt))
    along, across = cos * x + sin * y, -sin * x + cos * y
    if name.endswith("stripes"):
        on = across % 1 < 0.5
    elif name == "checks":
        on = (along % 1 < 0.5) ^ (across % 1 < 0.5)
    elif name == "spots":
        on = (along % 1 - 0.5) ** 2 + (across % 1 - 0.5) ** 2 < 0.08
    elif name == "waves":
        on = (across + 0.4 * np.sin(2 * np.pi * 0.7 * along)) % 1 < 0.5
    else:  # rings around a point near the middle
        middle = 0.5 / period
        on = np.hypot(x - 2 * phase[0] * 0.8 - middle, y - 2 * phase[1] * 0.8 - middle) % 1 < 0.5
    covered: Coverage = on.reshape(SIDE, 3, SIDE, 3).mean((1, 3)).astype(np.float32)
    return covered


def _canvas() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("L", (_FINE, _FINE))
    return image, ImageDraw.Draw(image)


def _reduce(image: Image.Image) -> Coverage:
    return np.asarray(image.reduce(_FINE // SIDE)).astype(np.float32) / np.float32(255)


@lru_cache(maxsize=2048)
def _font(name: str, points: int) -> ImageFont.FreeTypeFont:
    with needs("demo"):
        import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), points)


def _star() -> list[tuple[float, float]]:
    angles = np.radians(np.arange(10) * 36 - 90)
    lengths = np.where(np.arange(10) % 2, 0.42, 1.0)
    return list(zip(lengths * np.cos(angles), lengths * np.sin(angles), strict=True))


_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": [(0, -1), (0.9, 0.7), (-0.9, 0.7)],
    "star": _star(),
    "cross": [
        *((-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)),
        *((0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)),
    ],
    "arrow": [(0, -1), (0.75, -0.1), (0.28, -0.1), (0.28, 1), (-0.28, 1), (-0.28, -0.1), (-0.75, -0.1)],
}
