"""Models, batches and ways of scoring them, for `calibration.py`. Each way is a function that scores one batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from talos_fast.forward import default_forward
from talos_fast.sensitivity.engine import Scorer
from talos_fast.sensitivity.ranks import Ranks
from talos_fast.sensitivity.selection import maskable_parameters

Step = Callable[[], Any]


@dataclass
class Subject:
    """A model with random weights, and a batch of N random inputs."""

    model: nn.Module
    batch: Any
    size: int

    def to(self, device: str) -> "Subject":
        from talos_fast.forward import to_device

        return Subject(self.model.to(device), to_device(self.batch, torch.device(device)), self.size)

    @property
    def scored(self) -> dict[str, nn.Parameter]:
        return maskable_parameters(self.model)


class Tower(nn.Module):
    """An image encoder with a frozen head of 10 classes."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("directions", torch.randn(width, 10) / width**0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images) @ self.directions


def images(size: int, side: int = 224) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, side, side), torch.randint(0, 10, (size,))


def open_clip(width: int, layers: int, patch: int, output: int, side: int = 224) -> Callable[[int], Subject]:
    def make(size: int) -> Subject:
        from open_clip.transformer import VisionTransformer

        encoder = VisionTransformer(side, patch, width, layers, width // 64, 4.0, output_dim=output)
        return Subject(Tower(encoder, output), images(size, side), size)

    return make


def timm_vit(size: int) -> Subject:
    """ViT-B/32 with a linear qkv, which the peers' libraries can take apart; open_clip's attention they cannot."""
    import timm

    return Subject(Tower(timm.create_model("vit_base_patch32_224", num_classes=0), 768), images(size), size)


def bert(size: int) -> Subject:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(num_hidden_layers=6, num_labels=10))
    batch = {"input_ids": torch.randint(1, 30000, (size, 128)), "labels": torch.randint(0, 10, (size,))}
    return Subject(model, batch, size)


class Choices(nn.Module):
    """Scores of two answers of 32 tokens each."""

    def __init__(self, t5: nn.Module) -> None:
        super().__init__()
        self.t5 = t5
        self.register_buffer("answers", torch.randint(1, 30000, (2, 32)))

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.t5.encoder(input_ids=input_ids)[0].repeat_interleave(2, 0)
        answers = self.answers.repeat(len(input_ids), 1)
        logits = self.t5(encoder_outputs=(hidden,), labels=answers).logits
        return (logits.gather(-1, answers[..., None])[..., 0] - logits.logsumexp(-1)).view(-1, 2, 32).sum(-1)


def t5(size: int) -> Subject:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=768, d_kv=64, d_ff=2048, num_layers=4, num_heads=12, feed_forward_proj="gated-gelu",
                      decoder_start_token_id=0)  # fmt: skip
    batch = {"input_ids": torch.randint(1, 30000, (size, 128)), "labels": torch.randint(0, 2, (size,))}
    return Subject(Choices(T5ForConditionalGeneration(config)), batch, size)


SUBJECTS: dict[str, Callable[[int], Subject]] = {
    "ViT-B-32": open_clip(768, 12, 32, 512),
    "ViT-B-32-timm": timm_vit,
    "ViT-L-14": open_clip(1024, 24, 14, 768),
    "BERT-6": bert,
    "T5-4-4": t5,
    "smoke": open_clip(64, 2, 8, 32, side=32),
}


def plain(subject: Subject) -> Step:
    """One batched forward-backward with the gradients of all scored parameters: what a training step costs."""
    names = set(subject.scored)
    for name, p in subject.model.named_parameters():
        p.requires_grad_(name in names)

    def step() -> None:
        default_forward(subject.model, subject.batch).sum().backward()
        for p in subject.model.parameters():
            p.grad = None

    return step


def forward_alone(subject: Subject) -> Step:
    """A forward that keeps what the backward for all scored parameters will need."""
    names = set(subject.scored)
    for name, p in subject.model.named_parameters():
        p.requires_grad_(name in names)
    return lambda: default_forward(subject.model, subject.batch)


def activations_only(subject: Subject) -> Step:
    """Forward and the gradients of activations: what any method that shares one backward must pay."""
    model = subject.model
    names = list(subject.scored)

    def step() -> None:
        for name, p in model.named_parameters():
            p.requires_grad_(name == names[0])
        default_forward(model, subject.batch).sum().backward()
        for name, p in model.named_parameters():
            p.grad = None
            p.requires_grad_(name in names)

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

    scored = subject.scored
    for name, p in subject.model.named_parameters():
        p.requires_grad_(name in scored)
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
