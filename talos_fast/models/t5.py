"""T5: answer choices scored by the log-probability of their tokens, as T0 and TaLoS do."""

from typing import Any

import torch
from torch import Tensor, nn

from talos_fast.errors import TalosError, needs
from talos_fast.models.base import Backbone, Classifier
from talos_fast.models.heads import ChoiceHead
from talos_fast.models.text import check_texts, from_pretrained, tokenize
from talos_fast.modules import device_of
from talos_fast.tasks.base import Inputs, Split, Task

MODEL_TYPES = ("t5", "mt5", "umt5")
"""What `model_type` of a Hugging Face configuration may say."""

MAX_LENGTH = 128
"""Longest input in tokens (TaLoS's training setting); the rest is cut off."""


class T5Choices(Classifier):
    """Scores f(x)_k = sum over the tokens of choice k of log p(token | x, earlier tokens).

    The text is encoded once and shared by its choices. No length normalisation.

    Args:
        encoder: the whole T5 (encoder and decoder); kept as it is, so its `state_dict()` stays native.
        head: the choices of the task.
    """

    head: ChoiceHead

    def forward(self, input_ids: Tensor, attention_mask: Tensor, choice_ids: Tensor | None = None) -> Tensor:
        """Scores of the choices.

        Args:
            input_ids: of the texts, int64, shape (N, S).
            attention_mask: 1 for tokens, 0 for padding, int64, shape (N, S).
            choice_ids: choices of their own for each text, padded with the padding token, int64, shape (N, K, T);
                by default those of the head for every text.

        Returns:
            Shape (N, K).
        """
        from transformers.modeling_outputs import BaseModelOutput

        model: Any = self.encoder
        if choice_ids is None:
            choice_ids = self.head.choice_ids.expand(len(input_ids), -1, -1)
        n, k, t = choice_ids.shape
        hidden = model.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits: Tensor = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden.repeat_interleave(k, dim=0)),
            attention_mask=attention_mask.repeat_interleave(k, dim=0),
            decoder_input_ids=model.prepare_decoder_input_ids_from_labels(choice_ids.reshape(n * k, t)),
            use_cache=False,
        ).logits
        scores: Tensor = self.head(logits.view(n, k, t, -1), choice_ids)
        return scores


class T5Backbone(Backbone):
    """A T5, whose tasks are answered with the class names themselves (end-of-sequence token included).

    Args:
        name: for messages.
        encoder: `transformers.T5ForConditionalGeneration`.
        tokenizer: its `transformers` tokenizer.
    """

    modality = "text"

    def __init__(self, name: str, encoder: nn.Module, tokenizer: Any) -> None:
        super().__init__(name, encoder.eval())
        self.tokenizer = tokenizer

    def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
        """Texts to `input_ids` and `attention_mask`, int64, shape (N, T)."""
        return tokenize(self.tokenizer, check_texts(inputs), MAX_LENGTH)

    def _batch(self, split: Split) -> dict[str, Tensor]:
        batch = {**self.prepare(split.inputs), "labels": torch.from_numpy(split.labels)}
        if split.choices is not None:
            texts = [text for row in split.choices for text in row]
            ids = tokenize(self.tokenizer, texts, MAX_LENGTH)["input_ids"]
            batch["choice_ids"] = ids.view(len(split), -1, ids.shape[-1])
        return batch

    def classifier(self, task: Task) -> T5Choices:
        """The T5 with the class names of `task` as choices; they yield to choices that the examples bring."""
        self._check_modality(task.modality)
        ids = tokenize(self.tokenizer, list(task.class_names), MAX_LENGTH)["input_ids"]
        if not task.has_choices and len({tuple(choice) for choice in ids.tolist()}) < len(ids):
            raise TalosError(
                f"task {task.name!r}: some class names have the same tokens in {self.name}, such as unknown words; "
                "choose class names that its tokenizer tells apart"
            )
        return T5Choices(self.encoder, ChoiceHead(ids, self.tokenizer.pad_token_id).to(device_of(self.encoder))).eval()


def load(name: str, device: torch.device, dtype: torch.dtype) -> T5Backbone:
    """Load a T5 (also v1.1, flan-T5, mT5) with its weights and tokenizer.

    Args:
        name: a directory with `config.json`, or a Hub id.
        device: where it goes.
        dtype: of the weights.

    Raises:
        TalosError: files that are missing or damaged, or another architecture.
    """
    with needs("t5"):
        from transformers import AutoModelForSeq2SeqLM

    encoder, tokenizer = from_pretrained(AutoModelForSeq2SeqLM, name, dtype)
    if encoder.config.model_type not in MODEL_TYPES:
        raise TalosError(f"t5:{name}: found {encoder.config.model_type!r}; give a T5, or use hf: for a text encoder")
    return T5Backbone(f"t5:{name}", encoder.to(device), tokenizer)
