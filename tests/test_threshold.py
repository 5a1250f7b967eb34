"""Exact selection over a list of tensors, against torch.kthvalue on all of them together."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from two_ranks import needs_gloo, on_two_ranks

from talos_fast import TalosError
from talos_fast.sensitivity import kth_smallest, select_extreme, threshold
from talos_fast.sensitivity.histogram import COUNTS, radix_histogram_reference

pytestmark = pytest.mark.usefixtures("two_threads")


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


def test_negative_zero_is_zero():
    scores = {"p": torch.tensor([-0.0, 0.0, 1.0])}
    assert kth_smallest(scores, 2) == (0.0, 0)
    assert select_extreme(scores, 2)["p"].tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep", ["lowest", "highest"])
def test_other_dtypes_strides_and_many_chunks(monkeypatch, device, dtype, keep):
    monkeypatch.setattr(threshold, "_CHUNK", 7)
    scores = {
        "whole": torch.rand(6, 5, device=device).to(dtype),
        "turned": torch.rand(9, 4, device=device).to(dtype).t(),
    }
    everything = torch.cat([score.reshape(-1).float() for score in scores.values()])
    selected = select_extreme(scores, 31, keep)
    assert [mask.shape for mask in selected.values()] == [score.shape for score in scores.values()]
    order = everything.sort(stable=True, descending=keep == "highest").indices[:31]
    want = torch.zeros_like(everything, dtype=torch.bool)
    want[order] = True
    assert torch.equal(torch.cat([mask.reshape(-1) for mask in selected.values()]), want)


@pytest.mark.parametrize("size", [0, 1, 31, 32, 100, 2**19 + 5])
def test_histogram_equals_its_reference(device, size):
    scores = torch.randn(size, device=device).exp().square()
    scores[: size // 3], scores[size // 3 : size // 2] = float("inf"), 0.0  # long runs of equal ones
    ends = scores[[0, -1]].view(torch.int32).tolist() if size else []  # of a run, and an ordinary one
    for digit, prefix in {(0, 0), *((1, bits >> 20) for bits in ends), *((2, bits >> 10) for bits in ends)}:
        counts, want = (torch.ones(COUNTS, dtype=torch.int64, device=device) for _ in range(2))
        torch.ops.talos_fast.radix_histogram_(counts, scores, digit, prefix)
        radix_histogram_reference(want, scores, digit, prefix)
        assert torch.equal(counts, want)
        assert digit > 0 or counts.sum() - COUNTS == size


def test_histogram_counts_what_is_no_score(device):
    scores = torch.tensor([float("nan"), -1.0, -1e-45, -float("inf"), float("inf"), -0.0, 2.0] * 9, device=device)
    scores.view(torch.int32)[0] |= -(2**31)  # a NaN with a sign
    for run in (torch.ops.talos_fast.radix_histogram_, radix_histogram_reference):
        counts = torch.zeros(COUNTS, dtype=torch.int64, device=device)
        run(counts, scores, 0, 0)
        run(counts, scores, 1, 0x3F8)  # of -1; digits after the first do not count them again
        assert counts[-1] == 4 * 9


@pytest.mark.parametrize("run", [torch.ops.talos_fast.radix_histogram_, radix_histogram_reference])
def test_histogram_counts_negative_zeros_as_zeros(run, device):
    counts = torch.zeros(COUNTS, dtype=torch.int64, device=device)
    run(counts, torch.tensor([-0.0, 0.0, -0.0], device=device), 0, 0)
    assert counts[0] == counts.sum() == 3


@pytest.mark.gpu
def test_histogram_counts_in_the_current_stream():
    """After the stream's work before it, and before the work behind it, whatever other streams do."""
    scores = torch.rand(1000, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        counts = torch.zeros(COUNTS, dtype=torch.int64, device="cuda")
        torch.ops.talos_fast.radix_histogram_(counts, scores, 0, 0)
        assert counts.sum().item() == 1000


@pytest.mark.gpu
def test_histogram_refuses_tensors_of_two_devices():
    counts = torch.zeros(COUNTS, dtype=torch.int64)
    for arguments in ((counts, torch.rand(3, device="cuda")), (counts.cuda(), torch.rand(3))):
        with pytest.raises((RuntimeError, TalosError), match="counts and scores must be on one device"):
            torch.ops.talos_fast.radix_histogram_(*arguments, 0, 0)


def test_histogram_passes_opcheck(device):
    pytest.importorskip("expecttest", reason="opcheck needs expecttest")
    arguments = (torch.zeros(COUNTS, dtype=torch.int64, device=device), torch.rand(50, device=device), 0, 0)
    torch.library.opcheck(torch.ops.talos_fast.radix_histogram_.default, arguments)


BAD_HISTOGRAMS = {
    "counts must be 2049 contiguous int64": lambda c, s: (c[1:], s, 0),
    "scores must be contiguous float32": lambda c, s: (c, s.double(), 0),
    "scores must be contiguous": lambda c, s: (c, s[::2], 0),
    "digit must be 0, 1 or 2, but is 3": lambda c, s: (c, s, 3),
    "counts and scores must be on one device": lambda c, s: (c.to("meta"), s, 0),
}


@pytest.mark.parametrize("text", BAD_HISTOGRAMS)
@pytest.mark.parametrize("run", [torch.ops.talos_fast.radix_histogram_, radix_histogram_reference])
def test_histogram_says_what_is_wrong(run, text, device):
    counts = torch.zeros(COUNTS, dtype=torch.int64, device=device)
    arguments = BAD_HISTOGRAMS[text](counts, torch.rand(3, device=device))
    with pytest.raises((RuntimeError, TalosError), match=text):
        run(*arguments, 0)


def sharded(rank: int, ranks: int = 2) -> dict[str, torch.Tensor]:
    """The tensors of one mapping, the first ones on rank 0; full of ties."""
    torch.manual_seed(5)
    everything = list(scores_with_ties([40, 0, 300, 7, 150], 6).items())
    return dict(everything[:2] if rank == 0 else everything[2:]) if ranks == 2 else dict(everything)


WANTED = [("lowest", 1), ("lowest", 200), ("highest", 133), ("lowest", 497), ("lowest", 25), ("highest", 10)]


def on_rank(rank: int, folder: Path) -> None:
    """What one of two processes does; what it finds is written down for the test."""
    group, scores, errors = dist.group.WORLD, sharded(rank), []
    found = [(kth_smallest(scores, k, group), select_extreme(scores, k, keep, group)) for keep, k in WANTED]
    nothing = {} if rank == 1 else scores
    found.append((kth_smallest(nothing, 7, group), select_extreme(nothing, 7, "lowest", group)))
    for bad, k in ((scores | {"bad": torch.tensor([float("nan")])} if rank == 1 else scores, 1), (scores, 498)):
        try:
            kth_smallest(bad, k, group)
        except TalosError as error:
            errors.append(str(error))
    torch.save((found, errors), folder / f"{rank}.pt")


@needs_gloo
def test_two_ranks_select_what_one_would(tmp_path):
    on_two_ranks(on_rank, tmp_path)
    (first, first_errors), (second, second_errors) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    together = sharded(0, ranks=1)
    for (keep, k), (threshold_0, mask_0), (threshold_1, mask_1) in zip(WANTED, first, second, strict=False):
        assert threshold_0 == threshold_1 == kth_smallest(together, k)
        want = select_extreme(together, k, keep)
        assert list(mask_0 | mask_1) == list(want)
        assert all(torch.equal(mask, want[name]) for name, mask in (mask_0 | mask_1).items())
    assert first[-1][0] == second[-1][0] == kth_smallest(sharded(0), 7)  # a rank may hold nothing
    assert first_errors[0].startswith("the scores on another rank hold NaN")
    assert second_errors[0].startswith("the scores of 'bad' hold NaN")
    assert first_errors[1] == second_errors[1] and "498-th smallest of 497" in first_errors[1]


@pytest.mark.parametrize("bad", [float("nan"), -1.0])
def test_refuses_what_is_no_sum_of_squares(bad):
    with pytest.raises(TalosError, match="'layer.weight' hold NaN or negative"):
        kth_smallest({"layer.weight": torch.tensor([0.0, bad])}, 1)


def test_refuses_k_out_of_range():
    with pytest.raises(TalosError, match="3-th smallest of 2"):
        kth_smallest({"p": torch.zeros(2)}, 3)
