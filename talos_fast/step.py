"""`Step`: one optimizer step, phase by phase. The trainer takes it, the profiler times it."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from talos_fast.arguments import number
from talos_fast.batch import Batch, differentiable, to_device
from talos_fast.cast_once import CastOnce
from talos_fast.errors import TalosError
from talos_fast.forward import check_facts, logits_facts, logits_of
from talos_fast.methods import Setup
from talos_fast.optim.compact_gradient import CompactGradient
from talos_fast.ranks import Ranks
from talos_fast.watch import Watch

Loss = Callable[[Tensor, Tensor], Tensor]
Amp = Literal["auto", "bf16", "off"]

# Notes that may be unread on CUDA: a step makes two or three, so the host runs at most two steps ahead.
LAG = 4


def require_amp_and_clip(amp: Amp, clip: float | None) -> None:
    """Refuses what `Step` would misunderstand.

    Raises:
        TalosError: names the argument.
    """
    if amp not in get_args(Amp):
        raise TalosError(f"amp={amp!r}: choose 'auto', 'bf16' or 'off'")
    if clip is not None and not number("clip", clip) > 0:
        raise TalosError(
            f"clip={clip}: the largest gradient norm must be positive; None (a command's 0) is no clipping"
        )


def autocasts(amp: Amp, parameter: Tensor) -> bool:
    """Whether a model of such parameters runs under bf16 autocast."""
    return amp == "bf16" or (amp == "auto" and parameter.is_cuda and parameter.dtype is torch.float32)


class Step:
    """Forward and backward of one batch or several, clipping, and the update.

    A bad batch (labels out of range; NaN or infinite logits, loss or gradient) is reported by name and changes no
    parameter: on the CPU it is found before the update, on CUDA the optimizer skips it on the device and every later
    step with it, and the host hears of it at most two steps later, without having waited.

    A CUDA graph may hold all of it, if the optimizer is capturable. Eager gradient checkpointing must then be told
    ``preserve_rng_state=False``, beside ``use_reentrant=False``, since torch reads no generator in a capture; the model
    must have no dropout, which would be drawn anew.

    Args:
        setup: what trains.
        model: passed to the setup's forward.
        loss: ``loss(logits, labels) -> scalar``.
        clip: largest gradient norm, or None.
        accumulate: batches an update; each loss is divided by it.
        amp: bf16 autocast; see `autocasts`.
        lag: see `Watch`; default: 0 on the CPU or if the optimizer cannot skip a step on the device.

    Attributes:
        last_loss: of the last batch, shape (), on the device.
    """

    def __init__(
        self, setup: Setup, model: nn.Module, loss: Loss, *, clip: float | None, accumulate: int = 1,
        amp: Amp = "auto", lag: int | None = None,
    ) -> None:  # fmt: skip
        self._setup, self._model, self._loss = setup, model, loss
        self._clip, self._accumulate = math.inf if clip is None else clip, accumulate
        self._parameters = list(setup.trained.values())
        self.device = self._parameters[0].device
        bf16 = autocasts(amp, self._parameters[0])
        self._autocast: Any = torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()
        self._casts: Any = CastOnce(model, torch.bfloat16, setup.fixed) if bf16 else nullcontext()
        self._skips = bool(getattr(setup.optimizer, "_step_supports_amp_scaling", False))
        if lag is None:
            lag = LAG if self.device.type == "cuda" and self._skips else 0
        self.watch = Watch(self.device, lag)
        self.last_loss: Tensor

    def forward_loss(self, batch: Batch, where: str) -> Tensor:
        """The scalar loss of a batch; ``where`` names it in errors."""
        batch = differentiable(to_device(batch, self.device))
        with self._autocast:
            logits, labels = logits_of(self._setup.forward, self._model, batch, where)
            classes = logits.shape[1]
            wide = logits if logits.dtype == torch.float64 else logits.float()
            # A label out of range is reported below; it must not stop the device before that.
            loss = self._loss(wide, labels.clamp(0, classes - 1))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"has shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"is a {type(loss).__name__}"
            raise TalosError(f"{where}: the loss {found}; give a tensor of one number")
        self.last_loss = loss.detach().reshape(())
        facts = torch.cat([logits_facts(wide.detach(), labels), self.last_loss.reshape(1)])
        low, high, finite, value = facts
        sound = (low >= 0) & (high < classes) & finite.bool() & value.isfinite()

        def check(found: list[float]) -> None:
            check_facts(found[:3], classes, where)
            if not math.isfinite(found[3]):
                raise TalosError(f"{where}: the loss is {found[3]}; the step was not taken")

        self.watch.note(facts, ~sound, check)
        if not loss.requires_grad:
            raise TalosError(
                f"{where}: the loss depends on nothing that trains; the forward does not use it, or runs it in a "
                "reentrant checkpoint, where use_reentrant=False is needed"
            )
        return loss

    def backward(self, batch: Batch, where: str) -> None:
        """Adds the gradients of one batch."""
        with self._casts, self._setup.around():
            loss = self.forward_loss(batch, where)
            (loss / self._accumulate if self._accumulate > 1 else loss).backward()

    def share(self, ranks: Ranks, where: str) -> None:
        """Averages the gradients over the ranks, of masked parameters the selected entries; a bad batch is bad for all.

        Raises:
            TalosError: not the same parameters have gradients on all ranks.
        """
        if ranks.world == 1:
            return
        # Sparse ones are refused by the optimizer.
        found = {name: p.grad for name, p in self._setup.trained.items()}
        gradients = {name: grad for name, grad in found.items() if grad is not None and not grad.is_sparse}
        if not ranks.same(list(gradients)):
            raise TalosError(
                f"{where}: not the same parameters have gradients on all ranks; each must use the same in its forward"
            )
        bad = self.watch.found_inf
        values = [grad.values if isinstance(grad, CompactGradient) else grad for grad in gradients.values()]
        ranks.average([*values, bad])
        bad.copy_(bad > 0)

        def check(found: list[float]) -> None:
            if found[0]:
                raise TalosError(f"{where}: the batch of another rank is bad, and the step was not taken")

        self.watch.note(bad.reshape(1).clone(), bad, check)

    def clip(self, where: str, then: Callable[[], None] | None = None) -> None:
        """Brings the norm of all gradients below the limit; ``then`` is called when the step is known to be good."""
        limit = self._setup.clip or partial(nn.utils.clip_grad_norm_, self._parameters)
        norm = limit(self._clip)

        def check(found: list[float]) -> None:
            if not math.isfinite(found[0]):
                raise TalosError(f"{where}: the norm of the gradient is {found[0]}; the step was not taken")

        self.watch.note(norm.detach().reshape(1), ~norm.isfinite(), check, then)

    def update(self, lr: float | Tensor) -> None:
        """One step of the optimizer, which skips it if the watch has seen a bad one.

        Args:
            lr: the learning rate; in a CUDA graph a tensor of shape () on the device, to be filled between replays.
        """
        optimizer: Any = self._setup.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        if not self._skips:
            optimizer.step()
            return
        optimizer.found_inf = self.watch.found_inf
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf

    def release(self) -> None:
        """Gives the memory of the gradients back."""
        self._setup.optimizer.zero_grad(set_to_none=True)
