"""Exact selection over a list of tensors, against torch.kthvalue on all of them together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from talos_fast import TalosError
from talos_fast.sensitivity import kth_smallest, select_extreme


def scores_with_ties(sizes: list[int], levels: int) -> dict[str, torch.Tensor]:
    return {f"p{n}": torch.randint(0, levels, (size,)).float() ** 3 * 1e-9 for n, size in enumerate(sizes)}


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any), levels=st.integers(1, 50), data=st.data()
)
def test_matches_a_full_sort(sizes, levels, data):
    torch.manual_seed(levels)
    scores = scores_with_ties(sizes, levels)
    everything = torch.cat(list(scores.values()))
    k = data.draw(st.integers(1, len(everything)))
    threshold, below = kth_smallest(scores, k)
    assert threshold == everything.kthvalue(k).values
    assert below == (everything < threshold).sum()
    for keep in ("lowest", "highest"):
        selected = torch.cat([mask for mask in select_extreme(scores, k, keep).values()])
        assert selected.sum() == k
        inside, outside = everything[selected], everything[~selected]
        if len(outside):
            assert inside.max() <= outside.min() if keep == "lowest" else inside.min() >= outside.max()


def test_ties_go_to_the_earlier_tensor_and_entry():
    scores = {"first": torch.tensor([2.0, 1.0]), "second": torch.ones(3)}
    selected = select_extreme(scores, 3)
    assert selected["first"].tolist() == [False, True]
    assert selected["second"].tolist() == [True, True, False]


def test_tiny_huge_and_infinite_scores_are_ordered():
    values = torch.tensor([1e-45, 0.0, 1e38, float("inf"), 1e-30])
    assert [kth_smallest({"p": values}, k)[0] for k in (1, 2, 3, 4, 5)] == values.sort().values.tolist()


@pytest.mark.parametrize("bad", [float("nan"), -1.0])
def test_refuses_what_is_no_sum_of_squares(bad):
    with pytest.raises(TalosError, match="'layer.weight' hold NaN or negative"):
        kth_smallest({"layer.weight": torch.tensor([0.0, bad])}, 1)


def test_refuses_k_out_of_range():
    with pytest.raises(TalosError, match="3-th smallest of 2"):
        kth_smallest({"p": torch.zeros(2)}, 3)
