"""`Recipe`: how long and how fast to train, checked before anything is computed."""

import math
from dataclasses import dataclass
from typing import Literal

from talos_fast.arguments import checked_seed, number, require_integer
from talos_fast.batch import Batches
from talos_fast.errors import TalosError
from talos_fast.step import Amp, require_amp_and_clip

Schedule = Literal["cosine", "constant"]


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train.

    Args:
        steps: optimizer steps in all.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        schedule: after the warm-up "cosine" to zero, or "constant".
        clip: largest norm of the gradient of everything that trains; None leaves it as it is.
        accumulate: batches an optimizer step.
        amp: "bf16" autocast, "off", or "auto": bf16 on CUDA for fp32 models.
        seed: of the order of batches, dropout and augmentation, as far as torch draws them.
    """

    steps: int
    lr: float
    warmup: int
    schedule: Schedule
    clip: float | None
    accumulate: int
    amp: Amp
    seed: int

    def lr_at(self, step: int) -> float:
        """The learning rate of step 0, 1 and so on."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        progress = (step - self.warmup) / (self.steps - self.warmup)
        return self.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def checked_recipe(
    batches: Batches, epochs: int | None, steps: int | None, lr: float, warmup: int | None, schedule: Schedule,
    clip: float | None, accumulate: int, amp: Amp, seed: int,
) -> Recipe:  # fmt: skip
    """The recipe that arguments of `finetune` ask for; without steps, that of its epochs, and by default one.

    Raises:
        TalosError: names the argument; or the batches have no length, or make no step.
    """
    if epochs is not None and steps is not None:
        raise TalosError(f"epochs={epochs} and steps={steps}: give one of them")
    for name, value, least in (("epochs", epochs, 1), ("steps", steps, 1), ("accumulate", accumulate, 1),
                               ("warmup", warmup, 0)):  # fmt: skip
        if value is not None:
            require_integer(name, value, least)
    lr = number("lr", lr)
    if not 0 < lr < math.inf:
        raise TalosError(f"lr={lr}: must be positive and finite")
    if schedule not in ("cosine", "constant"):
        raise TalosError(f"schedule={schedule!r}: choose 'cosine' or 'constant'")
    require_amp_and_clip(amp, clip)
    steps = _steps_of_epochs(batches, epochs or 1, accumulate) if steps is None else steps
    warmup = min(500, steps // 10) if warmup is None else warmup
    limit = None if clip is None else float(clip)
    return Recipe(int(steps), lr, warmup, schedule, limit, accumulate, amp, checked_seed("seed", seed))


def _steps_of_epochs(batches: Batches, epochs: int, accumulate: int) -> int:
    try:
        count = len(batches)  # type: ignore[arg-type]
    except TypeError:
        raise TalosError("epochs of batches without a length: pass steps=, a list or a DataLoader") from None
    steps = epochs * count // accumulate
    if steps == 0:
        raise TalosError(f"{count} batches make no step of accumulate={accumulate}; there is nothing to train on")
    return steps
