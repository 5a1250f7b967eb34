"""What `step.py` compares: optimizers over the same weights and gradients, alone and with unscaling and clipping."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rivals import OPTIONS, DenseMaskedAdamW
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from talos_fast import MaskedAdam

Tensors = Mapping[str, Tensor]


@dataclass
class Stepper:
    """An optimizer, and what is timed."""

    optimizer: Optimizer
    run: Callable[[], object]

    def state_bytes(self) -> int:
        """Bytes of the optimizer's state, with masks and indices."""
        tensors = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        if isinstance(self.optimizer, DenseMaskedAdamW):
            tensors += self.optimizer._scores.values()
        held = sum(t.nbytes for t in tensors)
        if isinstance(self.optimizer, MaskedAdam):
            held += sum(s.nbytes for s in self.optimizer._selections.values() if s.count)
        return held


def parameters(weights: Tensors, gradients: Tensors, masks: Tensors | None) -> dict[str, nn.Parameter]:
    """Parameters over the same memory for every stepper; like `finetune`, no gradient where nothing is selected."""
    found = {name: nn.Parameter(weight) for name, weight in weights.items()}
    for name, p in found.items():
        if masks is None or bool(masks[name].any()):
            p.grad = gradients[name]
    return found


def adamw(weights: Tensors, gradients: Tensors, masks: None, **flags: bool) -> Optimizer:
    """torch's AdamW on everything."""
    return AdamW(parameters(weights, gradients, None).values(), **OPTIONS, **flags)


def dense_masked(weights: Tensors, gradients: Tensors, masks: Tensors) -> Optimizer:
    """The formula of the paper's code: dense moments and scores, of everything."""
    found = parameters(weights, gradients, None)
    scores = {p: masks[name].to(p.device, p.dtype) for name, p in found.items()}
    return DenseMaskedAdamW(found.values(), scores, **OPTIONS)


def masked(weights: Tensors, gradients: Tensors, masks: Tensors) -> Optimizer:
    """Ours."""
    return MaskedAdam(parameters(weights, gradients, masks).items(), masks=masks, **OPTIONS)


def stepping(optimizer: Optimizer) -> Stepper:
    """The step alone."""
    return Stepper(optimizer, optimizer.step)


def clipping(optimizer: Optimizer) -> Stepper:
    """Unscale, clip to a norm of 1, step: ours divides in the step, torch in two passes over the gradients.

    A scale of 1 changes no gradient, so every round does the same. Ours needs no scaler to skip infinite gradients of
    bf16 or fp32, and `finetune` uses none; torch is measured with the scaler of the paper's loop.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if isinstance(optimizer, MaskedAdam):

        def clip_and_step() -> None:
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()

        return Stepper(optimizer, clip_and_step)
    device = trained[0].device
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0)
    scaler.scale(torch.zeros((), device=device))  # makes the scale

    def unscale_clip_step() -> None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update()

    return Stepper(optimizer, unscale_clip_step)


def tiny_copies(
    tensors: Tensors, masks: Tensors | None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """As many tensors, of 8 elements each: a step of those takes the time of the host."""
    small = {name: torch.zeros(8, device=t.device, dtype=t.dtype) for name, t in tensors.items()}
    flags = None if masks is None else {name: torch.arange(8) % 2 < int(mask.any()) for name, mask in masks.items()}
    return small, {name: torch.ones_like(t) for name, t in small.items()}, flags


# Name -> how it is made, whether of a mask, and fp32 copies of all parameters that it needs at most.
RIVALS: dict[str, tuple[Callable[..., Optimizer], bool, int]] = {
    "AdamW fused": (lambda *a: adamw(*a, fused=True), False, 2),
    "AdamW foreach": (lambda *a: adamw(*a, foreach=True), False, 4),
    "AdamW for-loop": (lambda *a: adamw(*a, foreach=False), False, 3),
    "dense masked AdamW": (dense_masked, True, 4),
    "MaskedAdam": (masked, True, 1),
}
