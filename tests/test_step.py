"""A step that the host reads later: bad batches are named, and change no parameter, whatever the lag."""

from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

from talos_fast import MaskedAdam, TalosError
from talos_fast.methods import Setup
from talos_fast.ranks import Ranks
from talos_fast.step import Step
from talos_fast.watch import Watch

KINDS = ("logits", "one logit", "loss", "loss alone", "gradient", "norm", "labels")
SAID = {
    "logits": "logits hold NaN", "one logit": "logits hold NaN", "loss": "the loss is inf",
    "loss alone": "the loss is inf", "gradient": "norm of the gradient is",
    "norm": "norm of the gradient is inf", "labels": "labels 0 … 7",
}  # fmt: skip


class Explode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * float("inf")


def make(kind: str | None, lag: int, masked: bool, bad_at: int = 2):
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    masks = {name: torch.rand(p.shape) < 0.5 for name, p in net.named_parameters()} if masked else None
    optimizer = MaskedAdam(list(net.named_parameters()), lr=1e-2, masks=masks, fused=True)
    calls = {"forward": -1}

    def forward(model, batch):
        calls["forward"] += 1
        logits = model(batch[0])
        if calls["forward"] == bad_at and kind == "logits":
            return logits * float("nan")
        if (
            calls["forward"] == bad_at and kind == "one logit"
        ):  # of a class that is no label's: loss and gradient are finite
            return logits.masked_fill(torch.arange(12).view(4, 3) == 1, -torch.inf)
        if calls["forward"] == bad_at and kind == "norm":  # of finite entries
            logits.register_hook(lambda g: g * 1e30)
        return Explode.apply(logits) if calls["forward"] == bad_at and kind == "gradient" else logits

    def loss(logits, labels):
        value = nn.functional.cross_entropy(logits, labels)
        if calls["forward"] == bad_at and kind == "loss alone":
            return value + float("inf")
        return value * float("inf") if calls["forward"] == bad_at and kind == "loss" else value

    clip = partial(optimizer.clip_grad_norm_, entries="selected")
    setup = Setup(dict(net.named_parameters()), optimizer, forward, dict, clip=clip)
    return net, Step(setup, net, loss, clip=1.0, lag=lag)


def batch(number: int, kind: str | None = None):
    generator = torch.Generator().manual_seed(number)
    labels = torch.tensor([0, 1, 2, 7 if kind == "labels" and number == 2 else 0])
    return torch.randn(4, 4, generator=generator), labels


def take(step: Step, numbers: range, kind: str | None = None, then=None) -> None:
    for number in numbers:
        step.backward(batch(number, kind), f"batch {number}")
        step.clip(f"batch {number}", then)
        step.update(1e-2)
        step.release()
    step.watch.settle()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lag", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_batch_is_named_and_changes_nothing(kind, lag, masked):
    good, step = make(None, 0, masked)
    take(step, range(2))
    net, step = make(kind, lag, masked)
    known = []
    with pytest.raises(TalosError, match=f"batch 2: .*{SAID[kind]}"):
        take(step, range(5), kind, then=lambda: known.append(1))
    for p, expected in zip(net.parameters(), good.parameters(), strict=True):
        assert torch.equal(p, expected)
    assert len(known) == 2


@pytest.mark.parametrize("masked", [False, True])
def test_the_lag_changes_no_bit(masked):
    nets = []
    for lag in (0, 4):
        net, step = make(None, lag, masked)
        take(step, range(6))
        nets.append(net)
    for first, second in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(first, second)


def test_accumulated_batches_weigh_as_one():
    net, step = make(None, 0, False)
    x, labels = batch(0)
    (whole,) = torch.autograd.grad(nn.functional.cross_entropy(net(x), labels), net.weight)
    halves = Step(step._setup, net, nn.functional.cross_entropy, clip=None, accumulate=2)
    for rows in (slice(0, 2), slice(2, 4)):
        halves.backward((x[rows], labels[rows]), "half")
    torch.testing.assert_close(net.weight.grad, whole)


def test_a_setup_clips_in_its_own_way():
    net, limits = nn.Linear(4, 3), []
    setup = Setup(
        dict(net.named_parameters()), torch.optim.SGD(net.parameters()), lambda model, batch: model(batch[0]), dict,
        clip=lambda limit: limits.append(limit) or torch.tensor(0.5),
    )  # fmt: skip
    Step(setup, net, nn.functional.cross_entropy, clip=0.25).clip("batch 0")
    assert limits == [0.25]


