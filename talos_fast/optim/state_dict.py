"""How compact state is saved and loaded.

A saved state lists its entries in C order, whatever the memory format of the parameter, beside the mask's bits
(``mask``, C order) and ``shape``. torch casts every loaded tensor to its parameter's dtype, which would round fp32
moments to bf16: so `held` puts each compact tensor in a holder, which that cast passes through, and `release` takes it
out again before anybody else's hook looks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from talos_fast.errors import TalosError
from talos_fast.optim.masks import bool_mask, in_c_order, pack, unpack
from talos_fast.optim.selection import Selection
from talos_fast.optim.state import MOMENTS, State, state_dtype

StateDict = dict[str, Any]
Selections = Mapping[Tensor, Selection]
_COMPACT = (*MOMENTS, "master")


class _Held:
    """A tensor that torch's cast does not know for one."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def exported(content: StateDict, parameters: Sequence[Tensor], selections: Selections) -> StateDict:
    """torch's state dict with what a checkpoint keeps of masked parameters: nothing if none of their entries trains."""
    state = dict(content["state"])
    for number, p in enumerate(parameters):
        selection = selections.get(p)
        if selection is None:
            continue
        if selection.count == 0:
            state[number] = {}  # distributed checkpoints look for every parameter that requires a gradient
        elif number in state:
            state[number] = _exported(state[number], p, selection)
    return {**content, "state": state}


def _exported(state: State, p: Tensor, selection: Selection) -> State:
    order = _memory_to_c(p, selection)
    compact = {
        key: value if key == "step" or order is None else value[order.to(value.device)] for key, value in state.items()
    }
    # On one device with the moments, as distributed checkpoints demand.
    shape = torch.tensor(p.shape, dtype=torch.int64, device=p.device)
    return {**compact, "mask": pack(bool_mask(p, selection)).to(p.device), "shape": shape}


def held(content: StateDict, parameters: Sequence[Tensor], names: Sequence[Any], selections: Selections) -> StateDict:
    """The state dict to be loaded, ready for torch's cast: compact tensors held, in memory order, on their device.

    Raises:
        TalosError: the state of a parameter was saved under another mask, or without one.
    """
    numbers = [number for group in content["param_groups"] for number in group["params"]]
    if len(numbers) != len(parameters):
        return content  # torch says so
    state = {key: saved for key, saved in content["state"].items() if saved}
    for number, p, name in zip(numbers, parameters, names, strict=True):
        if saved := state.get(number):
            _check_mask(name, p, selections.get(p), saved)
            if p in selections:
                state[number] = _held(saved, p, selections[p])
    return {**content, "state": state}


def _held(saved: State, p: Tensor, selection: Selection) -> dict[str, Any]:
    order = _memory_to_c(p, selection)
    content: dict[str, Any] = {key: value for key, value in saved.items() if key not in (*_COMPACT, "mask", "shape")}
    wide = state_dtype(p) is not p.dtype
    for key in _COMPACT if wide else MOMENTS:
        if key in saved:
            value = saved[key].to(p.device, state_dtype(p), copy=True)
            if order is not None:
                value = torch.empty_like(value).index_copy_(0, order.to(p.device), value)
            content[key] = _Held(value)
    if "master" not in saved and wide:
        content["master"] = _Held(torch.zeros(selection.count, dtype=state_dtype(p), device=p.device))
    return content


def release(states: Mapping[Tensor, dict[str, Any]], selections: Selections) -> None:
    """Takes the held tensors out, after torch's cast."""
    for p, state in states.items():
        if p in selections:
            for key, value in state.items():
                state[key] = value.value if isinstance(value, _Held) else value
            # torch leaves the count of steps where it was saved, and shares it with the dict it came from.
            step = state["step"]
            state["step"] = step.to(step.device if step.device.type == "cpu" else p.device, copy=True)


def _check_mask(name: Any, p: Tensor, selection: Selection | None, saved: Mapping[str, Any]) -> None:
    if selection is None and "mask" in saved:
        raise TalosError(f"parameter {name}: saved with a mask, unlike this one; pass masks=, or use to_adamw()")
    if selection is None:
        return
    if "mask" not in saved:
        raise TalosError(
            f"parameter {name}: saved without a mask, unlike this one; use from_adamw() (a flattened distributed "
            "checkpoint loses masks: register to_adamw() and from_adamw() as hooks of state_dict and load_state_dict)"
        )
    if tuple(saved["shape"].tolist()) != tuple(p.shape):
        raise TalosError(
            f"parameter {name}: saved with shape {tuple(saved['shape'].tolist())}, this is {tuple(p.shape)}"
        )
    differing = int((unpack(saved["mask"], p.shape) != bool_mask(p, selection)).sum())
    if differing:
        raise TalosError(
            f"parameter {name}: the state belongs to another mask ({differing} of {p.numel()} entries differ); "
            "set_masks() changes the mask of a running optimizer"
        )


def _memory_to_c(p: Tensor, selection: Selection) -> Tensor | None:
    """For each entry in C order its place among the entries in memory order; None if they are the same."""
    if selection.in_c_order:
        return None
    number = torch.zeros(selection.numel, dtype=torch.int64, device="cpu")
    number[selection.positions.cpu()] = torch.arange(selection.count, device="cpu")
    return in_c_order(number, p.shape, selection.order)[bool_mask(p, selection)]
