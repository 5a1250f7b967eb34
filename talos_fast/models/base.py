"""What every model offers: a shared encoder, frozen heads, and batches."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from talos_fast.arguments import checked_seed
from talos_fast.batch import Batch
from talos_fast.errors import TalosError
from talos_fast.models.share import Share
from talos_fast.tasks.base import Inputs, Modality, Split, Task

logger = logging.getLogger("talos_fast")


class Classifier(nn.Module):
    """An encoder that trains and a head that does not.

    The head holds buffers only, so `named_parameters()` gives `encoder.<name>` for every task, and the task vectors of
    different tasks add up.

    Args:
        encoder: the network, shared between the classifiers of all tasks.
        head: maps what the encoder gives to logits of shape (N, K).

    Raises:
        TalosError: a head with parameters.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        names = [name for name, _ in head.named_parameters()]
        if names:
            raise TalosError(f"head: found the parameters {names}; a head is frozen: register them as buffers")
        self.encoder = encoder
        self.head = head

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """What the encoder takes, to logits of shape (N, K). Images may be of any floating dtype."""
        dtype = next(self.encoder.parameters()).dtype
        cast = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
        logits: Tensor = self.head(self.encoder(*cast, **named))
        return logits


class Backbone(ABC):
    """A pre-trained model, as `talos_fast.models.load` returns it.

    Attributes:
        name: what it was loaded as.
        encoder: the network that trains; its `state_dict()` is the model to save.
        modality: "image" or "text", the tasks it takes.
    """

    modality: Modality

    def __init__(self, name: str, encoder: nn.Module) -> None:
        self.name = name
        self.encoder = encoder

    @abstractmethod
    def classifier(self, task: Task) -> Classifier:
        """The shared encoder with the frozen head of `task`, in eval mode.

        Heads of timm models and text encoders are computed with the encoder as it is: build the classifiers of all
        tasks before fine-tuning in place.

        Raises:
            TalosError: a task of the other modality, or one that this model cannot make a head for.
        """

    @abstractmethod
    def prepare(self, inputs: Inputs) -> Tensor | dict[str, Tensor]:
        """Images or texts to what the classifier takes, on the CPU.

        Returns:
            Images of shape (N, 3, H, W), float32; or `input_ids` and `attention_mask`, int64, shape (N, T), padded to
            the longest text.
        """

    def batches(
        self, split: Split, *, batch_size: int, shuffle: bool = False, seed: int = 0, limit: int | None = None,
        rank: int = 0, world: int = 1,
    ) -> DataLoader[Any]:  # fmt: skip
        """A loader of `(images, labels)` tuples, or of dictionaries with `input_ids`, `attention_mask` and `labels`.

        Examples are read and prepared batch by batch, in this process. The last batch may be smaller.

        Args:
            split: what to load.
            batch_size: examples a batch.
            shuffle: in a new order each time the loader is iterated.
            seed: of the order, and of the choice that `limit` makes.
            limit: use at most this many examples, drawn without replacement and the same in every epoch.
            rank, world: which share of each batch to give, of how many; see `Share`.

        Raises:
            TalosError: a split of the other modality, a batch size or limit below 1, a negative seed, or a batch size
                that is no multiple of ``world``.
        """
        self._check_modality(split.modality)
        for name, value in (("batch_size", batch_size), ("limit", limit)):
            if value is not None and value < 1:
                raise TalosError(f"{name}: found {value}; give 1 or more")
        if world > 1 and batch_size % world:
            raise TalosError(f"batch_size: found {batch_size}, for {world} processes; give a multiple of {world}")
        seed = checked_seed("seed", seed)
        indices = np.arange(len(split))
        if limit is not None and limit < len(split):
            # Sources are often sorted by class, so the first `limit` examples would not do.
            indices = np.sort(np.random.default_rng(seed).permutation(len(split))[:limit])

        def collate(chosen: list[int]) -> Batch:
            return self._batch(split.select(chosen))

        rows: Any = indices.tolist()
        generator = torch.Generator().manual_seed(seed)
        order = RandomSampler(rows, generator=generator) if shuffle else SequentialSampler(rows)
        share = Share(order, batch_size, rank, world)
        return DataLoader(rows, batch_sampler=share, generator=generator, collate_fn=collate)

    def _batch(self, split: Split) -> Batch:
        inputs, labels = self.prepare(split.inputs), torch.from_numpy(split.labels)
        return {**inputs, "labels": labels} if isinstance(inputs, dict) else (inputs, labels)

    def _check_modality(self, modality: Modality) -> None:
        if modality != self.modality:
            raise TalosError(f"{self.name} takes {self.modality} tasks, found a task of {modality}s; use another model")


def warn_of_twins(task: Task, ids: Tensor, model: str) -> None:
    """Says which class names have the same tokens, (K, T): their logits are the same whatever is trained."""
    seen: dict[tuple[int, ...], str] = {}
    for name, row in zip(task.class_names, ids.tolist(), strict=True):
        twin = seen.setdefault(tuple(row), name)
        if twin is not name:
            logger.warning(
                "task %r: %s cannot tell the class %r from %r, which has the same tokens; rename one", task.name, model,
                name, twin,
            )  # fmt: skip


def fill(templates: Sequence[str], class_names: Sequence[str]) -> list[str]:
    """Every class name in every template: K * len(templates) prompts, those of the first class first."""
    return [template.format(name) for name in class_names for template in templates]
