"""How masks reach an optimizer: by name, by parameter or by position; and whether they fit."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from talos_fast.errors import TalosError

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
        label = repr(key) if isinstance(key, str) else f"parameter of shape {tuple(key.shape)}"
        if key not in known:
            # A mask of a whole model may speak of parameters that another group, or nobody, trains.
            if not bool(mask.any()):
                continue
            hint = (
                "pass model.named_parameters() to use names"
                if isinstance(key, str) and not names
                else f"known: {names[:3]}"
            )
            raise TalosError(f"the mask of {label} matches no parameter of this optimizer; {hint}")
        matched[known[key]] = (label, mask)
    return matched


def check_mask(label: str, parameter: Tensor, mask: Tensor) -> None:
    """Refuses a mask that cannot be the parameter's.

    Raises:
        TalosError: the mask is not bool or has another shape, or the parameter is not of a floating-point type.
    """
    if mask.dtype is not torch.bool:
        raise TalosError(f"the mask of {label} is {mask.dtype}, not torch.bool; True means trainable")
    if mask.shape != parameter.shape:
        raise TalosError(f"the mask of {label} has shape {tuple(mask.shape)}, the parameter {tuple(parameter.shape)}")
    if not parameter.is_floating_point():
        raise TalosError(f"{label} is {parameter.dtype}; only floating-point parameters can be masked")


def pack(flags: np.ndarray) -> Tensor:
    """Flat bools as packed bits (uint8, on the CPU), the form in which a checkpoint keeps a mask."""
    return torch.from_numpy(np.packbits(flags, bitorder="little"))
