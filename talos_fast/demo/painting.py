"""From coverage to a small noisy colour image, in a style.

Pre-training and tasks draw the same concepts in different styles: that gap is what fine-tuning closes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from talos_fast.demo import coverage
from talos_fast.demo.concepts import COLOURS, SHAPES
from talos_fast.demo.coverage import Coverage

Image = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Style:
    """How things are drawn.

    Args:
        fonts: files in matplotlib's font folder.
        size: smallest and largest height of a thing, as fractions of the image side.
        tilt: largest rotation to either side, degrees.
        outline: probability of an outlined instead of a filled shape.
        contrast: smallest and largest weight of the thing over its background.
        noise: smallest and largest standard deviation of the pixel noise, of 255 grey levels.
        clutter: largest number of distracting lines.
    """

    fonts: tuple[str, ...]
    size: tuple[float, float]
    tilt: float
    outline: float
    contrast: tuple[float, float]
    noise: tuple[float, float]
    clutter: int


def paint(rng: np.random.Generator, covered: Coverage, style: Style, colour: str | None = None) -> Image:
    """The covered pixels in a named colour, or in a random one, on a plain dark background.

    Always bright on dark: a network this small, trained this briefly, would spend itself on learning both polarities.

    Returns:
        uint8, shape (32, 32, 3).
    """
    thing = rng.uniform(90, 255, 3) if colour is None else np.asarray(COLOURS[colour]) + rng.normal(0, 12, 3)
    background = np.clip(rng.uniform(0, 70) + rng.normal(0, 12, 3), 0, 255)
    image = background + np.zeros((coverage.SIDE, coverage.SIDE, 1))
    if style.clutter:
        lines = coverage.strokes(rng.random((rng.integers(style.clutter + 1), 2, 2)), rng.uniform(0.02, 0.05))
        image = image + lines[..., None] * (rng.uniform(0, 255, 3) - image) * 0.6
    weight = rng.uniform(*style.contrast)
    image = image + weight * covered[..., None] * (thing - image)
    return add_noise(rng, image, style.noise)


def add_noise(rng: np.random.Generator, image: npt.NDArray[np.floating], noise: tuple[float, float]) -> Image:
    """Gaussian pixel noise of a random strength; `image` holds 0 ... 255."""
    noisy = image + rng.normal(0, rng.uniform(*noise), image.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def letter(rng: np.random.Generator, text: str, style: Style, colour: str | None = None) -> Image:
    """A letter or figure in one of the style's fonts."""
    height = rng.uniform(*style.size)
    font = style.fonts[rng.integers(len(style.fonts))]
    covered = coverage.glyph(text, font, centre=_centre(rng, height), height=height, tilt=_tilt(rng, style))
    return paint(rng, covered, style, colour)


def shape(rng: np.random.Generator, name: str, style: Style, colour: str | None = None) -> Image:
    """One of `concepts.SHAPES`."""
    height = rng.uniform(*style.size)
    covered = coverage.shape(
        name,
        centre=_centre(rng, height),
        radius=height / 2,
        tilt=_tilt(rng, style),
        outline=rng.random() < style.outline,
    )
    return paint(rng, covered, style, colour)


def dots(rng: np.random.Generator, count: int, style: Style, colour: str | None = None) -> Image:
    """`count` dots that do not touch; the style's size is the diameter of one."""
    radii = rng.uniform(style.size[0], style.size[1], count) / 2
    while (centres := _scatter(rng, radii)) is None:
        pass
    return paint(rng, coverage.dots(centres, radii), style, colour)


def pattern(rng: np.random.Generator, name: str, style: Style, colour: str | None = None) -> Image:
    """One of `concepts.PATTERNS`; the style's size is the period."""
    phase = (rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 0.5))
    covered = coverage.pattern(name, period=rng.uniform(*style.size), phase=phase, tilt=_tilt(rng, style), rng=rng)
    return paint(rng, covered, style, colour)


def thing_at(rng: np.random.Generator, place: str, style: Style, colour: str) -> Image:
    """A shape, letter or blob in `colour` near one side of the image (`concepts.PLACES`)."""
    height = rng.uniform(*style.size)
    centre = _beside(rng, place, height)
    kind = rng.integers(3)
    if kind == 0:
        name = SHAPES[rng.integers(len(SHAPES))]
        covered = coverage.shape(name, centre=centre, radius=height / 2, tilt=_tilt(rng, style))
    elif kind == 1:
        text = "ABCDEFGHJKLMNPQRSTUVXYZ0123456789"[rng.integers(33)]
        font = style.fonts[rng.integers(len(style.fonts))]
        covered = coverage.glyph(text, font, centre=centre, height=height, tilt=_tilt(rng, style))
    else:
        blobs = np.asarray(centre) + rng.normal(0, height / 6, (4, 2))
        covered = coverage.dots(blobs, rng.uniform(height / 5, height / 3, 4))
    return paint(rng, covered, style, colour)


def _scatter(rng: np.random.Generator, radii: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    """Centres of dots with a gap between any two, or None if the last ones found no room."""
    centres = np.empty((len(radii), 2))
    for index, radius in enumerate(radii):
        for _ in range(40):
            centres[index] = rng.uniform(radius + 0.02, 0.98 - radius, 2)
            gaps = np.linalg.norm(centres[:index] - centres[index], axis=1) - radii[:index] - radius
            if (gaps > 0.05).all():
                break
        else:
            return None
    return centres


def _beside(rng: np.random.Generator, place: str, height: float) -> tuple[float, float]:
    near, along = height / 2 + rng.uniform(0, 0.08), rng.uniform(0.35, 0.65)
    return {"left": (near, along), "right": (1 - near, along), "top": (along, near), "bottom": (along, 1 - near)}[place]


def _centre(rng: np.random.Generator, height: float) -> tuple[float, float]:
    room = min(0.06, max(0.0, 0.5 - height / 2))
    return 0.5 + rng.uniform(-room, room), 0.5 + rng.uniform(-room, room)


def _tilt(rng: np.random.Generator, style: Style) -> float:
    return float(rng.uniform(-style.tilt, style.tilt))
