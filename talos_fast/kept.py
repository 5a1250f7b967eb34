"""`kept`: a model that trains for a while, and is otherwise as it was afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from talos_fast.gradient_checkpointing import lean_checkpointing


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Gradients are on, and there are none of before; afterwards none, and flags, modes and buffers are brought back.

    A vector holds parameters only: with buffers that moved base + vector would not be the trained model. Meanwhile
    gradient checkpointing is lean.
    """
    flags = {p: p.requires_grad for p in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in modes for name, buffer in module._buffers.items() if buffer is not None
    ]  # fmt: skip
    for p in flags:
        p.grad = None
    try:
        with torch.inference_mode(False), torch.enable_grad(), lean_checkpointing(model):
            yield
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
            p.grad = None
        for module, training in modes.items():
            module.training = training
        for module, name, buffer, before in buffers:
            module._buffers[name] = buffer
            if not torch.equal(buffer, before):
                buffer.data = before  # not copy_: it may have been resized, or be expanded
