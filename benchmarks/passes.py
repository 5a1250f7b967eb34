"""Forward and backward of linearized methods, and of frozen weights under autocast, beside how torch does them.

`linearized`, `l-lora`: our expansion beside torch.func.jvp of the model along dense directions with its plain
attention, in time, counted FLOPs and the most that torch's allocator held at once. `talos`: bf16 autocast with frozen
weights cast once beside autocast alone, in time and in casts a step.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backward import allocator_peak
from contenders import contender
from measure import interleaved
from records import header
from rivals import through_torch
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import Workload, build

from talos_fast.profiling.work import FlopCounter
from talos_fast.step import Step
from talos_fast.writing import write_json

MODELS = ("ViT-B-32", "smoke")
DEFAULT_BATCH = 4


def torch_s(workload: Workload, method: str) -> Step:
    """A step of the method through torch.func.jvp."""
    setup = contender(workload, method, "eager", bf16=False).setup
    return Step(through_torch(method, setup, workload), workload.model, F.cross_entropy, clip=None, amp="off")


def counted(run: Callable[[], None]) -> dict[str, float]:
    with FlopCounter({}, {}) as flops:
        run()
    return {"gflop": flops.total / 1e9, "allocated_mib": allocator_peak(run) / 2**20}


class Casts(TorchDispatchMode):
    """Counts casts to bfloat16, and their bytes: read as float32 and written."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") is torch.bfloat16:
            self.count, self.bytes = self.count + 1, self.bytes + 6 * args[0].numel()
        return func(*args, **(kwargs or {}))


def workload_of(model: str, request: pytest.FixtureRequest) -> Workload:
    return build(model, request.config.option.batch or DEFAULT_BATCH, torch.device("cpu"))


def runner(step: Step, workload: Workload) -> Callable[[], None]:
    """One forward and backward pass, its gradients given back."""
    flags = {p: p.requires_grad for p in workload.model.parameters()}

    def run() -> None:
        for p, flag in flags.items():
            p.requires_grad_(flag)
        step.backward(workload.batch, "the batch")
        step.release()

    return run


def write(what: str, workload: Workload, request: pytest.FixtureRequest, rows: dict[str, Any]) -> None:
    """Prints the rows and writes them, with the machine."""
    for name, row in rows.items():
        print(f"  {name:28s}", "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    about = header("cpu") | {"benchmark": what, **workload.about, "rounds": request.config.getoption("--rounds")}
    folder: Path = request.config.getoption("--results")
    write_json(folder / f"{what}_{workload.about['model']}_cpu.json", about | {"rows": rows})


@pytest.mark.parametrize("model", MODELS)
def test_linearized_passes(model: str, request: pytest.FixtureRequest) -> None:
    workload = workload_of(model, request)
    runs = {"nonlinear": runner(contender(workload, "nonlinear", "eager", bf16=False)._step, workload)}
    for method in ("linearized", "l-lora"):
        runs[method] = runner(contender(workload, method, "eager", bf16=False)._step, workload)
        workload.model.requires_grad_(True)
        runs[f"{method}, torch.func.jvp"] = runner(torch_s(workload, method), workload)
    rows: dict[str, Any] = {name: counted(run) for name, run in runs.items()}
    for name, seconds in interleaved(runs, request.config.getoption("--rounds")).items():
        rows[name] |= seconds
    write("linearized_passes", workload, request, rows)


@pytest.mark.parametrize("model", MODELS)
def test_casts(model: str, request: pytest.FixtureRequest) -> None:
    workload = workload_of(model, request)
    runs, rows = {}, {}
    for name in ("cast once", "autocast alone"):
        step = contender(workload, "talos", "eager", bf16=True)._step
        if name == "autocast alone":
            step._casts = nullcontext()
        runs[name] = runner(step, workload)
        runs[name]()
        with Casts() as casts:
            runs[name]()
        rows[name] = {
            "casts": casts.count,
            "cast_mb": casts.bytes / 1e6,
            "allocated_mib": allocator_peak(runs[name]) / 2**20,
        }
    for name, seconds in interleaved(runs, request.config.getoption("--rounds")).items():
        rows[name] |= seconds
    write("casts", workload, request, rows)
