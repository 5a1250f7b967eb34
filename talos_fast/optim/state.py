"""The state of a parameter: AdamW's own where all of it trains, one entry a selected entry where it has a mask."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused

from talos_fast.optim.masks import in_c_order
from talos_fast.optim.selection import Selection, memory_order

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

State = dict[str, Tensor]

Group = Mapping[str, Any]
"""The hyperparameters of one parameter group, as torch keeps them."""


class Member(NamedTuple):
    """A parameter that steps: its selection is None where all of it trains."""

    parameter: Tensor
    selection: Selection | None
    state: State

    @property
    def order(self) -> tuple[int, ...]:
        """The dimensions of the parameter in memory order."""
        return memory_order(self.parameter) if self.selection is None else self.selection.order


def state_dtype(parameter: Tensor) -> torch.dtype:
    """Of compact moments and masters: float32, or float64 for float64 parameters."""
    return torch.promote_types(parameter.dtype, torch.float32)


def start(p: Tensor, selection: Selection | None, group: Group) -> State:
    """The state of a parameter before its first step.

    Raises:
        RuntimeError: ``fused=True`` and the parameter is not floating-point, as in torch.
    """
    if group["fused"]:
        _device_dtype_check_for_fused(p)
    on_device = group["capturable"] or group["fused"]
    state = {"step": torch.zeros((), dtype=torch.float32, device=p.device if on_device else "cpu")}
    like = p
    if selection is not None:
        like = torch.zeros(selection.count, dtype=state_dtype(p), device=p.device)
        if like.dtype != p.dtype:
            # Any value will do: where it does not round to the parameter, the parameter is used.
            state["master"] = torch.zeros_like(like)
    for name in MOMENTS[: 3 if group["amsgrad"] else 2]:
        state[name] = torch.zeros_like(like, memory_format=torch.preserve_format)
    return state


def reselected(state: State, p: Tensor, before: Selection | None, after: Selection | None) -> State:
    """The state under another mask: entries that stay selected keep their moments, new ones start at zero."""
    moved = {}
    for key, value in state.items():
        if key == "step":
            moved[key] = value
        elif after is not None or key in MOMENTS:
            moved[key] = _narrow(_widen(value, p, before), p, after)
    if after is not None and state_dtype(p) != p.dtype and "master" not in moved:
        moved["master"] = torch.zeros_like(moved["exp_avg"])
    return moved


def _widen(value: Tensor, p: Tensor, selection: Selection | None) -> Tensor:
    """Compact to dense, of the parameter's shape; zero where unselected."""
    if selection is None:
        return value
    dense = torch.zeros(selection.numel, dtype=value.dtype, device=value.device)
    dense[selection.positions.to(value.device)] = value
    return in_c_order(dense, p.shape, selection.order)


def _narrow(dense: Tensor, p: Tensor, selection: Selection | None) -> Tensor:
    """Dense, of the parameter's shape, to the form of the selection."""
    if selection is not None:
        return dense.permute(selection.order).reshape(-1)[selection.positions.to(dense.device)].to(state_dtype(p))
    return torch.empty_like(p, memory_format=torch.preserve_format).copy_(dense)
