"""What finetune and profile leave of a model: flags, modes and buffers, however those were changed."""

import copy
import os
import signal
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from talos_fast import TalosError, TaskVector
from talos_fast.evaluate import evaluate_along
from talos_fast.restoring import restoring_all_but_parameters, restoring_modes, restoring_parameters


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("moved", torch.zeros(3))
        self.register_buffer("expanded", torch.ones(1).expand(3))
        self.register_buffer("resized", torch.zeros(1))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("absent", None)


def test_buffers_come_back_as_the_same_tensors():
    model = Buffered().eval()
    model.linear.bias.requires_grad_(False)
    model.linear.weight.grad = torch.ones(2, 2)
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    with pytest.raises(ZeroDivisionError), torch.no_grad(), restoring_all_but_parameters(model):
        assert torch.is_grad_enabled() and model.linear.weight.grad is None
        model.train().requires_grad_(True)
        model.moved.add_(1)
        model.resized.resize_(4).fill_(2)
        model.replaced = model.replaced + 1
        raise ZeroDivisionError
    assert not model.training and not model.linear.training and not model.linear.bias.requires_grad
    assert model.linear.weight.requires_grad and model.absent is None
    for name, buffer in model.named_buffers():
        assert buffer is before[name][0] and torch.equal(buffer, before[name][1]), name
    assert model.expanded.stride() == (0,), "what did not move keeps its memory"


class Pressing(TorchFunctionMode):
    """Presses Ctrl-C when a function of torch is called for the first time."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.pressed = function, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is self.function and not self.pressed:
            self.pressed = True
            os.kill(os.getpid(), signal.SIGINT)
        return func(*args, **(kwargs or {}))


def test_parameters_come_back_though_one_presses_meanwhile():
    parameters = dict(nn.Linear(3, 2).named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with pytest.raises(KeyboardInterrupt), Pressing(torch.Tensor.copy_) as pressing, restoring_parameters(parameters):
        for p in parameters.values():
            p.data.mul_(2)
    assert pressing.pressed and all(torch.equal(p, before[name]) for name, p in parameters.items())


def test_a_vector_is_applied_and_reverted_whole():
    base = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    tuned = copy.deepcopy(base)
    for p in tuned.parameters():
        p.data.add_(1)
    vector, model = TaskVector(base, tuned), copy.deepcopy(base)
    for verb, expected in ((vector.apply_to, tuned), (vector.revert, base)):
        with pytest.raises(KeyboardInterrupt), Pressing(torch.Tensor.copy_) as pressing:
            verb(model)
        assert pressing.pressed
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("batches", [1, 0])
def test_a_model_is_as_before_that_was_evaluated_along_a_vector(batches):
    base, data = nn.Linear(4, 3), [(torch.randn(5, 4), torch.arange(5) % 3)] * batches
    before, vector = copy.deepcopy(base.state_dict()), TaskVector(base, nn.Linear(4, 3))
    refused = nullcontext() if data else pytest.raises(TalosError, match="there is no batch to evaluate on")
    with refused:
        evaluate_along(base, vector, data, [0.5, 1.0])
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_modes_come_back_though_one_presses_meanwhile():
    class Late(nn.Linear):
        def train(self, mode: bool = True):
            if mode:
                os.kill(os.getpid(), signal.SIGINT)
            return super().train(mode)

    model = nn.Sequential(nn.Linear(2, 2), Late(2, 2), nn.Linear(2, 2))
    with pytest.raises(KeyboardInterrupt), restoring_modes(model):
        model.eval()
    assert all(module.training for module in model.modules())


def test_modes_come_back_though_a_module_does_not_listen():
    class Stubborn(nn.Sequential):
        def train(self, mode: bool = True):
            return super().train(False)

    model = Stubborn(nn.Linear(2, 2))
    with restoring_modes(model):
        model.eval()
    assert model.training and model[0].training


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
def test_gradients_of_meanwhile_are_cleared(mode):
    model = Buffered()
    with mode(), restoring_all_but_parameters(model):
        model.linear(torch.ones(1, 2)).sum().backward()
    assert model.linear.weight.grad is None and model.linear.bias.grad is None
