"""Arguments that are no numbers: named in one line, wherever they are given."""

import re
from decimal import Decimal

import numpy as np
import pytest
import torch
from torch import nn

import talos_fast as talos
from talos_fast import Mask, TalosError


def net() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


BATCHES = [(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))]
SCORES = {"w": torch.rand(8)}


def finetune(**options):
    talos.finetune(net(), BATCHES, method="nonlinear", progress=False, **{"steps": 1, **options})


def calibrate(**options):
    talos.calibrate(net(), BATCHES, progress=False, **options)


@pytest.mark.parametrize("call, name, value", [
    (finetune, "lr", "1e-3"), (finetune, "lr", True), (finetune, "clip", "a"), (finetune, "weight_decay", "0.1"),
    (calibrate, "damage", "x"), (calibrate, "density", "0.1"), (calibrate, "density", True),
    (calibrate, "sparsity", ".5"), (lambda **o: Mask.from_scores(SCORES, **o), "density", [0.1]),
])  # fmt: skip
def test_what_is_no_number(call, name, value):
    kind = type(value).__name__
    with pytest.raises(TalosError, match=rf"^{name}=.*: must be a number, not a {kind}$"):
        call(**{name: value})


@pytest.mark.parametrize("value", [torch.tensor(0.5), np.array(0.5), np.float32(0.5), Decimal("0.5")], ids=str)
def test_numbers_of_any_kind(value):
    assert Mask.from_scores(SCORES, density=value).selected == 4
    calibrate(density=value, damage=value)
    if not isinstance(value, Decimal):
        finetune(lr=value, clip=value, weight_decay=value)


@pytest.mark.parametrize("call, name, value, least", [
    (finetune, "steps", 2.5, 1), (finetune, "steps", True, 1), (finetune, "warmup", -1, 0),
    (finetune, "accumulate", "2", 1), (calibrate, "rounds", 2.5, 1), (calibrate, "rounds", True, 1),
    (calibrate, "samples_per_input", 1.5, 1), (calibrate, "samples_per_input", 0, 1),
])  # fmt: skip
def test_what_is_no_integer(call, name, value, least):
    with pytest.raises(TalosError, match=f"^{name}=.*: must be an integer, at least {least}$"):
        call(**{name: value})


@pytest.mark.parametrize("loss, said", [(3.0, "is a float"), (torch.ones(2), "has shape (2,)")], ids=str)
def test_a_loss_is_a_tensor_of_one_number(loss, said):
    message = f"epoch 0, batch 0: the loss {said}; give a tensor of one number"
    with pytest.raises(TalosError, match=re.escape(message)):
        finetune(loss=lambda logits, labels: loss)
