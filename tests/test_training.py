"""The embedded CLIP trained by MaskedAdam: with a full mask as by AdamW, with a TaLoS mask nowhere else."""

import copy

import pytest
import torch
from adam_cases import assert_stepped_by, device_of
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from talos_fast import MaskedAdam, calibrate
from talos_fast.demo import tasks
from talos_fast.demo.model import load_backbone

STEPS, BATCH = 200, 4
# The interpreter takes seconds for a step of the whole model.
STEPS_ON = {"cpu": STEPS, "interpreter": 4, "cuda": STEPS}


@pytest.fixture(autouse=True)
def one_thread():
    """So small a model gains nothing from a second thread, and on a busy machine loses much by waiting for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def problem():
    """The classifier of drawn shapes, its batches, and a TaLoS mask of a tenth."""
    backbone, task = load_backbone(), tasks.shapes()
    model = backbone.classifier(task)
    batches = list(backbone.batches(task.train, batch_size=BATCH))
    mask = calibrate(model, batches[:8], density=0.1, rounds=2, progress=False)
    return model, batches, mask


def trained(problem, make, steps: int, device: str = "cpu"):
    """The parameters after some steps, by name, the optimizer, and the loss of each step."""
    model, batches, _ = problem
    model = copy.deepcopy(model).to(device).train()
    optimizer = make([(name, p) for name, p in model.named_parameters() if p.requires_grad])
    losses = []
    for step in range(steps):
        images, labels = batches[step % len(batches)]
        loss = cross_entropy(model(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return dict(model.named_parameters()), optimizer, losses


def distance(first, second) -> float:
    return sum((first[name] - second[name]).detach().square().sum() for name in first).sqrt().item()


def test_a_full_mask_trains_as_adamw(problem):
    """In plain torch bit for bit, for 200 steps.

    The operator rounds once otherwise, and training amplifies any rounding. How much is measured: by the distance
    between torch's own for-loop and fused AdamW, which also compute the same step in other roundings.
    """

    def masked(**flags):
        return lambda named: MaskedAdam(
            named, lr=2e-4, masks={name: torch.ones_like(p, dtype=torch.bool) for name, p in named}, **flags
        )

    loop, _, losses = trained(problem, lambda named: AdamW(named, lr=2e-4, foreach=False), STEPS)
    fused, _, _ = trained(problem, lambda named: AdamW(named, lr=2e-4, fused=True), STEPS)
    plain, _, plain_losses = trained(problem, masked(fused=False), STEPS)
    compiled, _, _ = trained(problem, masked(), STEPS)
    start = dict(problem[0].named_parameters())
    assert plain_losses == losses and all(torch.equal(plain[name], loop[name]) for name in loop)
    assert sum(losses[-50:]) < 0.7 * sum(losses[:50])
    assert distance(compiled, loop) < min(3 * distance(fused, loop), 0.05 * distance(start, loop))


CASES = [("cpu", {}), ("cpu", {"fused": False}), pytest.param("cuda", {}, marks=pytest.mark.gpu)]
CASES += [] if torch.cuda.is_available() else [("interpreter", {})]


@pytest.mark.parametrize("place, flags", CASES, indirect=["place"], ids=str)
def test_a_talos_mask_moves_nothing_else(problem, place, flags):
    model, _, mask = problem

    def make(named):
        return MaskedAdam(named, lr=4e-3, weight_decay=0.1, masks=mask, **flags)

    params, optimizer, _ = trained(problem, make, STEPS_ON[place], device_of(place))
    moved = 0
    for name, before in model.named_parameters():
        still = ~mask[name] if name in mask else torch.zeros_like(before, dtype=torch.bool)
        after = params[name].detach().cpu()
        assert torch.equal(after[still], before[still]), name
        moved += int((after != before).sum())
    assert moved > 0.9 * mask.selected
    if not flags:
        assert_stepped_by(optimizer, place)
