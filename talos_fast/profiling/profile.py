"""`profile`: what an iteration costs on the user's own model, mask and batch, beside full fine-tuning."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from talos_fast.calibrate import restored
from talos_fast.environment import environment
from talos_fast.errors import TalosError
from talos_fast.forward import Batch, Batches, Forward, default_forward, device_of, labels_of, to_device
from talos_fast.mask import Mask
from talos_fast.methods import get_method
from talos_fast.methods.base import Request
from talos_fast.profiling.iteration import FinetuneIteration
from talos_fast.profiling.measure import interleave, run_twice
from talos_fast.profiling.memory import Memory, above
from talos_fast.profiling.result import BASELINE, Profile, Row
from talos_fast.profiling.work import count_work, step_bytes
from talos_fast.train import Amp, Loss, autocasts


def profile(
    model: nn.Module,
    batches: Batches,
    *,
    mask: Mask | None = None,
    method: str = "talos",
    forward: Forward | None = None,
    loss: Loss | None = None,
    clip: float | None = 1.0,
    amp: Amp = "auto",
    rounds: int = 5,
    warmup: int = 2,
    trace: str | Path | None = None,
) -> Profile:
    """Times iterations of ``method`` and of full fine-tuning on one batch, and counts what they must compute and move.

    The iterations are `finetune`'s, interleaved; the model ends bit-identical. It needs the memory of full fine-tuning
    and of a copy of the model.

    Args:
        model: as for `finetune`.
        batches: its first batch is used again and again; reading it is not timed.
        mask, method, forward, loss, clip, amp: as for `finetune`.
        rounds: measurements of each.
        warmup: rounds before them.
        trace: where to write one more iteration of ``method``, a Chrome trace of `torch.profiler`: .json or .json.gz.

    Raises:
        TalosError: what `finetune` would refuse, no round to measure, or a trace in a folder that is missing.

    Example:
        >>> print(talos.profile(model, batches, mask=mask))  # doctest: +SKIP
    """
    if rounds < 1 or warmup < 0:
        raise TalosError(f"rounds={rounds}, warmup={warmup}: give one round or more, and no negative warm-up")
    if trace is not None and not Path(trace).resolve().parent.is_dir():
        raise TalosError(f"trace={trace}: its folder does not exist; make it first")
    device = device_of(model)
    batch = to_device(_first(batches), device)
    parameters = dict(model.named_parameters())
    bf16 = autocasts(amp, next(iter(parameters.values())))
    masks = {method: mask}

    def start(name: str) -> FinetuneIteration:
        for p, flag in flags.items():
            p.requires_grad_(flag)
        setup = get_method(name)(Request(model, forward or default_forward, masks.get(name), 1e-5, 0.1))
        return FinetuneIteration(setup, model, batch, loss or F.cross_entropy, clip, bf16)

    running: dict[str, FinetuneIteration] = {}
    works, peaks, memory = {}, {}, Memory(device)
    with _unchanged(model), restored(parameters):
        model.train()
        flags = {p: p.requires_grad for p in parameters.values()}
        for name in dict.fromkeys((BASELINE, method)):
            works[name] = count_work(start(name).forward_loss, parameters, masks.get(name))
            before = memory.held()
            running[name] = start(name)
            peaks[name] = above(before, memory.peak(partial(run_twice, running[name])))
        timings = interleave(running, device, warmup=warmup, rounds=rounds)
        if trace is not None:
            _write_trace(running[method], Path(trace))
    rows = {}
    for name, iteration in running.items():
        trained, mine = iteration.setup.trained, masks.get(name)
        entries = sum(int(mine[key].sum()) if mine else p.numel() for key, p in trained.items())
        rows[name] = Row(timings[name], peaks[name], works[name], step_bytes(trained, mine), entries)
    about = {
        **environment(device), "model": type(model).__name__, "batch": len(labels_of(batch, "the batch")), "bf16": bf16,
        "dtype": str(next(iter(parameters.values())).dtype).removeprefix("torch."), "rounds": rounds, "clip": clip,
        "model_bytes": sum(t.nbytes for t in (*parameters.values(), *model.buffers())),
    }  # fmt: skip
    return Profile(rows, about)


def _first(batches: Batches) -> Batch:
    for batch in batches:
        return batch
    raise TalosError("batches: there is no batch; give at least one")


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Brings back flags, modes and buffers, and drops gradients."""
    flags = {p: p.requires_grad for p in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    try:
        with restored(dict(model.named_buffers())), torch.random.fork_rng(devices=_cuda_devices(model)):
            yield
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
            p.grad = None
        for module, training in modes.items():
            module.training = training


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)


def _write_trace(iteration: FinetuneIteration, path: Path) -> None:
    iteration.prepare()
    with torch.profiler.profile(record_shapes=True, profile_memory=True) as profiler:
        iteration.run(lambda: None)
    profiler.export_chrome_trace(str(path))
