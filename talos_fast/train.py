"""The one trainer: batches through a forward, a loss, accumulation, clipping, a schedule, and an optimizer step."""

import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from talos_fast.checkpoint import Checkpoint, Position, Progress, RandomState
from talos_fast.errors import TalosError
from talos_fast.forward import Batch, Batches, checked_logits, to_device
from talos_fast.methods import Setup

Loss = Callable[[Tensor, Tensor], Tensor]
Schedule = Literal["cosine", "constant"]
Amp = Literal["auto", "bf16", "off"]

SAVE_EVERY_SECONDS = 60.0


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
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def autocasts(amp: Amp, parameter: Tensor) -> bool:
    """Whether a model of such parameters runs under bf16 autocast."""
    return amp == "bf16" or (amp == "auto" and parameter.is_cuda and parameter.dtype is torch.float32)


class Trainer:
    """Runs a `Setup` through a `Recipe`; stops on a step boundary when interrupted, and goes on from a checkpoint."""

    def __init__(
        self,
        setup: Setup,
        model: nn.Module,
        batches: Batches,
        recipe: Recipe,
        loss: Loss,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self._setup, self._model, self._batches, self._recipe, self._loss = setup, model, batches, recipe, loss
        self._checkpoint = checkpoint
        self._parameters = list(setup.trained.values())
        self._device = self._parameters[0].device
        bf16 = autocasts(recipe.amp, self._parameters[0])
        self._autocast: Any = torch.autocast(self._device.type, torch.bfloat16) if bf16 else nullcontext()
        self._random = RandomState(batches, self._device)
        self._position = Position()
        self.last_loss = math.nan

    def run(self, progress: bool) -> None:
        """Trains to the end; the caller's random state is left as it was.

        Raises:
            TalosError: no batch; NaN or infinite logits, loss or gradient (the batch is named, its step is not taken).
            KeyboardInterrupt: Ctrl-C, after the step that was running and its checkpoint.
        """
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(self._recipe.seed)
            self._epoch_random = self._step_random = self._random.get()
            resumed = self._resume()
            if self._position.step >= self._recipe.steps:
                self._random.set(self._step_random)  # what comes next goes on as after a run that was not interrupted
                return
            try:
                with interruptible() as interrupted:
                    self._loop(resumed, interrupted, progress)
            finally:
                # Parameters and moments change only inside a step, so this is the last good state, come what may.
                self._save()

    def _loop(self, resumed: bool, interrupted: Callable[[], bool], progress: bool) -> None:
        done, last_save = self._position.step, time.monotonic()
        hidden = None if progress else True
        bar = tqdm(total=self._recipe.steps, initial=done, desc="train", disable=hidden, leave=False)
        waiting = 0
        with bar:
            for epoch, index, batch in self._stream(resumed):
                where = f"epoch {epoch}, batch {index}"
                self._backward(batch, where)
                waiting += 1
                if waiting < self._recipe.accumulate:
                    continue
                self._update(where)
                waiting, done = 0, done + 1
                self._position = Position(done, epoch, index + 1)
                self._step_random = self._random.get()
                bar.update()
                if done == self._recipe.steps:
                    return
                if interrupted():
                    raise KeyboardInterrupt
                if time.monotonic() - last_save > SAVE_EVERY_SECONDS:
                    self._save()
                    last_save = time.monotonic()

    def _stream(self, resumed: bool) -> Iterator[tuple[int, int, Batch]]:
        """(epoch, index, batch) from the current position, epoch after epoch."""
        epoch, skip = self._position.epoch, self._position.batch
        while True:
            if resumed:
                self._random.set(self._epoch_random)
            else:
                self._epoch_random = self._random.get()
            sampler: Any = getattr(self._batches, "sampler", None)
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            iterator = iter(self._batches)
            deque(islice(iterator, skip), maxlen=0)
            if resumed:
                # The order of the batches came from the epoch's start; all else goes on from the last step.
                self._random.set(self._step_random)
            count = skip
            for count, batch in enumerate(iterator, skip + 1):
                yield epoch, count - 1, batch
            if count == 0:
                raise TalosError(f"epoch {epoch}: there is no batch (an iterator can be read only once; pass a list)")
            epoch, skip, resumed = epoch + 1, 0, False

    def _backward(self, batch: Batch, where: str) -> None:
        batch = to_device(batch, self._device)
        with self._autocast:
            logits, labels = checked_logits(self._setup.forward, self._model, batch, where)
            loss = self._loss(logits.float() if logits.dtype != torch.float64 else logits, labels)
        self.last_loss = float(loss.detach())
        if not math.isfinite(self.last_loss):
            raise TalosError(f"{where}: the loss is {self.last_loss}; the step was not taken")
        (loss / self._recipe.accumulate).backward()

    def _update(self, where: str) -> None:
        limit = math.inf if self._recipe.clip is None else self._recipe.clip
        norm = float(nn.utils.clip_grad_norm_(self._parameters, limit))
        if not math.isfinite(norm):
            raise TalosError(f"{where}: the norm of the gradient is {norm}; the step was not taken")
        for group in self._setup.optimizer.param_groups:
            group["lr"] = self._recipe.lr_at(self._position.step)
        self._setup.optimizer.step()
        self._setup.optimizer.zero_grad(set_to_none=True)

    def _resume(self) -> bool:
        found = self._checkpoint.load(self._setup.trained, self._setup.optimizer) if self._checkpoint else None
        if found is None:
            return False
        self._position, self._epoch_random, self._step_random = found.position, found.epoch_random, found.step_random
        return True

    def _save(self) -> None:
        if self._checkpoint:
            progress = Progress(self._position, self._epoch_random, self._step_random)
            self._checkpoint.save(self._setup.trained, self._setup.optimizer, progress)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a flag, so that the running step completes; a second one interrupts at once."""
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may handle signals
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)
