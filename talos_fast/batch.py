"""Batches: their labels, and every tensor in them, whatever holds it."""

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from copy import copy
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from talos_fast.errors import TalosError

Batch = Any
"""``(inputs, labels)``, or a mapping with the key ``labels``; labels (N,) int64."""

Batches = Iterable[Batch]


def labels_of(batch: Batch, where: str) -> Tensor:
    """The labels of a batch, (N,) int64.

    Raises:
        TalosError: the batch has none, is empty, or has labels that are no class indices; names the batch.
    """
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
    else:
        labels = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
    if not isinstance(labels, Tensor) or labels.dim() != 1:
        found = f"labels of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"a {type(batch).__name__}"
        raise TalosError(
            f"{where}: no labels of shape (N,), found {found}; a batch is (inputs, labels), or a mapping with key "
            "'labels', and labels are a tensor"
        )
    if len(labels) == 0:
        raise TalosError(f"{where}: the batch is empty; drop it")
    if labels.is_floating_point() or labels.dtype is torch.bool:
        raise TalosError(f"{where}: labels of {labels.dtype}; give class indices, int64")
    return labels.long()


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """The batch with each tensor replaced by ``function`` of it, in order; also in mappings such as BatchEncoding."""
    return _map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, batch, lambda node: False)


def tensors_of(batch: Batch) -> list[Tensor]:
    """Every tensor in the batch, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, batch)
    return found


def _map_leaves(function: Callable[[Any], Any], batch: Batch, is_leaf: Callable[[Any], bool]) -> Batch:
    def apply(leaf: Any) -> Any:
        if not isinstance(leaf, Mapping):
            return function(leaf)
        mapped = copy(leaf) if isinstance(leaf, MutableMapping) else dict(leaf)
        for key, value in leaf.items():
            mapped[key] = _map_leaves(function, value, is_leaf)
        return mapped

    return tree_map(apply, batch, is_leaf=lambda node: isinstance(node, Mapping) or is_leaf(node))


def differentiable(batch: Batch) -> Batch:
    """The batch with copies of tensors that were made under `torch.inference_mode`, which autograd refuses."""
    return map_tensors(lambda tensor: tensor.clone() if tensor.is_inference() else tensor, batch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor in it on ``device``."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


def take(batch: Batch, start: int, stop: int, size: int) -> Batch:
    """Samples start … stop - 1 of a batch of ``size``.

    Slices every tensor whose first dimension is ``size``, and every list or tuple of as many texts or paths.
    """

    def is_column(node: Any) -> bool:
        texts = type(node) in (list, tuple) and all(isinstance(one, str | bytes | PathLike) for one in node)
        return texts and len(node) == size

    def rows(leaf: Any) -> Any:
        is_rows = isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == size
        return leaf[start:stop] if is_rows or isinstance(leaf, list | tuple) else leaf

    return _map_leaves(rows, batch, is_column)
