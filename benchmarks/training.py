"""The embedded CLIP trained on every backend: with a full mask as by torch's AdamW, with a TaLoS mask nowhere else.

``python benchmarks/training.py cpp interpreter`` takes 200 steps of both on each backend named and writes
results/training_BACKEND.json. Training amplifies every rounding, so how far two runs are apart says nothing by itself:
it stands beside the distance of torch's own for-loop and fused AdamW, which compute the same step in other roundings
too. tests/test_training.py asserts on the same runs, shorter ones in the interpreter.
"""

import argparse
import copy
import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from measure import RESULTS
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer

from talos_fast import Mask, MaskedAdam, calibrate, ops
from talos_fast.demo import tasks
from talos_fast.demo.model import load_backbone
from talos_fast.environment import environment
from talos_fast.optim import launch
from talos_fast.writing import write_json

STEPS, BATCH = 200, 4
FULL_LR, TALOS_LR, WEIGHT_DECAY = 2e-4, 4e-3, 0.1
EPS = {"cpu": 1e-8, "cuda": 1e-5}
"""Biases of keys have no gradient but rounding, which under AdamW's own 1e-8 moves them all the same. That says nothing
of an optimizer, and where products are rounded more coarsely it would be most of what two runs are apart."""

BACKENDS: dict[str, dict[str, bool]] = {
    "torch": {"fused": False, "foreach": False}, "foreach": {"foreach": True}, "cpp": {}, "interpreter": {}, "cuda": {},
}  # fmt: skip
"""Flags of `MaskedAdam`; interpreter: the Triton kernels on CPU tensors."""


@dataclass(frozen=True)
class Problem:
    """A classifier, its batches, and a TaLoS mask of a tenth."""

    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    mask: Mask


@dataclass(frozen=True)
class Trained:
    """What a run left: parameters by name, on the CPU; the optimizer, the loss of each step, and seconds."""

    parameters: dict[str, Tensor]
    optimizer: Optimizer
    losses: list[float]
    seconds: float

    def distance(self, other: dict[str, Tensor]) -> float:
        """Euclidean, over all parameters."""
        squares = [(p - other[name].detach()).double().square().sum() for name, p in self.parameters.items()]
        return float(torch.stack(squares).sum().sqrt())


def problem() -> Problem:
    """The embedded CLIP on drawn shapes, the same each time."""
    torch.manual_seed(0)
    backbone, task = load_backbone(), tasks.shapes()
    model = backbone.classifier(task)
    batches = list(backbone.batches(task.train, batch_size=BATCH))
    return Problem(model, batches, calibrate(model, batches[:8], density=0.1, rounds=2, progress=False))


