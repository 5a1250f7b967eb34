"""Gradient compaction: hooks that keep of each gradient, as soon as it is complete, its selected entries only."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from talos_fast.optim.compact_gradient import CompactGradient
from talos_fast.optim.plan import Selection

Entries = Literal["all", "selected"]


class Compaction:
    """The hooks on the masked parameters; what `MaskedAdam.compact_gradients` returns.

    After a backward pass ``p.grad`` is a `CompactGradient`; the dense one is freed when the next layer's is not yet
    made. Where the gradient comes from `SelectedRows` there is no dense one at all: it reaches the entries through a
    *carrier*, a leaf of (entries,) that stands for the parameter in the graph and owns no memory.

    Args:
        selections: the masked parameters, and which of their entries are kept.
        norm: "all" also keeps the norm of each whole gradient, which costs one pass over it.
    """

    def __init__(self, selections: Mapping[Tensor, Selection], norm: Entries) -> None:
        self.norm = norm
        self._handles: list[RemovableHandle] = []
        self.carriers: dict[Tensor, Tensor] = {}
        for p, selection in selections.items():
            self._handles.append(p.register_post_accumulate_grad_hook(_keeper(selection, norm == "all")))
            # Whole gradients that are never made have no norm.
            if norm == "selected" and selection.count:
                self.carriers[p] = self._carrier(p, selection)

    def _carrier(self, p: Tensor, selection: Selection) -> Tensor:
        wide = torch.promote_types(p.dtype, torch.float32)
        carrier = torch.zeros(1, dtype=wide, device=p.device).expand(selection.count).requires_grad_()
        keep = _keeper(selection, keep_norm=False)

        def deliver(carrier: Tensor) -> None:
            values, carrier.grad = carrier.grad, None
            assert values is not None
            keep(p)
            if isinstance(p.grad, CompactGradient):
                p.grad.add_values(values)
            else:
                p.grad = CompactGradient(p, selection, values)

        self._handles.append(carrier.register_post_accumulate_grad_hook(deliver))
        return carrier

    def remove(self) -> None:
        """Takes the hooks away; gradients that are compact stay so until they are set to None."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.carriers.clear()


def _keeper(selection: Selection, keep_norm: bool) -> Callable[[Tensor], None]:
    def keep(p: Tensor) -> None:
        if isinstance(p.grad, CompactGradient):
            p.grad.require(selection)
        elif p.grad is not None and not p.grad.is_sparse:  # the step refuses sparse ones, in torch's words
            p.grad = CompactGradient.of(p, selection, p.grad, keep_norm)

    return keep
