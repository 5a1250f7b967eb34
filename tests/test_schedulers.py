"""Every learning rate scheduler of torch, over MaskedAdam as over AdamW."""

import inspect

import pytest
import torch
from adam_cases import assert_same_on_selected, assert_stepped_by, masks, parameters, run
from torch.optim import AdamW, lr_scheduler
from torch.optim.swa_utils import SWALR

from talos_fast import MaskedAdam

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SWALR": lambda o: SWALR(o, 1e-4, anneal_epochs=3),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.LinearLR(o), lr_scheduler.StepLR(o, 2)]),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 6)], milestones=[2]
    ),
}


def test_every_scheduler_of_torch_is_tested():
    base = (lr_scheduler.LRScheduler, lr_scheduler.ReduceLROnPlateau)
    kinds = [kind for kind in vars(lr_scheduler).values() if inspect.isclass(kind) and issubclass(kind, base)]
    assert {kind.__name__ for kind in kinds} - {"LRScheduler", "_LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(scheduler, lr):
    check_scheduler(scheduler, lr, "cpu", steps=6)


@pytest.mark.parametrize("scheduler, lr", [("OneCycleLR", 1e-2), ("CosineAnnealingLR", torch.tensor(1e-2))], ids=str)
def test_schedulers_reach_the_kernels(scheduler, lr, place):
    """Learning rates and, of OneCycleLR, betas that change at every step."""
    check_scheduler(scheduler, lr, place, steps=4)


def check_scheduler(scheduler, lr, place, steps):
    masked, dense = parameters(place=place), parameters(place=place)
    for optimizer, params in ((MaskedAdam, masked), (AdamW, dense)):
        options = {"masks": masks()} if optimizer is MaskedAdam else {}
        stepped = optimizer(params, lr=lr.clone() if isinstance(lr, torch.Tensor) else lr, **options)
        schedule = SCHEDULERS[scheduler](stepped)
        for step in range(steps):
            run(stepped, params, [step])
            schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
        if optimizer is MaskedAdam:
            assert_stepped_by(stepped, place)
    assert_same_on_selected(masked, dense, place)