def trained(
    given: Problem, make: Callable[[list[tuple[str, nn.Parameter]]], Optimizer], steps: int, device: str = "cpu"
) -> Trained:
    """Some steps from the pre-trained model, with the optimizer that ``make`` gives."""
    model = copy.deepcopy(given.model).to(device).train()
    optimizer = make([(name, p) for name, p in model.named_parameters() if p.requires_grad])
    losses, start = [], time.perf_counter()
    for step in range(steps):
        images, labels = given.batches[step % len(given.batches)]
        loss = cross_entropy(model(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    return Trained({n: p.detach().cpu() for n, p in model.named_parameters()}, optimizer, losses, seconds)


def adamw(given: Problem, steps: int, device: str, **flags: bool) -> Trained:
    """By torch, on all parameters."""
    options = {"lr": FULL_LR, "weight_decay": WEIGHT_DECAY, "eps": EPS[device], **flags}
    return trained(given, lambda named: AdamW(named, **options), steps, device)


def masked(given: Problem, masks: Any, lr: float, backend: str, steps: int) -> Trained:
    """By `MaskedAdam`, on a backend."""
    device = device_of(backend)
    flags = {"masks": masks, "lr": lr, "weight_decay": WEIGHT_DECAY, "eps": EPS[device], **BACKENDS[backend]}
    with _reached(backend):
        return trained(given, lambda named: MaskedAdam(named, **flags), steps, device)


def device_of(backend: str) -> str:
    """Where a backend steps."""
    return "cuda" if backend == "cuda" else "cpu"


@contextmanager
def _reached(backend: str) -> Iterator[None]:
    """Lets the Triton kernels step CPU tensors for the interpreter, and only for it."""
    before = launch.ON_CPU
    launch.ON_CPU = backend == "interpreter"
    try:
        yield
    finally:
        launch.ON_CPU = before


def by_triton(optimizer: Any) -> int:
    """How many tensors the Triton kernels step."""
    groups = optimizer._launches._groups.values()
    return sum(len(one.members) for group in groups for _, one in group._launches)


def rivals(given: Problem, steps: int, device: str) -> tuple[Trained, Trained]:
    """torch's AdamW, its for-loop and its fused step."""
    return adamw(given, steps, device, foreach=False), adamw(given, steps, device, fused=True)


def with_a_full_mask(given: Problem, backend: str, loop: Trained, fused: Trained) -> dict[str, Any]:
    """How far a full mask strays from torch's for-loop AdamW, beside torch's fused AdamW and the way that both went."""
    start = dict(given.model.named_parameters())
    full = {name: torch.ones_like(p, dtype=torch.bool) for name, p in start.items() if p.requires_grad}
    ours = masked(given, full, FULL_LR, backend, len(loop.losses))
    apart = [(p - loop.parameters[name]).abs().max() for name, p in ours.parameters.items()]
    return {
        "max_difference": float(torch.stack(apart).max()), "distance": ours.distance(loop.parameters),
        "distance_of_fused": fused.distance(loop.parameters), "way": loop.distance(start),
        "losses": ours.losses, "losses_of_adamw": loop.losses, "by_triton": by_triton(ours.optimizer),
        "seconds": round(ours.seconds, 1), "lr": FULL_LR,
    }  # fmt: skip


def with_a_talos_mask(given: Problem, backend: str, steps: int) -> dict[str, Any]:
    """How many entries moved, and how many that are not selected changed a bit."""
    parameters = dict(given.model.named_parameters())
    masks = {name: given.mask.get(name, torch.zeros(p.shape, dtype=torch.bool)) for name, p in parameters.items()}
    ours = masked(given, masks, TALOS_LR, backend, steps)
    moved = changed = 0
    for name, before in parameters.items():
        differs = ours.parameters[name].view(torch.int32) != before.detach().view(torch.int32)
        moved += int((differs & masks[name]).sum())
        changed += int((differs & ~masks[name]).sum())
    return {
        "selected": given.mask.selected, "moved": moved, "others_changed": changed, "losses": ours.losses,
        "by_triton": by_triton(ours.optimizer), "seconds": round(ours.seconds, 1), "lr": TALOS_LR,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backends", nargs="+", choices=tuple(BACKENDS), help="what steps")
    parser.add_argument("--steps", type=int, default=STEPS)
    chosen = parser.parse_args()
    if "cpp" in chosen.backends and ops.backend("cpu") != "cpp":
        parser.error("cpp: the compiled library is not there; install the package where there is a C++ compiler")
    torch.set_num_threads(1)  # so small a model gains nothing from a second thread
    given = problem()
    rivals_on = functools.cache(functools.partial(rivals, given, chosen.steps))
    tensors = list(given.model.parameters())
    about = {
        "model": "tiny", "tensors": len(tensors), "parameters": sum(p.numel() for p in tensors), "steps": chosen.steps,
        "batch": BATCH, "weight_decay": WEIGHT_DECAY,
    }  # fmt: skip
    for backend in chosen.backends:
        full = with_a_full_mask(given, backend, *rivals_on(device_of(backend)))
        sparse = with_a_talos_mask(given, backend, chosen.steps)
        where = environment(torch.device(device_of(backend)))
        settings = {**about, "eps": EPS[device_of(backend)], "stepped_by": backend}
        content = {**where, **settings, "full_mask": full, "talos_mask": sparse}
        write_json(RESULTS / f"training_{backend}.json", content)
        for row in (full, sparse):
            print(backend, {key: value for key, value in row.items() if "losses" not in key}, flush=True)


if __name__ == "__main__":
    main()
