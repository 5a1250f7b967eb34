"""Real images that ship inside scikit-learn and scikit-image: handwritten digits and photographed surfaces.

The files are read from the installed packages; nothing is downloaded.
"""

from functools import cache
from importlib.resources import as_file, files
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from talos_fast.demo.coverage import SIDE
from talos_fast.errors import TalosError

Part = Literal["train", "validation", "test"]

# surface: package, file, box (left, top, right, bottom) that shows nothing else, side of a tile in pixels
_PHOTOS: dict[str, tuple[str, str, tuple[int, int, int, int], int]] = {
    "brick": ("skimage", "data/brick.png", (0, 0, 512, 512), 64),
    "grass": ("skimage", "data/grass.png", (0, 0, 512, 512), 64),
    "gravel": ("skimage", "data/gravel.png", (0, 0, 512, 512), 64),
    "coins": ("skimage", "data/coins.png", (16, 16, 384, 303), 46),
    "craters": ("skimage", "data/moon.png", (64, 0, 512, 512), 64),
    "stars": ("skimage", "data/hubble_deep_field.jpg", (0, 0, 1000, 872), 64),
    "tissue": ("skimage", "data/ihc.png", (0, 0, 512, 512), 64),
    "fur": ("skimage", "data/chelsea.png", (50, 0, 400, 300), 50),
    "print": ("skimage", "data/page.png", (0, 34, 374, 136), 34),
    "petals": ("sklearn", "datasets/images/flower.jpg", (225, 95, 395, 275), 34),
}


def surface(
    rng: np.random.Generator, name: str, part: Part, scale: tuple[float, float], *, grey: bool
) -> npt.NDArray[np.float64]:
    """A random square crop of a photograph, perhaps mirrored.

    A photograph is cut into tiles, each of which belongs to one part; a crop lies within one tile, so the parts
    share no pixel.

    Args:
        rng: chooses the tile, the crop and the brightness.
        name: one of `concepts.SURFACES`.
        part: "train", "validation" or "test".
        scale: smallest and largest crop side, as fractions of the tile side.
        grey: in grey, with a random brightness and contrast; otherwise in colour, with both changed a little.

    Returns:
        float64 of shape (32, 32, 3), values about 0 ... 255.
    """
    photo, tile = _photo(name, grey), _PHOTOS[name][3]
    corners = tiles(name, part)
    left, top = corners[rng.integers(len(corners))]
    side = round(tile * rng.uniform(*scale))
    left, top = left + int(rng.integers(tile - side + 1)), top + int(rng.integers(tile - side + 1))
    crop = photo.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    pixels = np.asarray(crop, np.float64)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if not grey:
        return pixels * rng.uniform(0.85, 1.15) + rng.uniform(-12, 12)
    pixels = (pixels - pixels.mean()) / (pixels.std() + 8) * rng.uniform(25, 50) + rng.uniform(70, 170)
    return np.repeat(pixels[..., None], 3, axis=2)


@cache
def tiles(name: str, part: Part) -> list[tuple[int, int]]:
    """Left upper corners of the tiles of a photograph that belong to a part: 50 %, 20 % and 30 %."""
    _, _, (left, top, right, bottom), side = _PHOTOS[name]
    corners = [(x, y) for y in range(top, bottom - side + 1, side) for x in range(left, right - side + 1, side)]
    order = np.random.default_rng(len(corners)).permutation(len(corners))
    first, second = round(0.5 * len(corners)), round(0.7 * len(corners))
    chosen = {"train": order[:first], "validation": order[first:second], "test": order[second:]}[part]
    return [corners[index] for index in chosen]


@cache
def handwritten_digits() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """scikit-learn's 1,797 handwritten digits: ink in [0, 1], shape (N, 8, 8), and the labels (N,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _missing("scikit-learn") from error
    digits = load_digits()
    return digits.images.astype(np.float32) / 16, digits.target.astype(np.int64)


@cache
def _photo(name: str, grey: bool) -> Image.Image:
    package, path, _, _ = _PHOTOS[name]
    try:
        with as_file(files(package) / path) as file, Image.open(file) as image:
            return image.convert("L" if grey else "RGB")
    except (ImportError, OSError) as error:
        raise _missing({"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]) from error


def _missing(package: str) -> TalosError:
    return TalosError(
        f"demo: found no images of {package}, whose photographs and digits the demo uses; "
        "install them with: pip install 'talos-fast[demo]'"
    )
