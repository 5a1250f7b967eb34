"""The step of parameters that no Triton kernel takes: by the compiled operator, or by torch's own AdamW.

Masked parameters on the CPU go to the operator where it reaches; elsewhere their selected entries are gathered, stepped
by torch's AdamW and scattered back. Parameters without a mask are torch's.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from talos_fast import ops
from talos_fast.indexing import gather, scatter_
from talos_fast.optim.adam_operator import corrections
from talos_fast.optim.selection import Selection
from talos_fast.optim.state import Group, Member, state_dtype

_COMPILED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def step_others(
    pairs: Sequence[tuple[Member, Tensor]], group: Group, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """One step of parameters of one group.

    Args:
        pairs: each parameter with its state, and its gradient, of the parameter's shape or compact, (k,).
        group: the hyperparameters.
        grad_scale: 0-d, what the gradients are divided by.
        found_inf: 0-d; if it is not 0, nothing changes.
    """
    compiled: dict[Any, list[tuple[Member, Tensor]]] = defaultdict(list)
    others = []
    compiles = ops.backend("cpu") == "cpp" and not (group["fused"] is False or group["foreach"] or group["capturable"])
    for pair in pairs:
        member, gradient = pair
        if compiles and _fits(member, gradient):
            compiled[member.state["step"].item(), member.parameter.dtype, "master" in member.state].append(pair)
        else:
            others.append(pair)
    if compiled and not (found_inf is not None and bool(found_inf)):
        divisor = 1.0 if grad_scale is None else float(grad_scale)
        for (step, *_), alike in compiled.items():
            _step_compiled(alike, step + 1, group, divisor)
    if others:
        step_reference([m for m, _ in others], [gradient for _, gradient in others], group, grad_scale, found_inf)


def _fits(member: Member, gradient: Tensor) -> bool:
    """Whether the compiled operator can step the member."""
    p, selection, _ = member
    return (
        selection is not None
        and p.is_cpu
        and p.dtype in _COMPILED_DTYPES
        and (gradient.dtype is p.dtype or (gradient.shape != p.shape and gradient.dtype is state_dtype(p)))
        and (_as_it_lies(p, selection) or p.permute(selection.order).is_contiguous())
    )


def _as_it_lies(p: Tensor, selection: Selection) -> bool:
    """Whether memory order needs no view of the parameter: a view costs as much as all else here."""
    return p.is_contiguous() and selection.in_c_order


def _step_compiled(pairs: Sequence[tuple[Member, Tensor]], step: float, group: Group, divisor: float) -> None:
    """Step number ``step`` of parameters of one dtype by ``talos_fast::masked_adam_``."""
    ordered = [_in_memory_order(member, gradient) for member, gradient in pairs]
    states = [member.state for member, _ in pairs]
    selections = [member.selection for member, _ in pairs if member.selection is not None]
    beta1, beta2 = map(float, group["betas"])
    torch.ops.talos_fast.masked_adam_(
        [p for p, _ in ordered], [gradient for _, gradient in ordered],
        [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states],
        [s["max_exp_avg_sq"] for s in states] if group["amsgrad"] else [],
        [s["master"] for s in states if "master" in s],
        [selection.work for selection in selections], [selection.index for selection in selections],
        steps=[s["step"] for s in states], step=step, beta1=beta1, beta2=beta2, eps=group["eps"],
        grad_scale=divisor, maximize=group["maximize"],
        **corrections(step, group["lr"], beta1, beta2, group["weight_decay"]),
    )  # fmt: skip
    torch.autograd.graph.increment_version([p for p, _ in ordered])  # the operator writes behind autograd's back


def _in_memory_order(member: Member, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Parameter and gradient, both contiguous."""
    p, selection, _ = member
    if selection is None or _as_it_lies(p, selection):
        return p, gradient.contiguous()
    if gradient.shape == p.shape:
        gradient = gradient.permute(selection.order)
    return p.permute(selection.order), gradient.contiguous()


def step_reference(
    members: Sequence[Member],
    gradients: Sequence[Tensor],
    group: Group,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step by torch's own AdamW, on the gathered entries of those members that have a mask."""
    fused = bool(group["fused"])
    if not fused and found_inf is not None and bool(found_inf):
        return
    entries = [_entries(member) for member in members]
    compact = [_compact_gradient(member, gradient) for member, gradient in zip(members, gradients, strict=True)]
    if grad_scale is not None:
        # Not left to torch's fused step, which would write the quotients back into the gradients.
        # Back to its dtype: where both are 0-d the quotient has the wider one.
        compact = [(gradient / grad_scale.to(gradient.device)).to(gradient.dtype) for gradient in compact]
    states = [member.state for member in members]
    beta1, beta2 = group["betas"]
    adamw(
        entries, compact, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states],
        [s["max_exp_avg_sq"] for s in states] if group["amsgrad"] else [], [s["step"] for s in states],
        foreach=group["foreach"], capturable=group["capturable"], fused=group["fused"],
        found_inf=found_inf if fused else None,
        has_complex=any(p.is_complex() for p in entries), amsgrad=group["amsgrad"], beta1=beta1, beta2=beta2,
        lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=group["maximize"],
    )  # fmt: skip
    for (p, selection, state), stepped in zip(members, entries, strict=True):
        if selection is not None:
            if "master" in state:
                state["master"].copy_(stepped)
            scatter_(p.permute(selection.order), selection.positions, stepped.to(p.dtype))


def _entries(member: Member) -> Tensor:
    """What AdamW steps in place of the parameter: its selected entries, or itself where there is no mask."""
    p, selection, state = member
    if selection is None:
        return p
    entries = gather(p.permute(selection.order), selection.positions)
    if "master" not in state:
        return entries.to(state_dtype(p))
    # Weights that were loaded or edited since the last step win over the copy that remembers them.
    return torch.where(state["master"].to(p.dtype) == entries, state["master"], entries.float())


def _compact_gradient(member: Member, gradient: Tensor) -> Tensor:
    p, selection, _ = member
    if selection is None:
        return gradient
    if gradient.shape == p.shape:
        gradient = gather(gradient.permute(selection.order), selection.positions)
    return gradient.to(state_dtype(p))
