"""Gradient compaction: hooks that keep of each gradient, as soon as it is complete, its selected entries only."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from talos_fast.optim.compact_gradient import CompactGradient
from talos_fast.optim.selection import Selection

Entries = Literal["all", "selected"]


class Compaction:
    """The hooks on the masked parameters; what `MaskedAdam.compact_gradients` returns.

    After a backward pass ``p.grad`` is a `CompactGradient`; each dense one is freed before the next layer's is made.
    Where the gradient comes from `SelectedRows` there is no dense one at all: it reaches the entries through a
    *carrier*, a leaf of (entries,) that stands for the parameter in the graph and owns no memory.

    Args:
        selections: the masked parameters, and which of their entries are kept.
        norm: "all" also keeps the norm of each whole gradient, which costs one pass over it.
        accumulate: under "all", how many backward passes add up to one gradient.

    Attributes:
        active: whether gradients are compacted; one may turn it off and on again between backward passes.
        removed: whether `remove` ended it.
        carriers: parameter -> its carrier.
    """

    def __init__(self, selections: Mapping[Tensor, Selection], norm: Entries, accumulate: int) -> None:
        self.norm, self.accumulate, self.active, self.removed = norm, accumulate, True, False
        self._passes: dict[Tensor, int] = {}
        self._handles: list[RemovableHandle] = []
        self.carriers: dict[Tensor, Tensor] = {}
        self.attach(selections)

    def attach(self, selections: Mapping[Tensor, Selection]) -> None:
        """Puts the hooks on these parameters, and takes those of before away."""
        self._detach()
        for p, selection in selections.items():
            self._handles.append(_hooked(p, partial(self._keep, selection)))
            # Whole gradients that are never made have no norm.
            if self.norm == "selected" and selection.count:
                self.carriers[p] = self._carrier(p, selection)

    def _carrier(self, p: Tensor, selection: Selection) -> Tensor:
        wide = torch.promote_types(p.dtype, torch.float32)
        carrier = torch.zeros(1, dtype=wide, device=p.device).expand(selection.count).requires_grad_()

        def deliver(carrier: Tensor) -> None:
            values, carrier.grad = carrier.grad, None
            assert values is not None
            if p.grad is None:
                p.grad = CompactGradient(p, selection, values)
                return
            if not isinstance(p.grad, CompactGradient):
                p.grad = CompactGradient.of(p, selection, p.grad, keep_norm=False)
            p.grad.require(selection)
            p.grad.add_values(values)

        self._handles.append(carrier.register_post_accumulate_grad_hook(deliver))
        return carrier

    def _keep(self, selection: Selection, p: Tensor) -> None:
        """The hook: of a gradient that is complete, the selected entries."""
        if not self.active or p.grad is None or p.grad.is_sparse:  # the step refuses sparse ones, in torch's words
            return
        if isinstance(p.grad, CompactGradient):
            p.grad.require(selection)
        elif self.norm == "selected" or self._is_last_pass(p):
            p.grad = CompactGradient.of(p, selection, p.grad, self.norm == "all")

    def _is_last_pass(self, p: Tensor) -> bool:
        # The norm of a sum needs all entries of every term, so they stay until the sum is complete.
        self._passes[p] = (self._passes.get(p, 0) + 1) % self.accumulate
        return self._passes[p] == 0

    @property
    def keeps_sums_whole(self) -> bool:
        """Whether gradients stay dense until the last of several passes."""
        return self.norm == "all" and self.accumulate > 1

    def restart(self) -> None:
        """Counts backward passes anew: a step was taken, or gradients were given up."""
        self._passes.clear()

    def remove(self) -> None:
        """Takes the hooks away for good; gradients that are compact stay so until they are set to None."""
        self.removed = True
        self._detach()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.carriers.clear()
        self._passes.clear()


def _hooked(p: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Registers the hook; torch refuses it on a parameter that is frozen now, but may train later."""
    trains = p.requires_grad
    handle: RemovableHandle = p.requires_grad_().register_post_accumulate_grad_hook(hook)
    p.requires_grad_(trains)
    return handle
