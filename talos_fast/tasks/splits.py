"""From whatever splits a source has to the three that a task needs."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from talos_fast.errors import TalosError
from talos_fast.tasks.base import Split

logger = logging.getLogger("talos_fast")

HELD_OUT = 0.1
"""Share of every class of train that becomes the validation split where the source has none ..."""

HELD_OUT_MOST = 5000
"""... but about this many examples at most."""

ALIASES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
"""Names that sources use for their splits."""


def named_splits(names: Iterable[str], source: Path) -> dict[str, str]:
    """Split -> what the source calls it; other names are left out.

    Raises:
        TalosError: two names of one split.
    """
    found: dict[str, str] = {}
    for name in sorted(names):
        split = ALIASES.get(name.lower())
        if split in found:
            raise TalosError(f"{source}: {found[split]} and {name} are both names of {split}; keep one")
        if split is not None:
            found[split] = name
    return found


def hold_out(labels: npt.NDArray[np.int64], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to keep and to hold out, stratified: every class with two examples or more gives at least one.

    Args:
        labels: class indices, shape (N,).
        share: fraction held out, in (0, 1).
        seed: of the draw.
    """
    generator = np.random.default_rng(seed)
    held: list[int] = []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        count = max(1, round(share * len(members))) if len(members) > 1 else 0
        held.extend(members[:count].tolist())
    kept = np.setdiff1d(np.arange(len(labels)), held).tolist()
    return kept, sorted(held)


def complete(found: Mapping[str, Split], source: Path, seed: int) -> tuple[Split, Split, Split]:
    """Train, validation and test, with a stratified tenth of train held out where there is no validation split.

    A source with a validation but no test split (the layout of ImageNet) is reported on its validation split, and a
    tenth of train takes that split's place, so that nothing is chosen on the examples that are reported.

    Raises:
        TalosError: no train split, neither test nor validation, or a train split too small to hold anything out.
    """
    found = {name: split for name, split in found.items() if len(split)}
    if "train" not in found or not {"validation", "test"} & found.keys():
        raise TalosError(
            f"{source}: found the splits {sorted(found) or 'none'}; a task needs train and test "
            "(validation is held out of train where it is missing)"
        )
    train, validation, test = found["train"], found.get("validation"), found.get("test")
    if test is None:
        logger.warning("%s has no test split: its validation split is reported on instead", source)
        test, validation = validation, None
    if validation is None:
        kept, held = hold_out(train.labels, min(HELD_OUT, HELD_OUT_MOST / len(train)), seed)
        if not held:
            raise TalosError(f"{source}: train has one example a class, too few to hold out for validation; add some")
        logger.info("%s: %d of %d training examples held out for validation", source, len(held), len(train))
        train, validation = train.select(kept), train.select(held)
    assert test is not None  # one of the two was found
    return train, validation, test
