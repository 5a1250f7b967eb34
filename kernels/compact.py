"""The selected entries of a dense gradient, gathered or added, in one launch."""

import torch
import triton
import triton.language as tl
from talos_fast.kernels.masked_adam import BITS, OFFSETS, RUNS
from torch import Tensor

from talos_fast.optim.selection import BLOCK


@triton.jit
def compact_gradient(
    compact_ptr, grad_ptr, work_ptr, index_ptr, ENCODING: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``compact[first + i] (+)= grad[base + place(i)]`` for the entries i of one row of the work table.

    Under ``bits`` the gradient is read in order and the entries are scattered: a set bit's entry is the count of the
    set bits before it, so that nothing is decoded.
    """
    row = work_ptr + tl.program_id(0).to(tl.int64) * 4
    base, at, first, count = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    lane = tl.arange(0, BLOCK)
    if ENCODING == BITS:
        bit = (tl.load(index_ptr + at + lane // 8).to(tl.int32) >> (lane % 8)) & 1
        live, place, entry = bit != 0, lane, tl.cumsum(bit, 0) - bit
    else:
        live, place, entry = lane < count, lane, lane
        if ENCODING == OFFSETS:
            place = tl.load(index_ptr + at + lane, live, other=0).to(tl.int32) & 0xFFFF
    value = tl.load(grad_ptr + base + place, live, other=0.0).to(compact_ptr.dtype.element_ty)
    to = compact_ptr + first + entry
    if ACCUMULATE:
        value += tl.load(to, live, other=0.0)
    tl.store(to, value, live)


def encoding(index: Tensor | None) -> int:
    """What the kernel takes as ENCODING for an index of `talos_fast.optim.selection.Selection`."""
    return int((RUNS if index is None else BITS if index.dtype is torch.uint8 else OFFSETS).value)


def launch(compact: Tensor, grad: Tensor, work: Tensor, index: Tensor | None, *, accumulate: bool) -> None:
    """The operator ``talos_fast::compact_gradient_`` by the kernel; arguments as in its reference."""
    if len(work):
        compact_gradient[(len(work),)](
            compact, grad, work, work if index is None else index, encoding(index), accumulate, BLOCK=BLOCK, num_warps=8
        )
