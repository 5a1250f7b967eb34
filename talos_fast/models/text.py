"""What text encoders and T5 share: loading from Hugging Face files, and token batches."""

import sys
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from talos_fast.errors import TalosError, brief
from talos_fast.tasks.base import Inputs


def from_pretrained(auto_class: Any, name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer from a directory or a Hub id.

    Raises:
        TalosError: files that are missing, damaged or cannot be fetched.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model, report = auto_class.from_pretrained(name, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise TalosError(
            f"{name}: model or tokenizer could not be loaded: {brief(error)}; "
            "give a complete model directory (config, weights, tokenizer), or check the id and the network"
        ) from error
    # Where its files are missing, transformers makes a tokenizer of special tokens only (for T5, and a space).
    if len(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)) < 2:
        raise TalosError(
            f"{name}: its tokenizer knows no word; add its files, such as tokenizer.json, vocab.txt or spiece.model"
        )
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise TalosError(
            f"{name}: its weights lack {missing[:3]} ({len(missing)} in all), which would stay random; "
            "use a checkpoint of this architecture"
        )
    return model, tokenizer


def check_texts(inputs: Inputs) -> list[str]:
    """The inputs as a list of texts; refuses images, paths and an empty list."""
    if isinstance(inputs, np.ndarray) or not inputs or not all(isinstance(text, str) for text in inputs):
        raise TalosError(f"inputs: found {type(inputs).__name__} without texts; give a list of at least one str")
    return [str(text) for text in inputs]


def tokenize(tokenizer: Any, texts: list[str], max_length: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, int64, shape (N, T), padded to the longest text, cut off at `max_length`."""
    tokens = tokenizer(texts, padding="longest", truncation=True, max_length=max_length, return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
