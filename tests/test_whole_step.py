"""The whole step compiled without a graph break, without a host sync, and captured in a CUDA graph."""

import traceback
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from methods_cases import case, setup_of
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from talos_fast.methods import METHODS
from talos_fast.step import Step

_aten = torch.ops.aten
SYNCS = {_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.is_nonzero, _aten.equal, _aten.item}


class NoSync(TorchDispatchMode):
    """Refuses what would make the host wait for a device.

    Not Hugging Face's own code, which asks whether a mask is all ones, nor the step of a CPU, which reads its count.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in SYNCS:
            files = {Path(frame.filename).name for frame in traceback.extract_stack()}
            assert files & {"masking_utils.py", "stepping.py"}, func
        return func(*args, **(kwargs or {}))


def take(step: Step, batches, steps: int, around=nullcontext, lr=1e-3):
    for number in range(steps):
        with around():
            step.backward(batches[number % len(batches)], f"batch {number}")
            step.clip(f"batch {number}")
            step.update(lr)
            step.release()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["clip", "timm", "bert", "t5"])
def test_no_step_waits_for_the_device(kind, method, tmp_path):
    """Unread notes are left for the end, as on a GPU, where reading one takes no operator on the device."""
    model, batches = case(kind, tmp_path)
    setup = setup_of(model, method)
    step = Step(setup, model, functional.cross_entropy, clip=1.0, amp="bf16", lag=100)
    take(step, batches, 1)  # which rows have a gradient is found out once
    take(step, batches, 3, NoSync)
    step.watch.settle()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        step.watch.tripped.item()


@pytest.mark.parametrize(
    "method, amp",
    [*((method, "off") for method in METHODS), ("nonlinear", "bf16"), ("talos", "bf16"), ("l-lora", "bf16")],
)
def test_forward_and_backward_compile_without_a_break_and_once(method, amp, tmp_path):
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, batches = case("clip", tmp_path)
        setup, counter = setup_of(model, method), CompileCounterWithBackend("aot_eager")
        if compiled:
            setup = replace(setup, forward=torch.compile(setup.forward, backend=counter, fullgraph=True))
        take(Step(setup, model, functional.cross_entropy, clip=1.0, amp=amp), batches, 4)
        results.append([p.detach().clone() for p in setup.trained.values()])
    assert counter.frame_count == 1
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-3 if amp == "bf16" else 1e-5)


def on_gpu(method: str, folder):
    """A step on a GPU whose optimizer may be captured, its learning rate, what trains, and one batch."""
    torch.manual_seed(0)
    model, batches = case("clip", folder)
    setup = setup_of(model.cuda().train(), method)
    for group in setup.optimizer.param_groups:
        group["capturable"] = True
    step = Step(setup, model, functional.cross_entropy, clip=1.0, amp="bf16")
    return step, torch.tensor(1e-3, device="cuda"), setup.trained, [tuple(t.cuda() for t in batches[0])]


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_replayed_step_is_the_eager_one(method, tmp_path):
    """Forward, backward, clipping and update in one CUDA graph, under a learning rate that changes between replays."""
    captured, rate, found, batches = on_gpu(method, tmp_path)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        take(captured, batches, 3, lr=rate)
    torch.cuda.current_stream().wait_stream(stream)
    captured.watch.settle()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        take(captured, batches, 1, lr=rate)
    eager, eager_rate, expected, _ = on_gpu(method, tmp_path)
    take(eager, batches, 3, lr=eager_rate)
    for number in range(4):
        for tensor in (rate, eager_rate):
            tensor.fill_(1e-3 / (number + 1))
        graph.replay()
        take(eager, batches, 1, lr=eager_rate)
    assert captured.watch.tripped == 0
    for name, p in found.items():
        torch.testing.assert_close(p, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_a_bad_replay_changes_nothing(tmp_path):
    step, rate, trained, batches = on_gpu("talos", tmp_path)
    take(step, batches, 3, lr=rate)
    step.watch.settle()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        take(step, batches, 1, lr=rate)
    before = {name: p.detach().clone() for name, p in trained.items()}
    batches[0][0].fill_(float("nan"))
    graph.replay()
    assert step.watch.tripped == 1
    assert all(torch.equal(p, before[name]) for name, p in trained.items())
