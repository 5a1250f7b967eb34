"""One training iteration as `finetune` runs it, phase by phase."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace

from torch import Tensor, nn

from talos_fast.batch import Batch
from talos_fast.methods import Setup
from talos_fast.methods.base import Deltas
from talos_fast.profiling.work import Work, count_work
from talos_fast.step import Amp, Loss, Step

LR = 1e-5

PHASES = ("forward_backward", "clip", "step", "release")
"""What an iteration consists of. "clip" is everything between the backward pass and the optimizer's step: unscaling the
gradients where there is a scaler, their norm, and bringing it below its limit. "release" gives the gradients' memory
back; it is counted to the forward and backward pass, which asked for it."""

Mark = Callable[[], None]


def without_export(setup: Setup) -> Setup:
    """The setup without its copy of the start, which only the vector at the end is made of."""

    def export() -> Deltas:
        raise RuntimeError("this setup was made to be measured")

    return replace(setup, export=export)


class FinetuneIteration:
    """What the trainer does with one batch.

    Several iterations may share a model: each one's ``requires_grad`` flags are those of the moment it was made.
    """

    def __init__(self, setup: Setup, model: nn.Module, batch: Batch, loss: Loss, clip: float | None, amp: Amp) -> None:
        self.setup, self._batch, self._clip = setup, batch, clip
        self._step = Step(setup, model, loss, clip=clip, amp=amp)
        self._named: dict[str, Tensor] = dict(model.named_parameters())
        self._flags: Mapping[nn.Parameter, bool] = {p: p.requires_grad for p in model.parameters()}

    def prepare(self) -> None:
        """Freezes and thaws the shared model for this iteration."""
        for p, flag in self._flags.items():
            p.requires_grad_(flag)

    def forward_loss(self) -> Tensor:
        """The scalar loss of the batch."""
        return self._step.forward_loss(self._batch, "the batch")

    def work(self, masks: Mapping[str, Tensor] | None = None) -> Work:
        """What it must compute; forward must not be compiled, since nothing can be counted inside.

        A linearized model's products with directions are not told from those with activations: all that its backward
        pass computes counts as gradients of activations.
        """
        self.prepare()
        known = set(self._named.values())
        held = (*self.setup.trained.values(), *self.setup.fixed)  # directions, factors and the start are no activations
        named = self._named | {str(number): t for number, t in enumerate(held) if t not in known}
        linearized = self.setup.info.get("linearized")
        with self.setup.around() if linearized else nullcontext():
            work = count_work(self.forward_loss, named, masks)
        if linearized:
            backward = work.activation_gradients + work.weight_gradients
            work = replace(work, activation_gradients=backward, weight_gradients=0, selected_gradients=0)
        return work

    def run(self, mark: Mark) -> None:
        """One iteration, calling ``mark`` at the end of each of `PHASES`."""
        self._step.backward(self._batch, "the batch")
        mark()
        self._step.clip("the batch")
        mark()
        self._step.update(LR)
        mark()
        self._step.release()
        mark()
