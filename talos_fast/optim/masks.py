"""How masks reach an optimizer: by name, by parameter or by position; and whether they fit."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from talos_fast.errors import TalosError
from talos_fast.optim.selection import Selection, select

Masks = Mapping[str, Tensor] | Mapping[Tensor, Tensor] | Sequence[Tensor]
"""Name -> bool tensor, parameter -> bool tensor, or bool tensors in the order of the parameters."""


def masks_by_parameter(groups: Sequence[Mapping[str, Any]], masks: Masks) -> dict[Tensor, tuple[str, Tensor]]:
    """Parameter -> (what to call it in errors, its mask), over the parameters of ``groups``.

    Raises:
        TalosError: a mask that matches no parameter (it would train densely), names without named parameters,
            or a sequence of another length.
    """
    parameters = [p for group in groups for p in group["params"]]
    if not isinstance(masks, Mapping):
        if len(masks) != len(parameters):
            raise TalosError(
                f"{len(masks)} masks for {len(parameters)} parameters; give one a parameter, in their order"
            )
        return {p: (f"parameter {n}", mask) for n, (p, mask) in enumerate(zip(parameters, masks, strict=True))}
    names = [name for group in groups for name in group.get("param_names", ())]
    known: dict[Any, Tensor] = dict(zip(names, parameters, strict=False))
    known.update({p: p for p in parameters})
    matched = {}
    for key, mask in masks.items():
        label = f"parameter of shape {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)
        if key not in known:
            # A mask of a whole model may speak of parameters that another group, or nobody, trains.
            if isinstance(mask, Tensor) and not bool(mask.any()):
                continue
            hint = f"known: {names[:3]}"
            if isinstance(key, str) and not names:
                hint = "pass model.named_parameters() to use names"
            elif any(name == f"{prefix}{key}" for prefix in ("module.", "_orig_mod.") for name in names):
                hint = "pass the parameters of the module inside, whose names have no prefix of a wrapper"
            raise TalosError(f"the mask of {label} matches no parameter of this optimizer; {hint}")
        matched[known[key]] = (label, mask)
    return matched


def selections_of(groups: Sequence[Mapping[str, Any]], masks: Masks) -> dict[Tensor, Selection]:
    """Parameter -> its selection, for the masked parameters of ``groups``.

    Raises:
        TalosError: a mask does not fit, see `masks_by_parameter` and `check_mask`.
    """
    found = masks_by_parameter(groups, masks)
    for p, (label, mask) in found.items():
        check_mask(label, p, mask)
    return {p: select(mask, p) for p, (_, mask) in found.items()}


def check_mask(label: str, parameter: Tensor, mask: Tensor) -> None:
    """Refuses a mask that cannot be the parameter's.

    Raises:
        TalosError: the mask is no bool tensor or has another shape, or the parameter is not of a floating-point type.
        NotImplementedError: the parameter is a DTensor.
    """
    if type(parameter).__name__ == "DTensor":  # importing the class would take longer than this library
        raise NotImplementedError(
            f"{label} is a DTensor: masks do not work with FSDP2 (fully_shard) or tensor parallelism yet; "
            "train it without a mask, or use DistributedDataParallel"
        )
    if not isinstance(mask, Tensor):
        raise TalosError(f"the mask of {label} is a {type(mask).__name__}; give a bool tensor, True means trainable")
    if mask.dtype is not torch.bool:
        raise TalosError(f"the mask of {label} is {mask.dtype}, not torch.bool; True means trainable")
    if mask.shape != parameter.shape:
        raise TalosError(f"the mask of {label} has shape {tuple(mask.shape)}, the parameter {tuple(parameter.shape)}")
    if not parameter.is_floating_point():
        raise TalosError(f"{label} is {parameter.dtype}; only floating-point parameters can be masked")


def bool_mask(p: Tensor, selection: Selection) -> Tensor:
    """The mask of a parameter: bool, of its shape, on the CPU."""
    flags = torch.from_numpy(selection.flags())
    return in_c_order(flags, p.shape, selection.order)


def in_c_order(flat: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """A tensor of ``shape`` from its elements in memory order, the dimensions in ``order``."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([shape[d] for d in order]).permute(inverse)


def pack(mask: Tensor) -> Tensor:
    """Bools as bits, in C order: uint8, on the CPU, the form in which a checkpoint keeps a mask."""
    return torch.from_numpy(np.packbits(mask.reshape(-1).numpy(), bitorder="little"))


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool mask of that shape, on the CPU."""
    flags = np.unpackbits(bits.cpu().numpy(), count=math.prod(shape), bitorder="little")
    return torch.from_numpy(flags.astype(bool)).view(tuple(shape))
