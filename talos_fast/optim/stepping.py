"""How one group steps: by the compiled operator, or by torch's own AdamW.

Masked parameters go to the operator where it reaches; elsewhere their selected entries are gathered, stepped by torch's
AdamW and scattered back. Parameters without a mask are always torch's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from talos_fast import ops
from talos_fast.indexing import gather, scatter_
from talos_fast.optim.compact_gradient import CompactGradient
from talos_fast.optim.operator import corrections
from talos_fast.optim.plan import Selection

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_COMPILED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

State = dict[str, Tensor]


def start(p: Tensor, selection: Selection | None, group: Mapping[str, Any]) -> State:
    """The state of a parameter before its first step: compact where it has a mask, AdamW's own where not."""
    on_device = group["capturable"] or group["fused"]
    state = {"step": torch.zeros((), dtype=torch.float32, device=p.device if on_device else "cpu")}
    like = p
    if selection is not None:
        like = torch.zeros(selection.count, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        if like.dtype != p.dtype:
            # Any value will do: where it does not round to the parameter, the parameter counts.
            state["master"] = torch.zeros_like(like)
    for name in MOMENTS[: 3 if group["amsgrad"] else 2]:
        state[name] = torch.zeros_like(like, memory_format=torch.preserve_format)
    return state


def compiles(p: Tensor, selection: Selection | None, group: Mapping[str, Any]) -> bool:
    """Whether the compiled operator steps this parameter."""
    assert p.grad is not None
    return (
        selection is not None
        and ops.backend(p.device) == "cpp"
        and not (group["fused"] is False or group["foreach"] or group["capturable"])
        and p.dtype in _COMPILED_DTYPES
        and p.grad.dtype == p.dtype
        and not isinstance(p.grad, CompactGradient)
        and p.permute(selection.order).is_contiguous()
    )


def step_compiled(
    p: Tensor, selection: Selection, state: State, group: Mapping[str, Any], grad_scale: float, skip: bool
) -> None:
    """One step of one parameter by ``talos_fast::masked_adam_``; none if the scaler found an infinity."""
    assert p.grad is not None
    if skip:
        return
    state["step"] += 1
    beta1, beta2 = map(float, group["betas"])
    torch.ops.talos_fast.masked_adam_(
        p.permute(selection.order), p.grad.permute(selection.order).contiguous(),
        state["exp_avg"], state["exp_avg_sq"], state["max_exp_avg_sq"] if group["amsgrad"] else None,
        state.get("master"), selection.work, selection.index,
        beta1=beta1, beta2=beta2, eps=group["eps"], grad_scale=grad_scale, maximize=group["maximize"],
        **corrections(state["step"].item(), group["lr"], beta1, beta2, group["weight_decay"]),
    )  # fmt: skip


def step_reference(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], selections: Mapping[Tensor, Selection],
    states: Sequence[State], group: Mapping[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None,
) -> None:  # fmt: skip
    """One step of the parameters by torch's own AdamW, on the gathered entries of those that have a mask."""
    pairs = [(p, selections.get(p)) for p in parameters]
    compact = [_compact(p, selection, state) for (p, selection), state in zip(pairs, states, strict=True)]
    beta1, beta2 = group["betas"]
    adamw(
        compact, [_gradient(p, grad, selection) for (p, selection), grad in zip(pairs, gradients, strict=True)],
        [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states],
        [s["max_exp_avg_sq"] for s in states] if group["amsgrad"] else [], [s["step"] for s in states],
        foreach=group["foreach"], capturable=group["capturable"], fused=group["fused"],
        grad_scale=grad_scale, found_inf=found_inf,
        has_complex=any(p.is_complex() for p in parameters), amsgrad=group["amsgrad"], beta1=beta1, beta2=beta2,
        lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=group["maximize"],
    )  # fmt: skip
    for (p, selection), entries, state in zip(pairs, compact, states, strict=True):
        if selection is not None:
            if "master" in state:
                state["master"].copy_(entries)
            scatter_(p.permute(selection.order), selection.positions, entries.to(p.dtype))


def _gradient(p: Tensor, grad: Tensor, selection: Selection | None) -> Tensor:
    """The gradient of what AdamW steps; ``grad`` may be compact already."""
    if selection is None or grad.shape != p.shape:
        return grad
    return gather(grad.permute(selection.order), selection.positions).to(torch.promote_types(p.dtype, torch.float32))


def _compact(p: Tensor, selection: Selection | None, state: State) -> Tensor:
    """What AdamW steps in place of ``p``: its selected entries, or ``p`` itself where there is no mask."""
    if selection is None:
        return p
    entries = gather(p.permute(selection.order), selection.positions)
    if "master" not in state:
        return entries.to(torch.promote_types(p.dtype, torch.float32))
    # Weights that were loaded or edited since the last step win over the copy that remembers them.
    return torch.where(state["master"].to(p.dtype) == entries, state["master"], entries.float())