def test_all_groups_of_an_optimizer_have_the_rate():
    net = nn.Linear(4, 3)
    optimizer = torch.optim.SGD([{"params": [p]} for p in net.parameters()], lr=5.0)
    setup = Setup(dict(net.named_parameters()), optimizer, lambda model, batch: model(batch[0]), dict)
    Step(setup, net, nn.functional.cross_entropy, clip=None).update(0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]


def test_the_loss_of_float64_is_float64():
    net, step = make(None, 0, False)
    net.double()
    loss = step.forward_loss((batch(0)[0].double(), batch(0)[1]), "batch 0")
    assert loss.dtype is step.last_loss.dtype is torch.float64


def test_labels_are_integers_of_any_width_and_a_loss_may_be_a_list_of_one():
    _, step = make(None, 0, False)
    x, labels = batch(0)
    expected = step.forward_loss((x, labels), "batch 0").detach()
    step._loss = lambda logits, labels: nn.functional.cross_entropy(logits, labels)[None]
    assert step.forward_loss((x, labels.to(torch.int32)), "batch 0").shape == (1,)
    assert torch.equal(step.last_loss, expected)


def test_an_optimizer_that_cannot_skip_is_read_at_once():
    net = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    setup = Setup(dict(net.named_parameters()), optimizer, lambda model, batch: model(batch[0]) * float("nan"), dict)
    before = [p.detach().clone() for p in net.parameters()]
    step = Step(setup, net, nn.functional.cross_entropy, clip=None)
    with pytest.raises(TalosError, match="batch 0: the logits"):
        step.backward(batch(0), "batch 0")
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("label", [-1, 3])
def test_the_nearest_labels_out_of_range_are_skipped_too(label):
    net, step = make(None, 4, True)
    before = [p.detach().clone() for p in net.parameters()]
    x, labels = batch(0)
    labels[0] = label
    step.backward((x, labels), "batch 0")
    step.clip("batch 0")
    step.update(0.1)
    assert all(map(torch.equal, net.parameters(), before))
    with pytest.raises(TalosError, match="batch 0: labels"):
        step.watch.settle()


@pytest.mark.parametrize("fails", [False, True])
def test_the_optimizer_keeps_no_flag_of_a_step(fails):
    def refuse(*_):
        raise ZeroDivisionError

    _, step = make(None, 0, True)
    optimizer = step._setup.optimizer
    if fails:
        optimizer.register_step_pre_hook(refuse)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        take(step, range(1))
    assert not hasattr(optimizer, "found_inf")


def test_notes_are_read_in_order_and_the_first_bad_one_speaks():
    watch, read = Watch(torch.device("cpu"), lag=3), []

    def check(found):
        read.append(found[0])
        if found[0] < 0:
            raise TalosError(f"bad {found[0]}")

    for value in (1.0, -2.0, -3.0):
        watch.note(torch.tensor([value]), torch.tensor(value < 0), check)
    assert read == [] and watch.found_inf == 1
    with pytest.raises(TalosError, match=r"bad -2\.0"):
        watch.settle()
    watch.settle()
    assert read == [1.0, -2.0]


class OfTwo(Ranks):
    """One of two ranks, the other of which has a bad batch at its third step."""

    def __init__(self) -> None:
        super().__init__()
        self.world, self.shared = 2, 0

    def average(self, tensors: Iterable[torch.Tensor]) -> None:
        *_, bad = tensors
        self.shared += 1
        bad.fill_(0.5 if self.shared > 2 else 0.0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lag", [0, 6])
def test_a_bad_batch_of_another_rank_is_none_here_either(lag, masked):
    good, step = make(None, 0, masked)
    take(step, range(2))
    net, step = make(None, lag, masked)
    ranks, known = OfTwo(), []
    with pytest.raises(TalosError, match="batch 2: the batch of another rank is bad, and the step was not taken"):
        for number in range(6):
            step.backward(batch(number), f"batch {number}")
            step.share(ranks, f"batch {number}")
            step.clip(f"batch {number}", lambda: known.append(None))
            step.update(1e-2)
            step.release()
    assert len(known) == 2 and ranks.shared == (5 if lag else 3)
    for p, q in zip(net.parameters(), good.parameters(), strict=True):
        assert torch.equal(p, q)
