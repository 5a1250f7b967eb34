"""Models with random weights, and batches for them, of which `calibration.py` scores the parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from workloads import LARGE_T5

from talos_fast.sensitivity.selection import maskable_parameters


@dataclass
class Subject:
    """A model with random weights, and a batch of N random inputs."""

    model: nn.Module
    batch: Any
    size: int

    def to(self, device: str) -> "Subject":
        from talos_fast.batch import to_device

        return Subject(self.model.to(device), to_device(self.batch, torch.device(device)), self.size)

    @cached_property
    def scored(self) -> dict[str, nn.Parameter]:
        """Once for all: by then one of the ways may have frozen some."""
        return maskable_parameters(self.model)

    def train_scored(self) -> None:
        """Asks for the gradients of all scored parameters, and of no other."""
        names = set(self.scored)
        for name, p in self.model.named_parameters():
            p.requires_grad_(name in names)


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


def bert(**config: Any) -> Callable[[int], Subject]:
    def make(size: int) -> Subject:
        from transformers import BertConfig, BertForSequenceClassification

        model = BertForSequenceClassification(BertConfig(num_labels=10, **config))
        batch = {"input_ids": torch.randint(1, 30000, (size, 128)), "labels": torch.randint(0, 10, (size,))}
        return Subject(model, batch, size)

    return make


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


def t5(**config: Any) -> Callable[[int], Subject]:
    def make(size: int) -> Subject:
        from transformers import T5Config, T5ForConditionalGeneration

        network = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **config))
        batch = {"input_ids": torch.randint(1, 30000, (size, 128)), "labels": torch.randint(0, 2, (size,))}
        return Subject(Choices(network), batch, size)

    return make


GATED = {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 4, "num_heads": 12, "feed_forward_proj": "gated-gelu"}

SUBJECTS: dict[str, Callable[[int], Subject]] = {
    "ViT-B-32": open_clip(768, 12, 32, 512),
    "ViT-B-32-timm": timm_vit,
    "ViT-L-14": open_clip(1024, 24, 14, 768),
    "BERT-6": bert(num_hidden_layers=6),
    "T5-4-4": t5(**GATED),
    "T5-Large": t5(**LARGE_T5),
    "smoke": open_clip(64, 2, 8, 32, side=32),
}
