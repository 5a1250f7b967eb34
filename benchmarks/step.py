"""The optimizer step: MaskedAdam against torch's AdamW on all parameters, and against a dense masked AdamW.

All step the same parameters and gradients, interleaved in one process, so that a busy machine slows them alike.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shapes import MODELS, random_mask, talos_mask
from torch import Tensor

import talos_fast
from talos_fast import MaskedAdam, ops
from talos_fast.storage import write_json

RESULTS = Path(__file__).parent / "results"
OPTIONS = {"lr": 1e-5, "weight_decay": 0.1}


def dense_masked_step(parameters: dict[str, Tensor], masks: dict[str, Tensor]) -> Callable[[], None]:
    """As in the paper's code: dense moments, step and decay times a dense 0/1 score, a loop over tensors."""
    scores = {name: mask.float() for name, mask in masks.items()}
    state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    count = 0

    @torch.no_grad()
    def step() -> None:
        nonlocal count
        count += 1
        for name, p in parameters.items():
            (m, v), score = state[name], scores[name]
            p.sub_(p * score * (OPTIONS["lr"] * OPTIONS["weight_decay"]))
            m.lerp_(p.grad, 0.1)
            v.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
            scale = v.sqrt() / (1 - 0.999**count) ** 0.5 + 1e-8
            p.sub_(m / scale * score * (OPTIONS["lr"] / (1 - 0.9**count)))

    return step


def contenders(parameters: dict[str, Tensor], generator: torch.Generator) -> dict[str, Callable[[], object]]:
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    talos, scattered = talos_mask(shapes, generator), random_mask(shapes, generator, 0.1)
    named, every = list(parameters.items()), list(parameters.values())
    return {
        "AdamW fused, all parameters": torch.optim.AdamW(every, fused=True, **OPTIONS).step,
        "AdamW foreach, all parameters": torch.optim.AdamW(every, foreach=True, **OPTIONS).step,
        "AdamW for-loop, all parameters": torch.optim.AdamW(every, foreach=False, **OPTIONS).step,
        "dense masked AdamW, TaLoS mask": dense_masked_step(parameters, talos),
        "MaskedAdam, TaLoS mask": MaskedAdam(named, masks=talos, **OPTIONS).step,
        "MaskedAdam, 10 % random": MaskedAdam(named, masks=scattered, **OPTIONS).step,
    }


@pytest.mark.parametrize("model", MODELS)
def test_step(model: str, request: pytest.FixtureRequest) -> None:
    if model not in request.config.getoption("--models").split(","):
        pytest.skip(f"not among --models {request.config.getoption('--models')}")
    generator = torch.Generator().manual_seed(0)
    parameters = {name: torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
                  for name, shape in MODELS[model].items()}  # fmt: skip
    for p in parameters.values():
        p.grad = torch.randn(p.shape, generator=generator) * 1e-3
    steps = contenders(parameters, generator)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(2 + request.config.getoption("--rounds")):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    report(model, sum(p.numel() for p in parameters.values()), seconds)


def report(model: str, numel: int, seconds: dict[str, list[float]]) -> None:
    """Prints the table and writes it to results/, with the machine."""
    fused = statistics.median(seconds["AdamW fused, all parameters"])
    rows = {
        name: {"median_ms": 1e3 * statistics.median(times), "min_ms": 1e3 * min(times), "max_ms": 1e3 * max(times),
               "of_fused": statistics.median(times) / fused}
        for name, times in seconds.items()
    }  # fmt: skip
    print(f"\n{model}: {numel:,} parameters, {torch.get_num_threads()} threads, backend {ops.backend('cpu')}")
    for name, row in rows.items():
        spread = f"{row['min_ms']:8.1f} … {row['max_ms']:8.1f}"
        print(f"  {name:32s} {row['median_ms']:8.1f} ms ({spread})   {row['of_fused']:6.3f} of fused")
    content = {
        "benchmark": "step", "model": model, "parameters": numel, "device": "cpu", "rows": rows,
        "rounds": len(next(iter(seconds.values()))), "threads": torch.get_num_threads(),
        "machine": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__, "talos_fast": talos_fast.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    assert json.dumps(content)
    if model != "smoke":
        write_json(RESULTS / f"step_{model}_cpu.json", content)
