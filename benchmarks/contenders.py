"""Every method in every variant, as an iteration that can be measured."""

import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from rivals import OPTIONS, PaperIteration, as_the_paper_ran_it, through_torch
from workloads import Workload, build

from talos_fast.batch import labels_of
from talos_fast.forward import default_forward
from talos_fast.methods import Options, Request, Setup, get_method
from talos_fast.methods.base import Deltas, compiled
from talos_fast.methods.masked import masked
from talos_fast.profiling.iteration import FinetuneIteration, without_export
from talos_fast.profiling.measure import peak
from talos_fast.profiling.memory import Memory, above

VARIANTS = {
    "paper": "as the paper ran it: eager, GradScaler, dense clip, AdamW foreach; linearized ones: "
    "torch.func.jvp along dense directions; LoTA and TaLoS: dense masked AdamW",
    "eager": "as finetune runs it: no scaler, AdamW fused; LoTA and TaLoS: MaskedAdam",
    "compiled": "the same with torch.compile around forward and backward",
}


# Imported once and not by every process, nor counted as a method's memory; the last one is forward-mode's.
PRELOADED = ["contenders", "open_clip", "transformers.models.t5.modeling_t5", "torch._decomp.decompositions_for_jvp"]


def contender(workload: Workload, method: str, variant: str, bf16: bool) -> FinetuneIteration:
    """The iteration of a method; the model's ``requires_grad`` flags are its own afterwards."""
    model = workload.model.requires_grad_(True)
    request = Request(
        model, default_forward, OPTIONS["lr"], OPTIONS["weight_decay"],
        Options(workload.talos if method == "talos" else None), train_first=not_run,
    )  # fmt: skip
    # LoTA's mask comes from a first run; what it costs afterwards is that of its mask.
    setup = masked(request, workload.lota) if method == "lota" else get_method(method).prepare(request)
    setup = without_export(setup)
    arguments: Any = (model, workload.batch, F.cross_entropy, workload.spec.clip, "bf16" if bf16 else "off")
    if variant == "paper":
        if method in ("linearized", "l-lora"):
            setup = through_torch(method, setup, workload)
        trained, optimizer = as_the_paper_ran_it(method, setup, workload)
        return PaperIteration(replace(setup, trained=trained, optimizer=optimizer), *arguments)
    if variant == "compiled":
        setup = compiled(setup)
    return FinetuneIteration(setup, *arguments)


def not_run(setup: Setup) -> Deltas:
    """No method that is measured here asks for a first run."""
    raise NotImplementedError(setup)


def peak_above_model(workload: Workload, method: str, variant: str, bf16: bool) -> tuple[FinetuneIteration, int | None]:
    """Builds a contender and reads the highest memory of its iterations above what was held before."""
    memory = Memory(next(workload.model.parameters()).device)
    before = memory.held()
    iteration = contender(workload, method, variant, bf16)
    return iteration, above(before, peak(iteration, memory, variant == "compiled"))


def set_up(workload: Workload) -> None:
    """A plain pass, so that what libraries set up once, as cuBLAS its workspaces, is not charged to a method."""
    with suppress(torch.OutOfMemoryError):  # a method may fit where this does not
        logits = default_forward(workload.model, workload.batch)
        F.cross_entropy(logits, labels_of(workload.batch, "the batch")).backward()
    workload.model.zero_grad(set_to_none=True)


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function gives in a process that does nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def peak_in_own_process(name: str, size: int, method: str, variant: str, bf16: bool) -> int | None:
    """`peak_above_model` on the CPU, in a process of its own."""
    return in_own_process(_peak_on_cpu, name, size, method, variant, bf16, torch.get_num_threads())


def _peak_on_cpu(name: str, size: int, method: str, variant: str, bf16: bool, threads: int) -> int | None:
    torch.set_num_threads(threads)
    workload = build(name, size, torch.device("cpu"))
    set_up(workload)
    return peak_above_model(workload, method, variant, bf16)[1]
