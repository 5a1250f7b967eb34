"""Batches in, logits out: the one hook that adapts any model, and the checks on what comes through it."""

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from copy import copy
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from talos_fast.errors import TalosError, brief

Batch = Any
"""``(inputs, labels)``, or a mapping with the key ``labels``; labels (N,) int64."""

Batches = Iterable[Batch]

Forward = Callable[[nn.Module, Batch], Tensor]
"""``forward(model, batch) -> logits`` of shape (N, K): classes, or answer choices."""


def default_forward(model: nn.Module, batch: Batch) -> Tensor:
    """``model(inputs)`` for tuples, ``model(**everything but labels)`` for mappings; the logits of what has them."""
    if isinstance(batch, Mapping):
        output = model(**{key: value for key, value in batch.items() if key != "labels"})
    else:
        output = model(batch[0])
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    logits: Tensor = getattr(output, "logits", output)
    return logits


class _Hooked(nn.Module):
    """Gives `functional_call` a module whose forward is the user's ``forward(model, batch)``."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, batch: Batch) -> Tensor:
        return self._forward(self.model, batch)


def functional_forward(forward: Forward, model: nn.Module, values: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """``forward(model, batch)`` as a function of parameters: ``values`` by name stand in for the model's own."""
    prefixed = {f"model.{name}": value for name, value in values.items()}
    logits: Tensor = functional_call(_Hooked(model, forward), prefixed, (batch,))
    return logits


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


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is.

    Raises:
        TalosError: there is none, or it has no numbers.
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise TalosError(f"{type(model).__name__} has no parameters")
    if parameter.is_meta:
        raise TalosError(f"{type(model).__name__} is on the meta device, without numbers; load its weights first")
    return parameter.device


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile; prefixes are no part of names."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = cast(nn.Module, model._modules["_orig_mod"])
        else:
            return model


def require_plain(model: nn.Module) -> None:
    """Refuses a module that is compiled, itself or in part, or wrapped for several devices.

    Methods swap parameters and torch functions around a forward, which compiled code does not see: linearized training
    lost its gradient there. And with a wrapper's prefix names would not be those of the base.

    Raises:
        TalosError: names the module; or the model is on the meta device.
    """
    device_of(model)
    for name, module in model.named_modules():
        where = name or type(model).__name__
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise TalosError(f"{where}: the module is compiled; pass the plain one, with compile=True")
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            raise TalosError(
                f"{where}: finetune trains one model in one process; pass the .module inside, or train with "
                "MaskedAdam in a loop of your own"
            )


def usable_device(device: torch.device | str, what: str) -> torch.device:
    """A device that tensors can be made on, and read from.

    Raises:
        TalosError: torch does not know it, or this machine lacks it; ``what`` names the argument.
    """
    try:
        where = torch.device(device)
        torch.zeros(1, device=where).cpu()  # "meta" makes them, and has no data
    except (RuntimeError, AssertionError, ImportError) as error:
        raise TalosError(
            f"{what}: {device!s} cannot be used ({brief(error)}); use 'cpu', or a device of this machine"
        ) from error
    return where


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """The batch with ``function`` of every tensor in it, in order; mappings of any type, such as BatchEncoding, too."""
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


def logits_of(forward: Forward, model: nn.Module, batch: Batch, where: str) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and labels (N,) of a batch; their values are not looked at.

    Raises:
        TalosError: no labels, or logits of another shape; names the batch.
    """
    labels = labels_of(batch, where)
    logits = forward(model, batch)
    if not isinstance(logits, Tensor):
        raise TalosError(
            f"{where}: the model gave a {type(logits).__name__}, not logits (N, K); pick them with forward="
        )
    if logits.dim() != 2 or logits.shape[0] != len(labels):
        raise TalosError(
            f"{where}: forward gave logits of shape {tuple(logits.shape)} for {len(labels)} labels; expected (N, K). "
            "Batches are cut along the first dimension of their tensors, and lists of as many texts: samples come "
            "first, forward= may transpose"
        )
    return logits, labels


def logits_facts(logits: Tensor, labels: Tensor) -> Tensor:
    """What `check_facts` needs, where the logits are: lowest label, highest label, whether all logits are finite."""
    return torch.stack([labels.min(), labels.max(), logits.isfinite().all().to(labels.dtype)]).to(logits.dtype)


def check_facts(facts: list[float], classes: int, where: str) -> None:
    """Refuses logits and labels by their facts.

    Raises:
        TalosError: NaN or infinite logits, or labels outside the classes; names the batch.
    """
    low, high, finite = facts
    if low < 0 or high >= classes:
        raise TalosError(
            f"{where}: labels {low:.0f} … {high:.0f}, but the model has {classes} classes, 0 … {classes - 1}"
        )
    if not finite:
        raise TalosError(f"{where}: the logits hold NaN or infinite entries; check the inputs and the learning rate")


def check_logits(logits: Tensor, labels: Tensor, where: str) -> None:
    """Looks at logits (N, K) and labels (N,) of a batch; waits for the device.

    Raises:
        TalosError: logits that are NaN or infinite, or labels outside the classes; names the batch.
    """
    check_facts(logits_facts(logits.float(), labels).tolist(), logits.shape[1], where)


def checked_logits(forward: Forward, model: nn.Module, batch: Batch, where: str) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and labels (N,) of a batch, looked at; waits for the device.

    Raises:
        TalosError: logits of another shape, NaN or infinite, or labels outside the classes; names the batch.
    """
    logits, labels = logits_of(forward, model, batch, where)
    check_logits(logits, labels, where)
    return logits, labels
