"""The tables of the Triton step: which block of which tensor a program takes, and where everything lies.

Their layout is that of `talos_fast.kernels.masked_adam`. A block costs a row of 32 bytes, as in the work table of a
selection. On top of its bits come the counts of the selected entries before every 32 elements of a tile, 2 bytes for
each 4 of bits. They spare the kernel a scan over the tile, which would go through shared memory.
"""

import torch
from torch import Tensor

from talos_fast.optim.selection import BLOCK
from talos_fast.optim.state import MOMENTS, Member

ENCODINGS = ("runs", "bits", "offsets")
_WORD = 32
_COUNTS = 1 << 16  # above any count of a block: counts are in the low 16 bits, tensor numbers above them


def block_rows(number: int, member: Member) -> Tensor:
    """(blocks, 4) int64: ``number * 65536 + count``, first element, place in the index, first compact entry."""
    if member.selection is not None:
        work = member.selection.work
        return torch.cat([number * _COUNTS + work[:, 3:], work[:, :3]], 1)
    numel = member.parameter.numel()
    starts = torch.arange(0, numel, BLOCK)
    counts = (numel - starts).clamp(max=BLOCK)
    return torch.stack([number * _COUNTS + counts, starts, torch.zeros_like(starts), starts], 1)


def word_ranks(bits: Tensor) -> Tensor:
    """(words,) int16: the selected entries of a tile before each of its words; ``bits`` as in a selection."""
    ones = (torch.arange(256, device=bits.device).unsqueeze(1) >> torch.arange(8, device=bits.device) & 1).sum(1)
    words = ones[bits.int()].view(-1, BLOCK // _WORD, _WORD // 8).sum(2)
    return (words.cumsum(1) - words).to(torch.int16).view(-1)


def addresses(member: Member, index: Tensor | None, ranks: Tensor | None) -> list[int]:
    """One row of the table; 0 stands for what the member does not have."""
    encoding = "runs" if member.selection is None else member.selection.encoding
    state = [member.state.get(name) for name in (*MOMENTS, "master", "step")]
    tensors = [member.parameter, *state, index, ranks]
    return [*(0 if tensor is None else tensor.data_ptr() for tensor in tensors), ENCODINGS.index(encoding)]


def in_memory_order(gradient: Tensor, member: Member) -> Tensor:
    """The gradient laid out as its parameter: itself where it is; compact gradients are in that order already."""
    if gradient.dim() != member.parameter.dim():
        return gradient.contiguous()
    return gradient.permute(member.order).contiguous()
