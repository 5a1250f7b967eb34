"""Splits that are given or held out: how many examples, and of which labels."""

from pathlib import Path

import numpy as np
import pytest

from talos_fast import TalosError
from talos_fast.tasks import Split
from talos_fast.tasks.splits import complete


def texts(count: int) -> Split:
    return Split([str(i) for i in range(count)], np.arange(count) % 2)


@pytest.mark.parametrize("given, expected", [
    ({"train": texts(60_000), "test": texts(2)}, (55_000, 5_000, 2)),  # and no tenth
    ({"train": texts(20), "validation": texts(0), "test": texts(4)}, (18, 2, 4)),  # a split of nothing is none
])  # fmt: skip
def test_what_is_held_out(given, expected):
    assert tuple(map(len, complete(given, Path("x"), 0))) == expected


def test_truth_values_are_no_class_indices():
    with pytest.raises(TalosError, match="labels: found dtype bool"):
        Split(["x", "y"], np.array([True, False]))
