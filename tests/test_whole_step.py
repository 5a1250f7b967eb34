"""The whole step compiled without a graph break, without a host sync, and captured in a CUDA graph."""

import traceback
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


def take(step: Step, batches, steps: int, around=None):
    for number in range(steps):
        with around() if around else torch.enable_grad():
            step.backward(batches[number % len(batches)], f"batch {number}")
            step.clip(f"batch {number}")
            step.update(1e-3)
            step.release()


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["clip", "timm", "bert", "t5"])
def test_no_step_waits_for_the_device(kind, method, amp, tmp_path):
    """Unread notes are left for the end, as on a GPU, where reading one takes no operator on the device."""
    model, batches = case(kind, tmp_path)
    setup = setup_of(model, method)
    step = Step(setup, model, functional.cross_entropy, clip=1.0, amp=amp, lag=100)
    take(step, batches, 1)  # which rows have a gradient is found out once
    take(step, batches, 3, NoSync)
    step.watch.settle()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        step.watch.tripped.item()


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("method", METHODS)
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
