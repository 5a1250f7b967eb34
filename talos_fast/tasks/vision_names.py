"""Class names and prompts of the vision tasks whose sources name their classes by numbers or in code."""

EUROSAT = {
    "AnnualCrop": "annual crop land", "Forest": "forest", "HerbaceousVegetation": "brushland or shrubland",
    "Highway": "highway or road", "Industrial": "industrial buildings", "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land", "Residential": "residential buildings", "River": "river",
    "SeaLake": "lake or sea",
}  # fmt: skip

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_LIMITS = tuple(f"a {speed} km/h speed limit" for speed in (20, 30, 50, 60, 70, 80))
GTSRB = (
    *_LIMITS, "the end of the 80 km/h speed limit", "a 100 km/h speed limit", "a 120 km/h speed limit", "no passing",
    "no passing for trucks", "right of way at the next intersection", "priority road", "yield", "stop", "no vehicles",
    "no trucks", "no entry", "general caution", "a dangerous curve to the left", "a dangerous curve to the right",
    "a double curve", "a bumpy road", "a slippery road", "a road narrowing on the right", "road work",
    "traffic signals ahead", "pedestrians", "children crossing", "bicycles crossing", "ice or snow",
    "wild animals crossing", "the end of all limits", "turn right ahead", "turn left ahead", "ahead only",
    "go straight or right", "go straight or left", "keep right", "keep left", "a roundabout", "the end of no passing",
    "the end of no passing for trucks",
)  # fmt: skip

TEMPLATES = {
    "cars": ("a photo of a {}.", "a photo of a {}, a car.", "a picture of a parked {}.", "a {} on the road."),
    "dtd": ("a photo of a {} texture.", "a photo of a {} surface.", "something {}, seen from close up."),
    "eurosat": ("a satellite photo of {}.", "an aerial view of {}.", "{} seen from space."),
    "gtsrb": ("a photo of a traffic sign meaning {}.", "a close-up of a road sign: {}.", "a traffic sign: {}."),
    "mnist": ("a photo of the handwritten digit {}.",),
    "resisc45": ("a satellite photo of a {}.", "an aerial photo of a {}.", "a {} seen from above."),
    "sun397": ("a photo of a {}.", "a view of a {}."),
    "svhn": ("a photo of the house number digit {}.",),
}
