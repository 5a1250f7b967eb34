"""The k-th smallest of all scores, exactly, over a list of tensors that is never concatenated.

Non-negative floats are ordered like their bits, so two passes of a 65,536-bin histogram, over the upper and then the
lower half of the 32 bits, find the threshold; memory is one temporary of the largest tensor.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from talos_fast.errors import TalosError

BINS = 1 << 16


def _bits(score: Tensor) -> Tensor:
    """The bits of fp32 scores, as non-negative int32; -0.0 becomes 0.0."""
    return (score.detach().reshape(-1).float() + 0.0).view(torch.int32)


def _histogram(bits: Tensor) -> Tensor:
    return torch.bincount(bits, minlength=BINS).cpu()


def kth_smallest(scores: Mapping[str, Tensor], k: int) -> tuple[float, int]:
    """The k-th smallest entry (k from 1) of all tensors together, and how many are strictly below it.

    Args:
        scores: name -> non-negative tensor; compared in fp32; +inf is allowed (never wanted).
        k: 1 … number of entries.

    Raises:
        TalosError: no entry, k out of range, NaN or a negative score; names the tensor.
    """
    total = sum(score.numel() for score in scores.values())
    if not 1 <= k <= total:
        raise TalosError(f"cannot take the {k}-th smallest of {total} scores; calibrate at least one parameter")
    coarse = torch.zeros(BINS, dtype=torch.int64)
    for name, score in scores.items():
        if not bool((score >= 0).all()):
            raise TalosError(f"the scores of {name!r} hold NaN or negative entries; they must be sums of squares")
        coarse += _histogram(_bits(score) >> 16)
    cumulative = coarse.cumsum(0)
    high = int(torch.searchsorted(cumulative, k))
    below = int(cumulative[high] - coarse[high])
    fine = torch.zeros(BINS, dtype=torch.int64)
    for score in scores.values():
        bits = _bits(score)
        fine += _histogram(bits[(bits >> 16) == high] & (BINS - 1))
    cumulative = fine.cumsum(0)
    low = int(torch.searchsorted(cumulative, k - below))
    below += int(cumulative[low] - fine[low])
    threshold = torch.tensor([(high << 16) | low], dtype=torch.int32).view(torch.float32)
    return float(threshold), below


def select_extreme(
    scores: Mapping[str, Tensor], k: int, keep: Literal["lowest", "highest"] = "lowest"
) -> dict[str, Tensor]:
    """Bool tensors with exactly k entries True: those with the lowest (highest) scores over all tensors.

    Ties at the threshold go to the earlier tensor (in mapping order) and, inside a tensor, to the earlier entry.

    Raises:
        TalosError: as `kth_smallest`.
    """
    total = sum(score.numel() for score in scores.values())
    lowest = keep == "lowest"
    threshold, below = kth_smallest(scores, k if lowest else total - k + 1)
    tied = sum(int((score.float() == threshold).sum()) for score in scores.values())
    room = k - below if lowest else k - (total - below - tied)
    selected = {}
    for name, score in scores.items():
        score = score.float()
        chosen = (score < threshold) if lowest else (score > threshold)
        ties = (score == threshold).reshape(-1).nonzero()[:, 0][:room]
        chosen.view(-1)[ties] = True
        room -= len(ties)
        selected[name] = chosen
    return selected
