"""The whole step compiled without a graph break, without a host sync, and captured in a CUDA graph."""

import traceback
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from cuda_graphs import captured
from methods_cases import case, checkpointed, setup_of, two_of_one_shape, without_dropout
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from talos_fast.batch import to_device
from talos_fast.gradient_checkpointing import lean_checkpointing
from talos_fast.methods import METHODS, base
from talos_fast.step import Step

KINDS = ["clip", "timm", "bert", "t5"]
_aten = torch.ops.aten
SYNCS = {_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.is_nonzero, _aten.equal, _aten.item}
"""Operators that make the host wait for a device."""


class NoSync(TorchDispatchMode):
    """Refuses what would make the host wait for a device.

    Not Hugging Face's own code, which asks whether a mask is all ones, nor the step of a CPU, which reads its count.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in SYNCS:
            files = {Path(frame.filename).name for frame in traceback.extract_stack()}
            assert files & {"masking_utils.py", "stepping.py"}, func
        return func(*args, **(kwargs or {}))


@contextmanager
def sync_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def take(step: Step, batches, steps: int, around=nullcontext, lr=1e-3, accumulate=1):
    for number in range(steps):
        with around():
            for part in range(number * accumulate, (number + 1) * accumulate):
                step.backward(batches[part % len(batches)], f"batch {part}")
            step.clip(f"batch {number}")
            step.update(lr)
            step.release()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_the_device(kind, method, tmp_path):
    """Unread notes are left for the end, as on a GPU, where reading one takes no operator on the device."""
    model, batches = case(kind, tmp_path)
    setup = setup_of(model, method)
    step = Step(setup, model, functional.cross_entropy, clip=1.0, amp="bf16", lag=100)
    take(step, batches, 1)  # which rows have a gradient is found out once
    take(step, batches, 3, NoSync)
    step.watch.settle()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        step.watch.found_inf.item()


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["clip", "timm"])
def test_torch_sees_no_step_wait_for_the_gpu(kind, method, tmp_path):
    """Notes are read as they come, two steps later; waiting for the event of a note is not what torch looks for."""
    model, batches = case(kind, tmp_path)
    setup = setup_of(model.to("cuda"), method)
    step = Step(setup, model, functional.cross_entropy, clip=1.0)
    batches = to_device(batches, torch.device("cuda"))
    take(step, batches, 1)
    take(step, batches, 5, sync_is_an_error)
    step.watch.settle()
    with pytest.raises(RuntimeError, match="synchronizing"), sync_is_an_error():
        step.watch.found_inf.item()


@pytest.mark.parametrize(
    "kind, method, amp, checkpoints",
    [
        *(("clip", method, "off", checkpoints) for method in METHODS for checkpoints in (False, True)),
        *(("clip", method, "bf16", False) for method in ("nonlinear", "talos", "l-lora")),
        *(("timm", method, "bf16", True) for method in ("talos", "l-lora")),
        *(("bert", method, "off", checkpoints) for method in ("talos", "l-lora") for checkpoints in (False, True)),
        *(("t5", "talos", "off", checkpoints) for checkpoints in (False, True)),
    ],
)
def test_forward_and_backward_compile_without_a_break_and_once(kind, method, amp, checkpoints, tmp_path):
    """With checkpointing each step takes two batches, too."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, batches = case(kind, tmp_path)
        model = without_dropout(checkpointed(model, kind)) if checkpoints else model.eval()
        setup, counter = setup_of(model, method), CompileCounterWithBackend("aot_eager")
        if compiled:
            setup = replace(setup, forward=torch.compile(setup.forward, backend=counter, fullgraph=True))
        accumulate = 2 if checkpoints else 1
        step = Step(setup, model, functional.cross_entropy, clip=1.0, amp=amp, accumulate=accumulate)
        with lean_checkpointing(model):
            take(step, two_of_one_shape(batches[0]), 3, accumulate=accumulate)
        results.append([p.detach().clone() for p in setup.trained.values()])
    assert counter.frame_count == 1
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-3 if amp == "bf16" else 1e-5)


