"""Clipping by the global norm without a pass of its own: a norm now, one divisor in the step that follows."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from talos_fast.errors import TalosError
from talos_fast.optim.compact_gradient import CompactGradient
from talos_fast.optim.compact_operator import gather_selected
from talos_fast.optim.selection import Selection


class Clip(NamedTuple):
    """A norm, 0-d, and the largest that the next step may take."""

    norm: Tensor
    max_norm: float

    def divisor(self, grad_scale: Tensor | float | None) -> Tensor:
        """What the step divides its gradients by, 0-d, at least 1; ``grad_scale`` is what they are multiplied by.

        The 1e-6 is that of `torch.nn.utils.clip_grad_norm_`.
        """
        if isinstance(grad_scale, Tensor):  # a scaler has it where its first output was, not where gradients are
            grad_scale = grad_scale.to(self.norm.device)
        norm = self.norm if grad_scale is None else self.norm / grad_scale
        return ((norm + 1e-6) / self.max_norm).clamp(min=1.0)


def check_clip(max_norm: float, entries: str) -> None:
    """Refuses what cannot be clipped to.

    Raises:
        TalosError: a negative or NaN ``max_norm``, or ``entries`` other than "all" and "selected".
    """
    if not max_norm >= 0:
        raise TalosError(f"max_norm={max_norm}: the largest norm must be zero or positive")
    if entries not in ("all", "selected"):
        raise TalosError(f"entries={entries!r}: choose 'all' or 'selected'")


def total_norm(
    parameters: Iterable[Tensor], selections: Mapping[Tensor, Selection], entries: str, error_if_nonfinite: bool
) -> Tensor:
    """The 2-norm of the gradients of ``parameters`` together, 0-d, over all their entries or the selected ones.

    Raises:
        TalosError: see `CompactGradient.measured`.
        RuntimeError: the norm is not finite and ``error_if_nonfinite``; torch's own.
    """
    measured = []
    for p in parameters:
        if isinstance(p.grad, CompactGradient):
            measured.append(p.grad.measured(entries))
        elif p.grad is not None and entries == "selected" and p in selections:
            measured.append(gather_selected(p.grad, selections[p]))
        elif p.grad is not None:
            measured.append(p.grad)
    norm = torch.nn.utils.get_total_norm(measured, error_if_nonfinite=error_if_nonfinite)
    return norm.to(torch.promote_types(norm.dtype, torch.float32))
