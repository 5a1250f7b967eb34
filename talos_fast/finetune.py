"""`finetune`: train a model on a task, and get the task vector."""

import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from talos_fast.checkpoint import Checkpoint
from talos_fast.delta import SparseDelta
from talos_fast.errors import TalosError
from talos_fast.fingerprint import digest, fingerprint, require_base
from talos_fast.forward import Batches, Forward, default_forward
from talos_fast.mask import Mask
from talos_fast.methods import get_method
from talos_fast.methods.base import Request
from talos_fast.task_vector import TaskVector
from talos_fast.train import Amp, Loss, Recipe, Schedule, Trainer


def finetune(
    model: nn.Module,
    batches: Batches,
    *,
    method: str = "talos",
    mask: Mask | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    lr: float = 1e-5,
    weight_decay: float = 0.1,
    warmup: int | None = None,
    schedule: Schedule = "cosine",
    clip: float | None = 1.0,
    accumulate: int = 1,
    amp: Amp = "auto",
    checkpoint_dir: str | Path | None = None,
    resume: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> TaskVector:
    """Trains ``model`` in place and returns finetuned - pretrained.

    Ctrl-C stops after the running step; with ``checkpoint_dir`` the same call on the pre-trained model goes on from
    there and gives the very result of a run that was not interrupted.

    Args:
        model: the pre-trained model; left in its mode and with its ``requires_grad`` flags.
        batches: ``(inputs, labels)`` or mappings with ``labels``, read anew each epoch.
        method: "talos" (needs ``mask``) or "nonlinear".
        mask: which entries move; all others stay bit-identical.
        forward: ``forward(model, batch) -> logits (N, K)``; default: call the model.
        loss: ``loss(logits, labels) -> scalar``; default: cross-entropy.
        epochs, steps: how long; one of them. Default: one epoch. ``steps`` counts optimizer steps.
        lr: peak learning rate. Masks leave little to move: "talos" takes 10 to 30 times the one of "nonlinear".
        weight_decay: towards zero, of the entries that train.
        warmup: steps; default 500, or a tenth of a run of less than 5,000.
        schedule: "cosine" or "constant".
        clip: largest gradient norm, None for no clipping.
        accumulate: batches an optimizer step.
        amp: "auto" (bf16 autocast on CUDA), "bf16" or "off".
        checkpoint_dir: where the run's state is kept, written every minute and when it stops.
        resume: take up a checkpoint that is there.
        seed: of everything random.
        progress: a bar on a terminal.

    Returns:
        The task vector, with provenance in ``.info``.

    Raises:
        TalosError: bad arguments; a mask of another model; no batch; NaN or infinite logits, loss or gradients (the
            batch is named and its step not taken); a checkpoint of another run.
    """
    recipe = _recipe(batches, epochs, steps, lr, warmup, schedule, clip, accumulate, amp, seed)
    if mask is not None and mask.base:
        require_base(mask.base, model, "the mask")
    base, start = fingerprint(model), time.perf_counter()
    flags = {p: p.requires_grad for p in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    try:
        setup = get_method(method)(Request(model, forward or default_forward, mask, lr, weight_decay))
        pretrained = {name: p.detach().clone() for name, p in setup.trained.items()}
        identity = {**vars(recipe), "method": method, "weight_decay": weight_decay, "base": digest(base),
                    "mask": None if mask is None else mask.digest()}  # fmt: skip
        checkpoint = None if checkpoint_dir is None else Checkpoint(checkpoint_dir, identity, resume)
        model.train()
        trainer = Trainer(setup, model, batches, recipe, loss or F.cross_entropy, checkpoint)
        trainer.run(progress)
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
            p.grad = None
        for module, training in modes.items():
            module.training = training
    deltas = {name: SparseDelta.between(name, pretrained[name], p.data) for name, p in setup.trained.items()}
    info: dict[str, Any] = {
        **vars(recipe), "method": method, "weight_decay": weight_decay, "last_loss": trainer.last_loss,
        "seconds": round(time.perf_counter() - start, 3), "torch": torch.__version__,
        "mask": None if mask is None else mask.info,
    }  # fmt: skip
    return TaskVector.from_deltas({name: d for name, d in deltas.items() if len(d.values)}, base=base, info=info)


def _recipe(
    batches: Batches, epochs: int | None, steps: int | None, lr: float, warmup: int | None, schedule: Schedule,
    clip: float | None, accumulate: int, amp: Amp, seed: int,
) -> Recipe:  # fmt: skip
    """Checks the arguments and counts the steps."""
    if epochs is not None and steps is not None:
        raise TalosError(f"epochs={epochs} and steps={steps}: give one of them")
    for name, value in (("epochs", epochs), ("steps", steps), ("accumulate", accumulate)):
        if value is not None and value < 1:
            raise TalosError(f"{name}={value}: must be at least 1")
    if not lr > 0:
        raise TalosError(f"lr={lr}: must be positive")
    if schedule not in ("cosine", "constant"):
        raise TalosError(f"schedule={schedule!r}: choose 'cosine' or 'constant'")
    if amp not in ("auto", "bf16", "off"):
        raise TalosError(f"amp={amp!r}: choose 'auto', 'bf16' or 'off'")
    if clip is not None and not clip > 0:
        raise TalosError(f"clip={clip}: the largest gradient norm must be positive, or None")
    if steps is None:
        try:
            count = len(batches)  # type: ignore[arg-type]
        except TypeError:
            raise TalosError("epochs of batches without a length: pass steps=, a list or a DataLoader") from None
        steps = (epochs or 1) * count // accumulate
        if steps == 0:
            raise TalosError(f"{count} batches make no step of accumulate={accumulate}; there is nothing to train on")
    warmup = min(500, steps // 10) if warmup is None else warmup
    return Recipe(steps, lr, warmup, schedule, clip, accumulate, amp, seed)
