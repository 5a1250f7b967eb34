"""The world of the demo: what its images can show, and the words for it.

The targets (letters, shapes, counts, patterns, surfaces, and handwritten digits) and the control (colours at places)
have no class in common.
"""

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COUNTS = NUMBERS[1:7]
LETTERS = tuple("ABDEFGHKMRST")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "arrow", "crescent")
PATTERNS = (
    "horizontal stripes",
    "vertical stripes",
    "diagonal stripes",
    "checks",
    "spots",
    "rings",
    "waves",
    "speckles",
)
SURFACES = ("brick", "grass", "gravel", "coins", "craters", "stars", "tissue", "fur", "print", "petals")
PLACES = ("top", "bottom", "left", "right")

COLOURS = {
    "red": (225, 40, 40),
    "green": (45, 175, 65),
    "blue": (45, 75, 225),
    "yellow": (240, 215, 50),
    "purple": (155, 50, 185),
    "cyan": (50, 205, 220),
}
