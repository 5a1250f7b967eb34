"""Six target tasks and a control task of 32×32 colour images, the same for the same seed."""

from collections.abc import Callable
from zlib import crc32

import numpy as np
import numpy.typing as npt
from PIL import Image as PilImage

from talos_fast.demo import concepts, painting, photos
from talos_fast.demo.coverage import SIDE
from talos_fast.demo.painting import Image, Style
from talos_fast.demo.photos import Part
from talos_fast.tasks.base import Split, Task

SIZES: dict[Part, int] = {"train": 1000, "validation": 200, "test": 300}

# serif, italic and mathematical faces; pre-training saw upright sans-serif ones
_TASK_FONTS = (
    *("DejaVuSerif-Italic.ttf", "DejaVuSerif-BoldItalic.ttf", "DejaVuSansMono-Oblique.ttf", "STIXGeneral.ttf"),
    *("STIXGeneralBolIta.ttf", "STIXGeneralItalic.ttf", "cmr10.ttf", "cmb10.ttf", "cmti10.ttf", "cmtt10.ttf"),
)
_LETTERS = Style(_TASK_FONTS, (0.6, 0.85), tilt=18, outline=0, contrast=(0.55, 1), noise=(5, 30), clutter=2)
_SHAPES = Style((), (0.55, 0.85), tilt=35, outline=0.8, contrast=(0.5, 1), noise=(5, 30), clutter=2)
_COUNTS = Style((), (0.13, 0.25), tilt=0, outline=0, contrast=(0.6, 1), noise=(5, 20), clutter=0)
_PATTERNS = Style((), (0.15, 0.3), tilt=12, outline=0, contrast=(0.3, 0.8), noise=(10, 35), clutter=2)
_DIGITS = Style((), (0, 0), tilt=0, outline=0, contrast=(0.8, 1), noise=(5, 20), clutter=0)
CONTROL_STYLE = Style(
    ("DejaVuSans-Bold.ttf",), (0.3, 0.5), tilt=20, outline=0, contrast=(0.9, 1), noise=(0, 25), clutter=0
)


def demo_tasks(seed: int = 0) -> list[Task]:
    """The six targets: digits and surfaces (real images), letters, shapes, counts and patterns (drawn).

    Args:
        seed: of the drawings, the crops and the splits.

    Returns:
        Tasks of 1,000 training, 200 validation and 300 test images, uint8 of shape (N, 32, 32, 3), with equally
        frequent classes.

    Raises:
        TalosError: scikit-learn or scikit-image is not installed.
    """
    return [TASKS[name](seed) for name in TARGETS]


def control_task(seed: int = 0) -> Task:
    """A broad task that the pre-trained model is good at, disjoint from the targets: `colours`."""
    return colours(seed)


def letters(seed: int = 0) -> Task:
    """Twelve letters in ten serif, italic and mathematical fonts, tilted and cluttered."""
    return _task(
        "letters",
        concepts.LETTERS,
        ("the letter {}.", "a letter {}."),
        lambda rng, label, _: painting.letter(rng, concepts.LETTERS[label], _LETTERS),
        seed,
    )


def shapes(seed: int = 0) -> Task:
    """Eight shapes, mostly outlined, tilted and cluttered."""
    return _task(
        "shapes",
        concepts.SHAPES,
        ("a {}.", "a drawing of a {}."),
        lambda rng, label, _: painting.shape(rng, concepts.SHAPES[label], _SHAPES),
        seed,
    )


def counts(seed: int = 0) -> Task:
    """One to six small dots of different sizes."""
    return _task(
        "counts",
        concepts.COUNTS,
        ("{} dots.", "a picture of {} dots."),
        lambda rng, label, _: painting.dots(rng, label + 1, _COUNTS),
        seed,
    )


def patterns(seed: int = 0) -> Task:
    """Eight faint, fine, noisy patterns."""
    return _task(
        "patterns",
        concepts.PATTERNS,
        ("{}.", "a picture of {}."),
        lambda rng, label, _: painting.pattern(rng, concepts.PATTERNS[label], _PATTERNS),
        seed,
    )


def surfaces(seed: int = 0) -> Task:
    """Ten real surfaces: crops of the photographs in scikit-image and scikit-learn."""
    return _task(
        "surfaces",
        concepts.SURFACES,
        ("{}.", "a photo of {}."),
        lambda rng, label, part: painting.add_noise(
            rng, photos.surface(rng, concepts.SURFACES[label], part, (0.7, 1.0), grey=False), (0, 10)
        ),
        seed,
    )


def digits(seed: int = 0) -> Task:
    """Real handwriting: scikit-learn's digits, enlarged from 8×8, in random colours."""
    ink, labels = photos.handwritten_digits()
    order = np.random.default_rng([seed, crc32(b"digits")]).permutation(len(labels))
    of_class = [iter(order[labels[order] == label]) for label in range(10)]

    def draw(rng: np.random.Generator, label: int, _: Part) -> Image:
        return _handwritten(rng, ink[next(of_class[label])])

    return _task("digits", concepts.NUMBERS, ("the number {}.", "a number {}."), draw, seed)


def colours(seed: int = 0) -> Task:
    """The control: which of six colours a thing has, and at which of four sides it stands (24 classes)."""
    classes = [(colour, place) for colour in concepts.COLOURS for place in concepts.PLACES]
    names = tuple(f"{colour} thing at the {place}" for colour, place in classes)

    def draw(rng: np.random.Generator, label: int, _: Part) -> Image:
        return painting.thing_at(rng, classes[label][1], CONTROL_STYLE, classes[label][0])

    return _task("colours", names, ("a {}.",), draw, seed)


def _handwritten(rng: np.random.Generator, ink: npt.NDArray[np.float32]) -> Image:
    side = int(rng.integers(26, 33))
    large = PilImage.fromarray(ink).resize((side, side), PilImage.Resampling.BICUBIC)
    covered = np.zeros((SIDE, SIDE), np.float32)
    left, top = rng.integers(SIDE - side + 1, size=2)
    covered[top : top + side, left : left + side] = np.clip(np.asarray(large), 0, 1)
    return painting.paint(rng, covered, _DIGITS)


def _task(
    name: str,
    class_names: tuple[str, ...],
    templates: tuple[str, ...],
    draw: Callable[[np.random.Generator, int, Part], Image],
    seed: int,
) -> Task:
    splits = {}
    for number, (part, size) in enumerate(SIZES.items()):
        rng = np.random.default_rng([seed, crc32(name.encode()), number])
        labels = rng.permutation(np.arange(size) % len(class_names))
        splits[part] = Split(np.stack([draw(rng, int(label), part) for label in labels]), labels)
    return Task(name, class_names, templates, splits["train"], splits["validation"], splits["test"])


TASKS: dict[str, Callable[[int], Task]] = {
    make.__name__: make for make in (digits, surfaces, letters, shapes, counts, patterns, colours)
}
"""Every embedded task by name; made when it is asked for, which takes a second or two each."""

TARGETS = tuple(name for name in TASKS if name != "colours")
