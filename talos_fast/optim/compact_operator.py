"""The operator ``talos_fast::compact_gradient_``: its reference in plain torch, and what runs on each device."""

import importlib
import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from talos_fast import ops
from talos_fast.optim.operator import _places
from talos_fast.optim.plan import Selection

_SCHEMA = "compact_gradient_(Tensor(a!) compact, Tensor grad, Tensor work, Tensor? index, *, bool accumulate) -> ()"


def compact_gradient_reference(
    compact: Tensor, grad: Tensor, work: Tensor, index: Tensor | None, *, accumulate: bool
) -> None:
    """Writes the selected entries of ``grad`` to ``compact``, or adds them to what it holds.

    Args:
        compact: (entries,) float32, float64 for float64 gradients, contiguous.
        grad: contiguous, any shape: float32, float64, bfloat16 or float16.
        work, index: those of `talos_fast.optim.plan.Selection`.
        accumulate: whether to add.
    """
    entries = grad.view(-1)[_places(work, index)].to(compact.dtype)
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
    with torch.cuda.device(grad.device):
        _launcher()(compact, grad, work, index, accumulate=accumulate)


@cache
def _launcher() -> Callable[..., None]:
    """The Triton kernel's, or, said once, the reference."""
    try:
        launch: Callable[..., None] = importlib.import_module("talos_fast.kernels.compact").launch
    except ImportError as error:
        logging.getLogger("talos_fast").warning(
            "talos_fast compacts gradients in plain torch on CUDA, more slowly: Triton cannot be imported (%s)", error
        )
        return compact_gradient_reference
    return launch


def _fake(compact: Tensor, *_args: object, **_kwargs: object) -> None:
    """Nothing comes out: the operator writes in place."""


_library = torch.library.Library("talos_fast", "FRAGMENT")
if ops.backend("cpu") == "torch":
    _library.define(_SCHEMA)
_library.impl("compact_gradient_", compact_gradient_reference, "CompositeExplicitAutograd")
_library.impl("compact_gradient_", _on_cuda, "CUDA")
torch.library.register_fake("talos_fast::compact_gradient_", _fake, lib=_library)
