"""Text encoders of Hugging Face (BERT, RoBERTa, MiniLM ...): sentence embeddings against class-name embeddings."""

import json
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from talos_fast.errors import TalosError, needs
from talos_fast.models.base import Backbone, Classifier, fill, warn_of_twins
from talos_fast.models.heads import CosineHead
from talos_fast.models.text import check_texts, from_pretrained, tokenize
from talos_fast.modules import device_of
from talos_fast.restoring import restoring_modes
from talos_fast.tasks.base import Inputs, Task

SCALE = 20.0
"""Inverse temperature: that of the sentence encoders' own contrastive training (sentence-transformers' default)."""

Pooling = Literal["mean", "cls"]


class TextClassifier(Classifier):
    """A text encoder, pooled to one vector a text.

    Args:
        encoder: a Hugging Face encoder; kept as it is, so that its `state_dict()` and `save_pretrained` stay native.
        head: maps vectors of shape (N, D) to logits of shape (N, K).
        pooling: "mean" over the tokens of the text, or "cls", its first token.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module, pooling: Pooling = "mean") -> None:
        super().__init__(encoder, head)
        self.pooling: Pooling = pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids and mask, int64, shape (N, T), to logits of shape (N, K)."""
        logits: Tensor = self.head(embed(self.encoder, input_ids, attention_mask, self.pooling))
        return logits


def embed(encoder: nn.Module, input_ids: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector a text, shape (N, D), not normalised."""
    hidden: Tensor = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    if pooling == "cls":
        return hidden[:, 0]
    weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


class EncoderBackbone(Backbone):
    """A Hugging Face text encoder without its pooler, which sentence embeddings do not use.

    The head of a task holds the mean embedding of each class name in the task's templates ("{}" where it has none),
    taken before fine-tuning.

    Args:
        name: for messages.
        encoder: gives `last_hidden_state` of shape (N, T, D).
        tokenizer: its `transformers` tokenizer.
        pooling: how tokens become a vector.
    """

    modality = "text"

    def __init__(self, name: str, encoder: nn.Module, tokenizer: Any, pooling: Pooling = "mean") -> None:
        if getattr(encoder, "pooler", None) is not None:
            encoder.register_module("pooler", None)  # it would be a trainable parameter without a gradient
        super().__init__(name, encoder.eval())
        self.tokenizer = tokenizer
        self.pooling: Pooling = pooling
        config: Any = encoder.config
        positions = getattr(config, "max_position_embeddings", None) or 512
        table: Any = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
        if getattr(table, "padding_idx", None) is not None:  # RoBERTa counts from after the padding token's number
            positions -= table.padding_idx + 1
        self.max_length = int(min(tokenizer.model_max_length, positions))

    def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
        """Texts to `input_ids` and `attention_mask`, int64, shape (N, T)."""
        return tokenize(self.tokenizer, check_texts(inputs), self.max_length)

    def classifier(self, task: Task) -> TextClassifier:
        """The encoder with the class-name head of `task`."""
        self._check_modality(task.modality)
        if task.has_choices:
            raise TalosError(
                f"task {task.name!r}: its answers differ from example to example; use a T5, not {self.name}"
            )
        warn_of_twins(task, self.prepare(list(task.class_names))["input_ids"], self.name)
        head = CosineHead(self._class_embeddings(task), SCALE)
        return TextClassifier(self.encoder, head, self.pooling).eval()

    @torch.no_grad()
    def _class_embeddings(self, task: Task) -> Tensor:
        templates = task.templates or ("{}",)
        tokens = self.prepare(fill(templates, task.class_names))
        ids, mask = (tokens[key].to(device_of(self.encoder)) for key in ("input_ids", "attention_mask"))
        with restoring_modes(self.encoder):
            self.encoder.eval()
            vectors = functional.normalize(embed(self.encoder, ids, mask, self.pooling), dim=-1)
        return vectors.view(task.num_classes, len(templates), -1).mean(dim=1)


def load(name: str, device: torch.device, dtype: torch.dtype) -> EncoderBackbone:
    """Load a text encoder with its weights and tokenizer.

    Pooling is what the model's `1_Pooling/config.json` (of sentence-transformers) says, else the mean.

    Args:
        name: a directory with `config.json`, or a Hub id.
        device: where the encoder goes.
        dtype: of the encoder.

    Raises:
        TalosError: files that are missing or damaged, or an encoder-decoder.
    """
    with needs("t5"):
        from transformers import AutoModel

    encoder, tokenizer = from_pretrained(AutoModel, name, dtype)
    if encoder.config.is_encoder_decoder:
        raise TalosError(f"hf:{name}: found {encoder.config.model_type}, an encoder-decoder; use t5:{name} for a T5")
    return EncoderBackbone(f"hf:{name}", encoder.to(device), tokenizer, _pooling(name))


def _pooling(name: str) -> Pooling:
    from transformers.utils.hub import cached_file

    path = cached_file(name, "1_Pooling/config.json", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return "mean"
    try:
        with open(path, encoding="utf-8") as file:
            config = dict(json.load(file))
    except (OSError, TypeError, ValueError) as error:
        raise TalosError(f"{path}: not a JSON object ({error}); fetch the model again") from error
    if config.get("pooling_mode_mean_tokens"):
        return "mean"
    if config.get("pooling_mode_cls_token"):
        return "cls"
    raise TalosError(f"{path}: asks for a pooling other than mean or CLS token; use another model")
