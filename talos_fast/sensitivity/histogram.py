"""The operator ``talos_fast::radix_histogram_``: its checks, and its reference in plain torch."""

import torch
from torch import Tensor

from talos_fast import ops
from talos_fast.errors import TalosError

# Bits of the digits of a score, from the top: the sign is left out, so order of bits is order of scores.
DIGITS = (11, 10, 10)
BINS = 1 << max(DIGITS)
# The bins, and behind them the number of entries that are negative or NaN.
COUNTS = BINS + 1
_SCHEMA = "radix_histogram_(Tensor(a!) counts, Tensor scores, int digit, int prefix) -> ()"
# Entries that plain torch looks at together.
_CHUNK = 1 << 22


def radix_histogram_reference(counts: Tensor, scores: Tensor, digit: int, prefix: int) -> None:
    """Counts one digit of the bits of those scores whose digits before it are ``prefix``, into ``counts``.

    Args:
        counts: (COUNTS,) int64, added to: a count a value of the digit; for digit 0, behind them, the number of entries
            that are negative or NaN.
        scores: float32, contiguous; -0.0 counts as 0.
        digit: 0, 1 or 2, from the top.
        prefix: the digits before it, as one number; 0 for digit 0.

    Raises:
        TalosError: a dtype, shape or device that differs, or another digit.
    """
    _check(counts, scores, digit, prefix)
    below = sum(DIGITS[digit + 1 :])
    for chunk in scores.detach().reshape(-1).split(_CHUNK):
        if digit == 0:
            counts[BINS] += (~(chunk >= 0)).sum()
        bits = (chunk.view(torch.int32) & 0x7FFFFFFF) >> below
        values = bits[(bits >> DIGITS[digit]) == prefix] & ((1 << DIGITS[digit]) - 1)
        counts[:BINS] += torch.bincount(values, minlength=BINS)


def _check(counts: Tensor, scores: Tensor, digit: int, prefix: int) -> None:
    if counts.dtype is not torch.int64 or counts.numel() != COUNTS or not counts.is_contiguous():
        raise TalosError(f"counts must be {COUNTS} contiguous int64, but is {tuple(counts.shape)} of {counts.dtype}")
    if scores.dtype is not torch.float32 or not scores.is_contiguous():
        raise TalosError(f"scores must be contiguous float32, but is {scores.dtype} with strides {scores.stride()}")
    if counts.device != scores.device:
        raise TalosError(f"counts and scores must be on one device, but are on {counts.device} and {scores.device}")
    if digit not in range(len(DIGITS)):
        raise TalosError(f"digit must be 0, 1 or 2, but is {digit}")


def _in_torch(counts: Tensor, scores: Tensor, digit: int, prefix: int) -> None:
    ops.announce_fallback(scores.device.type)
    radix_histogram_reference(counts, scores, digit, prefix)


ops.register(_SCHEMA, _in_torch, _check)
