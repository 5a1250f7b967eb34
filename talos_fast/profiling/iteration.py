"""One training iteration as `finetune` runs it, phase by phase."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from talos_fast.forward import Batch, checked_logits
from talos_fast.methods import Setup
from talos_fast.methods.base import Deltas
from talos_fast.profiling.measure import Mark
from talos_fast.train import Loss


def without_export(setup: Setup) -> Setup:
    """The setup without its copy of the start, which only the vector at the end is made of."""

    def export() -> Deltas:
        raise RuntimeError("this setup was made to be measured")

    return replace(setup, export=export)


class FinetuneIteration:
    """What the trainer does with one batch.

    Several iterations may share a model: each one's ``requires_grad`` flags are those of the moment it was made.
    """

    def __init__(
        self, setup: Setup, model: nn.Module, batch: Batch, loss: Loss, clip: float | None, bf16: bool
    ) -> None:
        self.setup, self._model, self._batch, self._loss, self._clip = setup, model, batch, loss, clip
        self._parameters = list(setup.trained.values())
        device = self._parameters[0].device
        self._autocast: Any = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
        self._flags: Mapping[nn.Parameter, bool] = {p: p.requires_grad for p in model.parameters()}

    def prepare(self) -> None:
        """Freezes and thaws the shared model for this iteration."""
        for p, flag in self._flags.items():
            p.requires_grad_(flag)

    def forward_loss(self) -> Tensor:
        """The scalar loss of the batch."""
        with self._autocast:
            logits, labels = checked_logits(self.setup.forward, self._model, self._batch, "the batch")
            return self._loss(logits.float() if logits.dtype != torch.float64 else logits, labels)

    def run(self, mark: Mark) -> None:
        """One iteration; see `Iteration`."""
        loss = self.forward_loss()
        loss.backward()
        mark()
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip)
        mark()
        self.setup.optimizer.step()
        mark()
        self.setup.optimizer.zero_grad(set_to_none=True)
        mark()
