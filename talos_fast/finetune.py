"""`finetune`: train a model on a task, and get the task vector."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from talos_fast.arguments import number
from talos_fast.batch import Batches
from talos_fast.checkpoint import FIRST, Checkpoint
from talos_fast.errors import TalosError
from talos_fast.fingerprint import digest, fingerprint
from talos_fast.forward import Forward, default_forward
from talos_fast.mask import Mask
from talos_fast.methods import Compat, Options, Request, Setup, get_method
from talos_fast.methods.base import Deltas, compiled
from talos_fast.modules import require_plain
from talos_fast.ranks import Ranks
from talos_fast.recipe import Schedule, checked_recipe
from talos_fast.restoring import restoring_all_but_parameters, restoring_parameters
from talos_fast.step import Amp, Loss
from talos_fast.task_vector import TaskVector
from talos_fast.train import Trainer, train_mode

logger = logging.getLogger("talos_fast")


def finetune(
    model: nn.Module,
    batches: Batches,
    *,
    method: str = "talos",
    mask: Mask | None = None,
    density: float | None = None,
    finetuned: TaskVector | None = None,
    rank: int | None = None,
    lora_alpha: float | None = None,
    compat: Compat = "paper",
    forward: Forward | None = None,
    loss: Loss | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    lr: float | None = None,
    weight_decay: float = 0.1,
    warmup: int | None = None,
    schedule: Schedule = "cosine",
    clip: float | None = 1.0,
    accumulate: int = 1,
    amp: Amp = "auto",
    compile: bool = False,
    checkpoint_dir: str | Path | None = None,
    resume: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> TaskVector:
    """Trains ``model`` in place and returns finetuned - pretrained.

    Where torch.distributed is initialized every rank brings its own batches, equally many, as
    `torch.utils.data.DistributedSampler` deals them; a step follows the mean of the ranks' gradients, of which masked
    methods exchange the selected entries only, and all ranks get the same vector.
    Ctrl-C, or SIGTERM, stops after the running step; with ``checkpoint_dir`` the same call on the pre-trained model
    goes on from there and gives the very result of a run that was not interrupted.

    Args:
        model: the pre-trained model; left in its mode and with its ``requires_grad`` flags. Its buffers are
            left as they were, and batch norms use their running statistics: a vector holds parameters only.
        batches: ``(inputs, labels)`` or mappings with ``labels``, read anew each epoch.
        method: "talos" (needs ``mask``), "nonlinear", "linearized", "l-lora" or "lota"; see `talos_fast.methods`.
        mask: talos: which entries move; all others stay bit-identical.
        density: lota: the fraction that trains, default 0.1.
        finetuned: lota: the vector of a full fine-tuning on this task; by default one comes first, with this recipe.
        rank, lora_alpha: l-lora: of the adapters, default 16 and 32.
        compat: "paper", or "released": what the paper's released code computes for talos, lota and l-lora where that
            gives other numbers; `talos_fast.methods.released` says what and why the default differs. Its calibration
            is `calibrate` with ``estimator="sampled-logit"``; its vision code reads the training set in the same order
            each epoch, which a list of batches does here. For "nonlinear" and "linearized" nothing changes.
        forward: ``forward(model, batch) -> logits (N, K)``; default: call the model.
        loss: ``loss(logits, labels) -> scalar``; default: cross-entropy.
        epochs, steps: how long; one of them. Default: one epoch. ``steps`` counts optimizer steps.
        lr: peak learning rate; default 1e-5, the paper's, but 3e-4 for "talos" and "l-lora", which leave little to
            move. In short runs the best was up to 30 times higher. At a third of the rate that is best for a single
            task, vectors interfere less but learn 1 to 3 points less; on one model of three their sum was better
            (benchmarks/results/accuracy/ablation_*.md, validation data).
        weight_decay: towards zero, of the entries that train.
        warmup: steps; default 500, or a tenth of a run of less than 5,000.
        schedule: "cosine" or "constant".
        clip: largest gradient norm, None for no clipping.
        accumulate: batches per optimizer step.
        amp: "auto" (bf16 autocast on CUDA), "bf16" or "off".
        compile: compiles the forward, and the backward pass with it, by `torch.compile`. For another mode or backend
            pass a ``forward`` that is compiled; a module that is compiled is refused.
        checkpoint_dir: where the run's state is kept, written every minute and when it stops (but not of an optimizer
            step that failed, nor of several ranks where one fails or a second signal ends a step). Other batches than
            its own are refused, by the first of the epoch. It goes on exactly if random augmentation draws from
            torch's generators, and in no persistent worker.
        resume: take up a checkpoint that is there.
        seed: of everything random; each rank adds its number, but not for generators that the batches bring.
        progress: a bar on a terminal.

    Returns:
        The task vector, with provenance in ``.info``. Vectors of "linearized" and "l-lora" are directions of the
        linearized model (``vector.linearized``); `merge` and `search_alpha` evaluate them as they were trained.

    Raises:
        TalosError: bad arguments; a module that is compiled or wrapped for several devices; a mask of another model; no
            batch; NaN or infinite logits, loss or gradients (the batch is named and its step not taken); a checkpoint
            of another run; for the linear methods an operation without a forward-mode derivative; ranks that were
            given different weights, options or numbers of steps, or another rank failed.
    """
    ranks = Ranks()
    with ranks.as_one():
        chosen = get_method(method, compat)
        rate, weight_decay = chosen.lr if lr is None else lr, number("weight_decay", weight_decay)
        recipe = checked_recipe(batches, epochs, steps, rate, warmup, schedule, clip, accumulate, amp, seed)
        options = Options(mask, density, finetuned, rank, lora_alpha)
        chosen.check(options)
        require_plain(model)
        options.require_base(model)
        if not ranks.agree(recipe.steps):
            raise TalosError(
                f"{recipe.steps} steps here, another number on another rank; deal out as many batches to each, or pass "
                "steps="
            )
        base, start, earlier = fingerprint(model), time.perf_counter(), list[float]()
        folder = None if checkpoint_dir is None else Path(checkpoint_dir)

        def train(setup: Setup, name: str, place: Path | None) -> Trainer:
            asked = {**vars(recipe), "method": name, "weight_decay": weight_decay, "base": digest(base)}
            identity = asked | _made(setup)
            ranks.require_same(identity | {"checkpoint_dir": place is not None, "resume": resume}, "weights or options")
            checkpoint = None if place is None else Checkpoint(place, identity, resume, ranks)
            train_mode(model)
            logger.info(
                "%s: %d steps, %s from %g after a warm-up of %d, %d tensors with entries that train",
                name, recipe.steps, recipe.schedule, recipe.lr, recipe.warmup, len(setup.trained)
            )  # fmt: skip
            if compile:
                setup = compiled(setup)
            trainer = Trainer(setup, model, batches, recipe, loss or F.cross_entropy, ranks, checkpoint)
            trainer.run(progress)
            earlier.append(trainer.earlier_seconds)
            return trainer

        def train_first(setup: Setup) -> Deltas:
            with restoring_parameters(setup.trained):
                train(setup, f"{method}, first run", folder and folder / FIRST)
                return setup.export()

        with restoring_all_but_parameters(model):
            setup = chosen.prepare(
                Request(model, forward or default_forward, recipe.lr, weight_decay, options, train_first)
            )
            trainer = train(setup, method, folder)
            deltas = setup.export()
        info: dict[str, Any] = {
            **vars(recipe), "method": method, "weight_decay": weight_decay, "last_loss": trainer.last_loss,
            "seconds": round(time.perf_counter() - start + sum(earlier), 3), "torch": torch.__version__,
            "ranks": ranks.world, "mask": None if setup.mask is None else setup.mask.info, **setup.info,
        }  # fmt: skip
        return TaskVector.from_deltas(deltas, base=base, info=info)


def _made(setup: Setup) -> dict[str, Any]:
    """What the method made of the request: a checkpoint is only taken up by a run that agrees."""
    trained = digest({key: str(tuple(t.shape)) for key, t in setup.trained.items()})
    mask = None if setup.mask is None else setup.mask.digest()
    return {"compat": "paper", "trained": trained, **setup.info, "mask": mask}
