"""The k-th smallest of all scores, exactly, over a list of tensors that is never concatenated nor copied.

Three histograms, of 11, 10 and 10 bits, find it: `talos_fast.sensitivity.histogram`. Scores may be spread over the
ranks of a process group; ranks then exchange their histograms, 16 KB each.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from talos_fast.errors import TalosError
from talos_fast.sensitivity.histogram import BINS, COUNTS, DIGITS

# Entries that are converted, or compared with the threshold, at a time.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class _Threshold:
    """The k-th smallest of ``total`` scores, how many are below it and equal to it, and how many equal on this rank."""

    value: float
    total: int
    below: int
    tied: int
    own_tied: int


def kth_smallest(scores: Mapping[str, Tensor], k: int, group: dist.ProcessGroup | None = None) -> tuple[float, int]:
    """The k-th smallest entry (k from 1) of all tensors together, and how many are strictly below it.

    Args:
        scores: name -> non-negative tensor, on any devices; compared in fp32; +inf counts as the largest.
        k: 1 … number of entries.
        group: the scores of all its ranks count together, each rank giving its own ``scores``, none twice, and the
            same ``k``. All ranks get the same result, and all raise if one must.

    Raises:
        TalosError: no entry, k out of range, NaN or a negative score; names the tensor.
    """
    threshold = _threshold(scores, k, group)
    return threshold.value, threshold.below


def select_extreme(
    scores: Mapping[str, Tensor],
    k: int,
    keep: Literal["lowest", "highest"] = "lowest",
    group: dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Bool tensors with exactly k entries True: those with the lowest (highest) scores over all tensors.

    Ties at the threshold go to the earlier rank, there to the earlier tensor (in mapping order), and inside a tensor to
    the earlier entry. So ranks that hold the tensors of one mapping in its order select what one process would.

    Args:
        scores, k, group: as for `kth_smallest`; ``k`` counts over all ranks.
        keep: which end.

    Raises:
        TalosError: as `kth_smallest`.
    """
    lowest = keep == "lowest"
    threshold = _threshold(scores, k, group, from_top=not lowest)
    beyond = threshold.below if lowest else threshold.total - threshold.below - threshold.tied
    room = max(0, k - beyond - _sum_of_earlier_ranks(threshold.own_tied, group))
    selected = {}
    for name, score in scores.items():
        selected[name], room = _select(score, threshold.value, lowest, room)
    return selected


def _select(score: Tensor, threshold: float, lowest: bool, room: int) -> tuple[Tensor, int]:
    """What of one tensor is selected, the first ``room`` ties included, and how much room is left."""
    chosen = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    for values, mask in zip(_chunks(score), chosen.view(-1).split(_CHUNK), strict=True):
        torch.lt(values, threshold, out=mask) if lowest else torch.gt(values, threshold, out=mask)
        if room > 0:
            ties = values == threshold
            count = int(ties.sum())
            if count <= room:
                mask |= ties
            else:
                mask[ties.nonzero()[:room, 0]] = True
            room -= min(count, room)
    return chosen, room


def _chunks(score: Tensor) -> Iterator[Tensor]:
    """The entries in fp32, in order, without a copy of more than one chunk of a contiguous tensor."""
    return (chunk.float() for chunk in score.detach().reshape(-1).split(_CHUNK))


def _threshold(
    scores: Mapping[str, Tensor], k: int, group: dist.ProcessGroup | None, from_top: bool = False
) -> _Threshold:
    prefix, below, total, own, rank = 0, 0, 0, torch.empty(0, device="cpu"), k
    for digit, bits in enumerate(DIGITS):
        own = _histogram(scores, digit, prefix)
        counts = _sum_over_ranks(own, group)
        if digit == 0:
            total = int(counts[:BINS].sum())
            if counts[BINS] > 0:
                raise TalosError(_what_is_invalid(scores))
            if not 1 <= k <= total:
                raise TalosError(f"cannot take the {k}-th smallest of {total} scores; calibrate at least one parameter")
            rank = total - k + 1 if from_top else k
        cumulative = counts[:BINS].cumsum(0)
        value = int(torch.searchsorted(cumulative, rank - below))
        tied, own_tied = int(counts[value]), int(own[value])
        below += int(cumulative[value]) - tied
        prefix = prefix << bits | value
    threshold = torch.tensor([prefix], dtype=torch.int32, device="cpu").view(torch.float32)
    return _Threshold(float(threshold), total, below, tied, own_tied)


def _histogram(scores: Mapping[str, Tensor], digit: int, prefix: int) -> Tensor:
    """Of all tensors of this rank, on the CPU."""
    devices = {score.device for score in scores.values()}
    counts = {device: torch.zeros(COUNTS, dtype=torch.int64, device=device) for device in devices}
    for score in scores.values():
        whole = score.dtype is torch.float32 and score.is_contiguous()
        for values in [score.detach()] if whole else _chunks(score):
            torch.ops.talos_fast.radix_histogram_(counts[score.device], values, digit, prefix)
    return sum((own.cpu() for own in counts.values()), start=torch.zeros(COUNTS, dtype=torch.int64, device="cpu"))


def _what_is_invalid(scores: Mapping[str, Tensor]) -> str:
    names = [name for name, score in scores.items() if not all(bool((chunk >= 0).all()) for chunk in _chunks(score))]
    whose = f"of {names[0]!r}" if names else "on another rank"
    return f"the scores {whose} hold NaN or negative entries; they must be sums of squares; did gradients overflow?"


def _sum_over_ranks(counts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return counts
    total = counts.to(_device_of(group), copy=True)
    dist.all_reduce(total, group=group)
    return total.cpu()


def _sum_of_earlier_ranks(count: int, group: dist.ProcessGroup | None) -> int:
    if group is None:
        return 0
    own = torch.tensor([count], device=_device_of(group))
    everybody = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everybody, own, group=group)
    return sum(int(one) for one in everybody[: dist.get_rank(group)])


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """Where the group's backend takes tensors."""
    on_cuda = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
