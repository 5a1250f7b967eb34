"""State dicts of `MaskedAdam` to and from those of `torch.optim.AdamW`."""

import torch
from torch import Tensor

from talos_fast.optim.masks import Masks, check_mask, masks_by_parameter, pack, unpack
from talos_fast.optim.state import MOMENTS, State
from talos_fast.optim.state_dict import StateDict


def to_adamw(state_dict: StateDict) -> StateDict:
    """A state dict of `MaskedAdam` as one of AdamW: dense moments, zero where nothing is selected.

    What AdamW then does to the selected entries is what `MaskedAdam` would have done (for fp32 and fp64 parameters bit
    for bit, in plain torch); it also moves the others. Masters are left out: AdamW has none.
    """
    state = {
        number: _dense(saved) if "mask" in saved else saved for number, saved in state_dict["state"].items() if saved
    }
    return {**state_dict, "state": state}


def from_adamw(state_dict: StateDict, masks: Masks) -> StateDict:
    """A state dict of AdamW as one of `MaskedAdam`, for an optimizer with these masks.

    Args:
        state_dict: of AdamW.
        masks: name -> bool tensor, if the state dict has names, or bool tensors in the order of the parameters.

    Raises:
        TalosError: a mask that matches no parameter of the state dict, or has another shape.
    """
    state = dict(state_dict["state"])
    for number, (label, mask) in masks_by_parameter(state_dict["param_groups"], masks).items():
        if saved := state.get(number):
            check_mask(label, saved["exp_avg"], mask)
            state[number] = _compact(saved, mask.cpu()) if bool(mask.any()) else {}
    return {**state_dict, "state": state}


def _dense(saved: State) -> State:
    shape = tuple(saved["shape"].tolist())
    content = {"step": saved["step"].to("cpu", copy=True)}  # capturable and fused AdamW move it
    for key in MOMENTS:
        if key in saved:
            mask = unpack(saved["mask"], shape).to(saved[key].device)
            content[key] = torch.zeros(shape, dtype=saved[key].dtype, device=mask.device)
            content[key][mask] = saved[key]
    return content


def _compact(saved: State, mask: Tensor) -> State:
    moments = {key: saved[key][mask.to(saved[key].device)] for key in MOMENTS if key in saved}
    shape = torch.tensor(mask.shape, dtype=torch.int64, device="cpu")
    # A number in checkpoints of torch 1.
    step = torch.as_tensor(saved["step"], dtype=torch.float32, device="cpu").clone()
    return {"step": step, **moments, "mask": pack(mask), "shape": shape}
