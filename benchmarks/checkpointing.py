"""Forward and backward under Hugging Face's gradient checkpointing, as its library has it and as `finetune` runs it.

With masks in the queries and keys of every layer, of the upper half, and of the last: what lies below is frozen.
``pytest benchmarks/checkpointing.py --benchmark --models BERT-6``.
"""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from backward import allocator_peak
from measure import interleaved
from records import header
from subjects import Subject, bert

from talos_fast import Mask
from talos_fast.forward import default_forward
from talos_fast.gradient_checkpointing import lean_checkpointing
from talos_fast.methods import Options, Request
from talos_fast.methods.masked import masked
from talos_fast.step import Step
from talos_fast.writing import write_json

MODELS = {
    "BERT-6": bert(num_hidden_layers=6),
    "smoke": bert(num_hidden_layers=2, hidden_size=64, num_attention_heads=2, intermediate_size=128),
}
DEFAULT_BATCH = 8
WAYS = {"as Hugging Face has it": lambda model: nullcontext(), "as finetune runs it": lean_checkpointing}


def mask_above(model: torch.nn.Module, lowest: int) -> Mask:
    """A third of the queries and keys from a layer on."""
    generator = torch.Generator().manual_seed(0)

    def selected(name: str, p: torch.Tensor) -> torch.Tensor:
        _, _, inside = name.partition(".layer.")
        if not (".query." in inside or ".key." in inside) or int(inside.split(".")[0]) < lowest:
            return torch.zeros(p.shape, dtype=torch.bool)
        return torch.rand(p.shape, generator=generator) < 1 / 3

    return Mask({name: selected(name, p) for name, p in model.named_parameters()})


def runner(subject: Subject, step: Step, way: str) -> Callable[[], None]:
    def run() -> None:
        with WAYS[way](subject.model):
            step.backward(subject.batch, "the batch")
        step.release()

    return run


@pytest.mark.parametrize("model", MODELS)
def test_checkpointing(model: str, request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    size, rounds = request.config.option.batch or DEFAULT_BATCH, request.config.getoption("--rounds")
    subject = MODELS[model](size)
    subject.model.train().gradient_checkpointing_enable({"use_reentrant": False})
    layers, rows = subject.model.config.num_hidden_layers, {}
    for lowest in dict.fromkeys((0, layers // 2, layers - 1)):
        setup = masked(
            Request(subject.model, default_forward, 1e-5, 0.1, Options(), None), mask_above(subject.model, lowest)
        )
        step = Step(setup, subject.model, F.cross_entropy, clip=None, amp="off")
        runs = {f"layers {lowest} to {layers - 1}, {way}": runner(subject, step, way) for way in WAYS}
        for name, seconds in interleaved(runs, rounds).items():
            rows[name] = {"allocated_mib": allocator_peak(runs[name]) / 2**20} | seconds
            print(f"  {name:42s}", "  ".join(f"{key} {value:.4g}" for key, value in rows[name].items()))
    about = {"benchmark": "checkpointing", "model": model, "batch": size, "tokens": 128, "weights": "random"}
    content = header("cpu") | about | {"rounds": rounds, "rows": rows}
    write_json(request.config.getoption("--results") / f"checkpointing_{model}_cpu.json", content)
