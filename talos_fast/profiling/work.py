"""What an iteration must compute and move, counted and not measured."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

SECTOR = 32
"""Bytes: the least that memory hands out on GPUs."""


@dataclass(frozen=True)
class Work:
    """Of one iteration: FLOPs of matrix products, and bytes kept between the forward and the backward pass.

    Args:
        forward: FLOPs of the forward pass.
        activation_gradients: FLOPs of the gradients of activations, down to the lowest layer that trains.
        weight_gradients: FLOPs of the gradients of the tensors that train, computed whole.
        selected_gradients: of these, the rows in which an entry is selected.
        saved_bytes: of the tensors that autograd keeps for the backward pass, parameters and casts of them not counted.
        repeated: FLOPs of the parts of the forward pass that gradient checkpointing runs again.
    """

    forward: int
    activation_gradients: int
    weight_gradients: int
    selected_gradients: int
    saved_bytes: int
    repeated: int = 0

    @property
    def done(self) -> int:
        """FLOPs with whole weight gradients, what autograd computes."""
        return self.forward + self.activation_gradients + self.weight_gradients + self.repeated

    @property
    def floor(self) -> int:
        """FLOPs with gradients of the selected rows only; nothing below that gives the same step."""
        return self.forward + self.activation_gradients + self.selected_gradients


def _formulas() -> dict[Any, Callable[..., int]]:
    """torch's formulas, and for attention on the CPU or with shared keys, and for grouped convolutions, others."""
    aten = torch.ops.aten

    def served(query: Tensor, other: Tensor) -> tuple[int, ...]:
        return (*query.shape[:2], *other.shape[2:])  # a head of keys may serve several of queries

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_flop_count(query.shape, served(query, key), served(query, value)))

    def backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_backward_flop_count(grad.shape, query.shape, served(query, key), served(query, value)))

    def convolution(
        grad: Tensor, input: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any,
        transposed: bool, output_padding: Any, groups: int, output_mask: Sequence[bool], **kwargs: Any,
    ) -> int:  # fmt: skip
        places = math.prod((input if transposed else grad).shape[2:])
        return 2 * len(input) * places * weight.numel() * (output_mask[0] + output_mask[1])

    mine: dict[Any, Callable[..., int]] = {aten.convolution_backward: convolution}
    for kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
        name = f"_scaled_dot_product_{kind}"
        mine |= {getattr(aten, name): attention, getattr(aten, f"{name}_backward"): backward}
    return {**flop_registry, **mine}


class FlopCounter(TorchDispatchMode):
    """Adds up FLOPs, and those of each product that a parameter enters: its weight gradient costs as many again.

    Args:
        parameters: those that train, by name.
        own: storages of all parameters; those of casts are added.
    """

    def __init__(self, parameters: Mapping[str, Tensor], own: dict[int, StorageWeakRef]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = self.repeated = 0
        self.of_parameter: dict[str, int] = {}
        self._own = own
        # A bias enters products too, but its gradient is a sum.
        self._names = {_storage(p): name for name, p in parameters.items() if p.dim() > 1}
        self._formulas = _formulas()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        names = [self._names[key] for key in map(_storage, _tensors(args)) if key in self._names]
        if func._overloadpacket is torch.ops.aten._to_copy and _storage(args[0]) in self._own:
            self._own |= _storages([output])  # autocast's copy of a parameter stands for it
            if names:
                self._names[_storage(output)] = names[0]
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            flops = int(formula(*args, **(kwargs or {}), out_val=output))
            self.total += flops
            self.repeated += flops if torch.is_grad_enabled() else 0  # within a backward: a checkpoint's forward
            for name in names:
                self.of_parameter[name] = self.of_parameter.get(name, 0) + flops
        return output


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _storages(tensors: Iterable[Tensor]) -> dict[int, StorageWeakRef]:
    """While a weak reference lives, no other storage gets the number of one that was freed."""
    return {_storage(tensor): StorageWeakRef(tensor.untyped_storage()) for tensor in tensors}


def count_work(
    forward_loss: Callable[[], Tensor],
    parameters: Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None = None,
) -> Work:
    """Runs one forward and backward pass and counts it; gradients are dropped afterwards.

    Args:
        forward_loss: computes the scalar loss.
        parameters: all parameters of the model, by name; those that require a gradient train.
        masks: which of their entries train, bool, of their shape; by default all.
    """
    saved: dict[int, int] = {}
    own = _storages(parameters.values())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            saved[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    forward, backward = FlopCounter(trained, own), FlopCounter({}, own)
    with forward, saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward_loss()
    with backward:
        loss.backward()
    for p in trained.values():
        p.grad = None
    weights = forward.of_parameter
    whole = sum(weights.values())
    selected = sum(flops * _row_fraction((masks or {}).get(name)) for name, flops in weights.items())
    gradients = backward.total - backward.repeated - whole
    return Work(forward.total, gradients, whole, round(selected), sum(saved.values()), backward.repeated)


def _row_fraction(mask: Tensor | None) -> float:
    """The fraction of rows (the first dimension) with a selected entry; 1 without a mask."""
    if mask is None:
        return 1.0
    return float(mask.reshape(mask.shape[0], -1).any(1).double().mean()) if mask.dim() else float(mask)


def entries_that_train(trained: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None) -> int:
    """How many entries move; parameters without a mask train whole."""
    return sum(_count(masks[name]) if masks and name in masks else p.numel() for name, p in trained.items())


def step_bytes(trained: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None) -> int:
    """Bytes that one AdamW step must move.

    Where everything trains: parameter, gradient and both moments read, all but the gradient written. Under a mask the
    moments of selected entries only, and of parameter and gradient the 32-byte sectors with a selected entry; and one
    bit an entry, or 16 an entry selected, whichever is less, that say which those are.

    Args:
        trained: the parameters, by name.
        masks: name -> bool; those without one train whole.
    """
    return sum(_bytes_of(p, (masks or {}).get(name)) for name, p in trained.items())


def _bytes_of(p: Tensor, mask: Tensor | None) -> int:
    width = p.element_size()
    if mask is None:
        return p.numel() * 7 * width  # torch's moments are of the parameter's dtype
    selected = _count(mask)
    index = min(2 * selected, -(-p.numel() // 8))
    moments = 4 * max(4, width) + (8 if width < 4 else 0)  # ours are wide, with a wide copy of 16-bit entries
    return 3 * SECTOR * touched_sectors(mask, width) + moments * selected + index


def touched_sectors(mask: Tensor, width: int = 4, size: int = SECTOR) -> int:
    """How many sectors of ``size`` bytes hold a selected entry, for entries of ``width`` bytes lying in C order."""
    entries = size // width
    flat = mask.reshape(-1)
    return _count(F.pad(flat, (0, -len(flat) % entries)).view(-1, entries).any(1))


def _count(flags: Tensor) -> int:
    """How many are True; torch's own sum takes ninety times as long."""
    return int(np.count_nonzero(flags.cpu().numpy()))
