"""Reading and writing a tensor at flat positions, whatever its strides."""

import torch
from torch import Tensor


def index_dtype(numel: int) -> torch.dtype:
    """int32 while it can address every entry: half the memory of int64."""
    return torch.int32 if numel < 2**31 else torch.int64


def flat_indices(mask: Tensor) -> Tensor:
    """The flat, ascending C-order positions of the True entries of a bool tensor, in the narrowest index dtype."""
    return mask.reshape(-1).nonzero()[:, 0].to(index_dtype(mask.numel()))


def support(indices: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `flat_indices`: the bool tensor, on the CPU, that is True at ``indices`` (everywhere if None)."""
    mask = torch.zeros(shape, dtype=torch.bool, device="cpu")
    mask.view(-1)[slice(None) if indices is None else indices] = True
    return mask


def gather(tensor: Tensor, indices: Tensor | None) -> Tensor:
    """A copy of the entries at flat C-order ``indices`` (all of them if None), whatever the strides."""
    if indices is None:
        return tensor.reshape(-1).clone()
    if tensor.is_contiguous():
        return tensor.view(-1)[indices]
    return tensor[torch.unravel_index(indices.long(), tensor.shape)]


def scatter_(tensor: Tensor, indices: Tensor | None, values: Tensor) -> None:
    """Writes ``values`` at flat C-order ``indices`` (everywhere if None), in place, whatever the strides."""
    if indices is None:
        tensor.copy_(values.view(tensor.shape))
    elif tensor.is_contiguous():
        tensor.view(-1)[indices] = values
    else:
        tensor[torch.unravel_index(indices.long(), tensor.shape)] = values
