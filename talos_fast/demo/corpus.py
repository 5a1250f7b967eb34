"""Images with captions for pre-training: the demo's concepts, drawn in a plainer style than the tasks'.

Figures and letters are upright sans-serif type, shapes are filled, patterns are coarse, and handwriting does not occur
at all: what the tasks show differs, so that there is something to fine-tune. Photographs come from the tiles of the
tasks' train splits only, in grey and at another scale.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from talos_fast.demo import concepts, painting, photos
from talos_fast.demo.painting import Image, Style
from talos_fast.demo.tokenizer import words_of

FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf", "cmss10.ttf")
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_TYPE = Style(FONTS, (0.6, 0.9), tilt=10, outline=0, contrast=(0.6, 1), noise=(0, 25), clutter=1)
_SHAPES = Style((), (0.55, 0.9), tilt=12, outline=0.1, contrast=(0.6, 1), noise=(0, 25), clutter=1)
_DOTS = Style((), (0.18, 0.26), tilt=0, outline=0, contrast=(0.7, 1), noise=(0, 20), clutter=0)
_PATTERNS = Style((), (0.22, 0.42), tilt=8, outline=0, contrast=(0.5, 1), noise=(0, 20), clutter=0)
_THINGS = Style(FONTS, (0.28, 0.55), tilt=20, outline=0.1, contrast=(0.8, 1), noise=(0, 30), clutter=0)

_FRAMES = ("{}.", "{}.", "a picture of {}.", "a drawing of {}.", "a photo of {}.")

Captioned = tuple[Image, str]


def corpus(size: int, seed: int) -> tuple[npt.NDArray[np.uint8], list[str]]:
    """`size` images, uint8 of shape (size, 32, 32, 3), and their captions."""
    rng = np.random.default_rng([seed, 0])
    kinds: Sequence[Callable[[np.random.Generator], Captioned]]
    kinds, shares = zip(*_MIXTURE, strict=True)
    drawn = [kinds[index](rng) for index in rng.choice(len(kinds), size, p=shares)]
    frames = rng.integers(len(_FRAMES), size=size)
    captions = [_FRAMES[frame].format(text) for frame, (_, text) in zip(frames, drawn, strict=True)]
    return np.stack([image for image, _ in drawn]), captions


def vocabulary() -> list[str]:
    """Every word that a caption or a task's prompt can contain, sorted."""
    names = (*concepts.NUMBERS, *concepts.SHAPES, *concepts.PATTERNS, *concepts.SURFACES, *concepts.PLACES)
    others = (*concepts.COLOURS, *ALPHABET, *_FRAMES, "a an the thing at letter number dot dots")
    return sorted({word for text in (*names, *others) for word in words_of(text)})


def _colour(rng: np.random.Generator) -> str | None:
    return str(rng.choice(list(concepts.COLOURS))) if rng.random() < 0.5 else None


def _named(article: str, colour: str | None, noun: str) -> str:
    return " ".join(part for part in (article, colour, noun) if part)


def _letter(rng: np.random.Generator) -> Captioned:
    text, colour = ALPHABET[rng.integers(26)], _colour(rng)
    article = "the" if rng.random() < 0.5 else "a"
    return painting.letter(rng, text, _TYPE, colour), _named(article, colour, f"letter {text}")


def _figure(rng: np.random.Generator) -> Captioned:
    value, colour = int(rng.integers(10)), _colour(rng)
    article = "the" if rng.random() < 0.5 else "a"
    return painting.letter(rng, str(value), _TYPE, colour), _named(article, colour, f"number {concepts.NUMBERS[value]}")


def _shape(rng: np.random.Generator) -> Captioned:
    name, colour = concepts.SHAPES[rng.integers(len(concepts.SHAPES))], _colour(rng)
    return painting.shape(rng, name, _SHAPES, colour), _named("a", colour, name)


def _dots(rng: np.random.Generator) -> Captioned:
    count, colour = int(rng.integers(1, 7)), _colour(rng)
    return painting.dots(rng, count, _DOTS, colour), _named(concepts.NUMBERS[count], colour, "dots")


def _pattern(rng: np.random.Generator) -> Captioned:
    name, colour = concepts.PATTERNS[rng.integers(len(concepts.PATTERNS))], _colour(rng)
    return painting.pattern(rng, name, _PATTERNS, colour), _named("", colour, name)


def _surface(rng: np.random.Generator) -> Captioned:
    name = concepts.SURFACES[rng.integers(len(concepts.SURFACES))]
    return painting.add_noise(rng, photos.surface(rng, name, "train", (0.4, 0.7), grey=True), (0, 35)), name


def _thing(rng: np.random.Generator) -> Captioned:
    colour, place = str(rng.choice(list(concepts.COLOURS))), concepts.PLACES[rng.integers(4)]
    return painting.thing_at(rng, place, _THINGS, colour), f"a {colour} thing at the {place}"


_MIXTURE: tuple[tuple[Callable[[np.random.Generator], Captioned], float], ...] = (
    (_letter, 0.18),
    (_figure, 0.14),
    (_shape, 0.16),
    (_dots, 0.13),
    (_pattern, 0.13),
    (_surface, 0.08),
    (_thing, 0.18),
)