def capturable(kind: str, method: str, folder, amp="bf16", form=lambda setup: setup, checkpoints=False, accumulate=1):
    """A step without dropout whose optimizer may be captured, its learning rate, what trains, and its batches."""
    torch.manual_seed(0)
    model, batches = case(kind, folder)
    model = without_dropout(checkpointed(model, kind) if checkpoints else model)
    setup = form(setup_of(model.to("cuda"), method))
    for group in setup.optimizer.param_groups:
        group["capturable"], group["eps"] = True, 1e-4  # a gradient that is nothing but rounding moves nothing
    step = Step(setup, model, functional.cross_entropy, clip=1.0, amp=amp, accumulate=accumulate)
    given = to_device(two_of_one_shape(batches[0])[:accumulate], torch.device("cuda"))
    return step, torch.tensor(1e-3, device="cuda"), setup.trained, given


def replay_beside(replayed, eager, accumulate=1):
    """A captured step against an eager one; data, labels and learning rate change between replays."""
    (step, rate, found, batches), (eager, eager_rate, expected, eager_batches) = replayed, eager
    graph = captured(partial(take, step, batches, 1, lr=rate, accumulate=accumulate), warmup=3)
    take(eager, eager_batches, 3, lr=eager_rate, accumulate=accumulate)
    for number in range(4):
        for tensor in (rate, eager_rate):
            tensor.fill_(1e-3 / (number + 1))
        for tensor in tree_leaves((batches, eager_batches)):
            tensor.copy_(tensor.flip(-1))
        graph.replay()
        take(eager, eager_batches, 1, lr=eager_rate, accumulate=accumulate)
    assert step.watch.found_inf == 0
    for name, p in found.items():
        torch.testing.assert_close(p, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_is_the_eager_one(kind, method, tmp_path):
    """Forward, backward, clipping and update in one graph."""
    replay_beside(*(capturable(kind, method, tmp_path) for _ in range(2)))


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_with_checkpoints_and_two_batches_is_the_plain_one(kind, method, tmp_path, monkeypatch):
    """Checkpoints keep no random state, which there is no reading of in a capture."""
    runs, plain = [], checkpoint.checkpoint

    def stateless(function, *args, **kwargs):
        runs.append(function)
        return plain(function, *args, **kwargs | {"preserve_rng_state": False})

    for module in ("open_clip.transformer", "torch.utils.checkpoint", "transformers.modeling_utils"):
        monkeypatch.setattr(f"{module}.checkpoint", stateless)
    replay_beside(
        *(capturable(kind, method, tmp_path, "off", checkpoints=is_on, accumulate=2) for is_on in (True, False)),
        accumulate=2,
    )
    assert runs


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind, method, checkpoints",
    [
        *(("clip", method, False) for method in METHODS),
        *((kind, "talos", False) for kind in ("timm", "bert", "t5")),
        *((kind, "talos", True) for kind in ("clip", "timm")),
    ],
)
def test_a_compiled_step_is_captured_too(kind, method, checkpoints, tmp_path):
    """In fp32: in bf16 compiled code rounds less often than eager."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    accumulate = 2 if checkpoints else 1
    forms = (base.compiled, lambda setup: setup)
    replay_beside(
        *(capturable(kind, method, tmp_path, "off", form, checkpoints, accumulate) for form in forms),
        accumulate=accumulate,
    )
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.gpu
def test_a_bad_replay_changes_nothing(tmp_path):
    step, rate, trained, batches = capturable("clip", "talos", tmp_path)
    graph = captured(partial(take, step, batches, 1, lr=rate), warmup=3)
    before = {name: p.detach().clone() for name, p in trained.items()}
    batches[0][0].fill_(float("nan"))
    graph.replay()
    assert step.watch.found_inf == 1
    assert all(torch.equal(p, before[name]) for name, p in trained.items())
