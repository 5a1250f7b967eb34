"""Ways of scoring a batch, for `calibration.py`: ours, what it is measured against, and other libraries."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from subjects import Subject
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from talos_fast.forward import default_forward
from talos_fast.ranks import Ranks
from talos_fast.sensitivity.scorer import Scorer

Step = Callable[[], Any]


def plain(subject: Subject) -> Step:
    """One batched forward-backward with the gradients of all scored parameters: what a training step costs."""
    subject.train_scored()

    def step() -> None:
        default_forward(subject.model, subject.batch).sum().backward()
        for p in subject.model.parameters():
            p.grad = None

    return step


def accumulating(subject: Subject) -> Step:
    """Two of `plain` that add up their gradients: the second peaks with 4 bytes a score beside its activations."""
    subject.train_scored()

    def step() -> None:
        for _ in range(2):
            default_forward(subject.model, subject.batch).sum().backward()

    return step


def forward_alone(subject: Subject) -> Step:
    """A forward that keeps what the backward for all scored parameters will need."""
    subject.train_scored()
    return lambda: default_forward(subject.model, subject.batch)


def activations_only(subject: Subject) -> Step:
    """Forward and the gradients of activations: what any method that shares one backward must pay."""
    model = subject.model
    first = next(iter(subject.scored))

    def step() -> None:
        for name, p in model.named_parameters():
            p.requires_grad_(name == first)
        default_forward(model, subject.batch).sum().backward()
        model.zero_grad()
        subject.train_scored()

    return step


def ours(subject: Subject, precision: str) -> Step:
    """One batch in the steady state: the model has been examined, the scores exist."""
    scorer = Scorer(subject.model, subject.scored, default_forward, "fisher", 1, precision)
    ledger = scorer.ledger(None, None)
    step = lambda: scorer.score([subject.batch], lambda _: ledger, 0, Ranks())  # noqa: E731
    step()
    return step


def by_vmap(subject: Subject, chunk: int) -> Step:
    """torch.func: vmap of grad, ``chunk`` samples at a time, squared and summed."""
    model, names = subject.model, set(subject.scored)
    tracked = {name: p.detach() for name, p in model.named_parameters() if name in names}
    mapped = isinstance(subject.batch, dict)
    inputs = subject.batch["input_ids"] if mapped else subject.batch[0]
    scores = {name: torch.zeros_like(p) for name, p in tracked.items()}

    def scalar(params: dict[str, Tensor], x: Tensor) -> Tensor:
        output = functional_call(model, params, (x[None],))
        return getattr(output, "logits", output)[0, 0]

    def step() -> None:
        for part in inputs.split(chunk):
            for name, g in vmap(grad(scalar), in_dims=(None, 0))(tracked, part).items():
                scores[name] += g.square_().sum(0)

    return step


def released(subject: Subject) -> Step:
    """The paper's released loop: a backward a sample through the whole batch's graph, squares copied to the host."""
    model, scored = subject.model, subject.scored
    scores = {name: torch.zeros(p.shape) for name, p in scored.items()}

    def step() -> None:
        logits = default_forward(model, subject.batch)
        labels = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
        for n, label in enumerate(labels.tolist()):
            model.zero_grad(set_to_none=True)
            logits[n, label].backward(retain_graph=True)
            for name, p in scored.items():
                if p.grad is not None:
                    scores[name] += p.grad.square().to("cpu", copy=True)

    return step


def by_opacus(subject: Subject) -> Step:
    """Opacus keeps the per-sample gradients of every layer; squared and summed afterwards."""
    from opacus.grad_sample import GradSampleModule

    subject.train_scored()
    scored = subject.scored
    wrapped = GradSampleModule(subject.model.train(), loss_reduction="sum", strict=False)
    scores = {name: torch.zeros_like(p) for name, p in scored.items()}

    def step() -> None:
        wrapped(subject.batch[0])[:, 0].sum().backward()
        for name, p in scored.items():
            scores[name] += p.grad_sample.square().sum(0)
            p.grad_sample = p.grad = None

    return step


def by_backpack(subject: Subject) -> Step:
    """BackPACK's SumGradSquared, on the linear and convolution layers alone: it has no rule for norms."""
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    layers = [m for m in subject.model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for p in subject.model.parameters():
        p.requires_grad_(False)
    for layer in layers:
        extend(layer.requires_grad_(True))
    scores: dict[nn.Parameter, Tensor] = {}

    def step() -> None:
        with backpack(SumGradSquared()):
            subject.model(subject.batch[0])[:, 0].sum().backward()
        for layer in layers:
            for p in layer.parameters():
                scores[p] = scores.get(p, 0) + p.sum_grad_squared
                p.grad = None
                del p.sum_grad_squared

    return step


def contenders(group: str) -> Iterator[tuple[str, Callable[[Subject], Step]]]:
    """Name and maker of each way of a group: "ours", "peers" or "released"."""
    if group == "ours":
        yield "activation gradients alone", activations_only
        yield "talos-fast, full", lambda subject: ours(subject, "full")
        yield "talos-fast, bf16", lambda subject: ours(subject, "bf16")
    elif group == "peers":
        yield "talos-fast, full", lambda subject: ours(subject, "full")
        yield "vmap(grad), 4 at a time", lambda subject: by_vmap(subject, 4)
        yield "BackPACK, no norms", by_backpack
        yield "Opacus", by_opacus
    elif group == "released":
        yield "talos-fast, full", lambda subject: ours(subject, "full")
        yield "as released", released
