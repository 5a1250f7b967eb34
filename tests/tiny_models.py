"""Models and tasks of a few thousand parameters, made on the spot, of every kind that talos_fast loads."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from talos_fast.models import Backbone, ImagePreprocess
from talos_fast.models.open_clip import OpenClipBackbone
from talos_fast.models.timm import TimmBackbone
from talos_fast.tasks import Split, Task

SENTENCE = "red green blue warm cold the a is of photo sky sea fire grass ice good bad yes no sun moon"
WORDS = tuple(SENTENCE.split())


def image_task(name: str = "colours", classes: int = 3, side: int = 12, per_split: int = 12) -> Task:
    """Noise around one grey level a class."""
    generator = np.random.default_rng(classes)

    def split(n: int) -> Split:
        labels = np.arange(n) % classes
        noise = generator.integers(0, 60, (n, side, side, 3))
        return Split((noise + labels[:, None, None, None] * 60).clip(0, 255).astype(np.uint8), labels)

    return Task(name, tuple(WORDS[:classes]), ("a photo of {}", "the {}"), *(split(per_split) for _ in range(3)))


def text_task(name: str = "words", classes: int = 3, per_split: int = 10) -> Task:
    """Random words; the class name is among them."""
    generator = np.random.default_rng(classes)

    def split(n: int) -> Split:
        labels = np.arange(n) % classes
        filler = [" ".join(generator.choice(WORDS, generator.integers(1, 6))) for _ in range(n)]
        return Split([f"{text} {WORDS[label]}" for text, label in zip(filler, labels, strict=True)], labels)

    return Task(name, tuple(WORDS[:classes]), ("the {} is",), *(split(per_split) for _ in range(3)))


class WordTokenizer:
    """The `open_clip` tokenizer interface on words."""

    def __call__(self, texts: list[str] | str, context_length: int = 8) -> torch.Tensor:
        texts = [texts] if isinstance(texts, str) else texts
        ids = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in enumerate(texts):
            tokens = [1, *(3 + WORDS.index(w) for w in text.strip(".").split())][: context_length - 1]
            ids[row, : len(tokens) + 1] = torch.tensor([*tokens, len(WORDS) + 3])  # the last id is the largest
        return ids


def tiny_clip() -> Backbone:
    from open_clip import CLIP

    model = CLIP(
        embed_dim=16,
        vision_cfg={"layers": 2, "width": 32, "head_width": 16, "patch_size": 4, "image_size": 16},
        text_cfg={"context_length": 8, "vocab_size": len(WORDS) + 4, "width": 32, "heads": 2, "layers": 1},
    )
    preprocess = ImagePreprocess((16, 16), (0.5,) * 3, (0.5,) * 3)
    return OpenClipBackbone("tiny-clip", model, WordTokenizer(), preprocess)


def tiny_timm() -> Backbone:
    from timm.models.vision_transformer import VisionTransformer

    encoder = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    return TimmBackbone("tiny-timm", encoder, ImagePreprocess((16, 16), (0.5,) * 3, (0.5,) * 3))


def write_tokenizer(folder: Path, eos: bool) -> Any:
    """A word-level tokenizer with `<pad>` 0, `</s>` 1 and `<unk>` 2, saved to `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if eos:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )
    fast.save_pretrained(folder)
    return fast


def write_bert(folder: Path) -> Path:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder)
    write_tokenizer(folder, eos=False)
    return folder


def write_t5(folder: Path) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=len(WORDS) + 3,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    write_tokenizer(folder, eos=True)
    return folder
