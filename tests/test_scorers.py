"""The ways that calibration is timed beside: none changes what another one computes."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from scorers import contenders, plain
from subjects import SUBJECTS

from talos_fast.profiling.work import FlopCounter


def flops(step) -> int:
    with FlopCounter({}, {}) as counted:
        step()
    return counted.total


@pytest.mark.parametrize("group", ["ours", "released"])
def test_no_way_freezes_what_another_one_scores(group):
    """One that left a single tensor to train made all that came after it as cheap as itself."""
    subject = SUBJECTS["smoke"](4)
    whole = plain(subject)
    alone = flops(whole)
    steps = {name: make(subject) for name, make in contenders(group)}
    first = {name: flops(step) for name, step in steps.items()}
    assert {name: flops(step) for name, step in steps.items()} == first
    assert flops(whole) == alone
    if group == "ours":
        assert first["activation gradients alone"] < 0.8 * alone
