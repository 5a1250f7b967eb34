"""Context managers that put a model back on exit: its modes, its parameters, or everything but its parameters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from talos_fast.gradient_checkpointing import lean_checkpointing
from talos_fast.interrupt import uninterrupted


@contextmanager
def restoring_modes(model: nn.Module) -> Iterator[None]:
    """Restores on exit which modules train and which evaluate.

    By `train`, which some modules override to fold weights into others, as LoRA layers do; then flag by flag.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        with uninterrupted():
            for module, training in modes.items():
                if module.training != training:
                    module.train(training)
            for module, training in modes.items():
                module.training = training


@contextmanager
def restoring_parameters(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Restores on exit the very bits of the parameters, whatever happened to them; a copy waits on the CPU."""
    originals = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}
    try:
        yield
    finally:
        with uninterrupted(), torch.no_grad():
            for name, p in parameters.items():
                p.copy_(originals[name])


@contextmanager
def restoring_all_but_parameters(model: nn.Module) -> Iterator[None]:
    """Enables gradients and clears existing ones; on exit clears them again, and restores flags, modes and buffers.

    A vector holds parameters only: if buffers moved, base + vector would not be the trained model. Meanwhile gradient
    checkpointing is lean.
    """
    flags = {p: p.requires_grad for p in model.parameters()}
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    copies = {buffer: buffer.detach().clone() for _, _, buffer in buffers if buffer is not None}
    for p in flags:
        p.grad = None
    try:
        with restoring_modes(model), torch.inference_mode(False), torch.enable_grad(), lean_checkpointing(model):
            yield
    finally:
        with uninterrupted():
            for p, flag in flags.items():
                p.requires_grad_(flag)
                p.grad = None
            for module, name, buffer in buffers:
                module._buffers[name] = buffer
            for buffer, before in copies.items():
                if before.layout is not torch.strided or not torch.equal(buffer, before):
                    buffer.data = before  # not copy_: it may have been resized, or be expanded
