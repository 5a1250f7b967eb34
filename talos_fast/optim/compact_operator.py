"""The operator ``talos_fast::compact_gradient_``: its reference in plain torch, and what runs on each device."""

import torch
from torch import Tensor

from talos_fast import ops
from talos_fast.optim.selection import Selection, places

_SCHEMA = "compact_gradient_(Tensor(a!) compact, Tensor grad, Tensor work, Tensor? index, *, bool accumulate) -> ()"


def compact_gradient_reference(
    compact: Tensor, grad: Tensor, work: Tensor, index: Tensor | None, *, accumulate: bool
) -> None:
    """Writes the selected entries of ``grad`` to ``compact``, or adds them to what it holds.

    Args:
        compact: (entries,) float32, float64 for float64 gradients, contiguous.
        grad: contiguous, any shape: float32, float64, bfloat16 or float16.
        work, index: those of `talos_fast.optim.selection.Selection`.
        accumulate: whether to add.
    """
    entries = grad.view(-1)[places(work, index)].to(compact.dtype)
    if accumulate:
        compact.add_(entries)
    else:
        compact.copy_(entries)


def gather_selected(grad: Tensor, selection: Selection, into: Tensor | None = None) -> Tensor:
    """The selected entries of a dense gradient, (entries,) in memory order; added to ``into`` if that is given."""
    ordered = grad.detach().permute(selection.order).contiguous()
    add = into is not None
    if into is None:
        wide = torch.promote_types(grad.dtype, torch.float32)
        into = grad.new_empty(selection.count, dtype=wide)
    torch.ops.talos_fast.compact_gradient_(into, ordered, selection.work, selection.index, accumulate=add)
    return into


def _on_cuda(compact: Tensor, grad: Tensor, work: Tensor, index: Tensor | None, *, accumulate: bool) -> None:
    kernels = ops.triton_kernels("compact", "talos_fast compacts gradients")
    launch = compact_gradient_reference if kernels is None else kernels.launch
    with torch.cuda.device(grad.device):
        launch(compact, grad, work, index, accumulate=accumulate)


ops.register(_SCHEMA, compact_gradient_reference)
ops.library.impl("compact_gradient_", _on_cuda, "CUDA")
