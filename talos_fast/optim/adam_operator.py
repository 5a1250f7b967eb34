"""The operator ``talos_fast::masked_adam_``, and its reference in plain torch."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from talos_fast import ops
from talos_fast.errors import TalosError
from talos_fast.optim.selection import places

_SCHEMA = (
    "masked_adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] masters, Tensor[] work, Tensor?[] index, *, "
    "Tensor(f!)[] steps, float step, float decay, float beta1, float beta2, float step_size, float correction, "
    "float eps, float grad_scale, bool maximize) -> ()"
)


def masked_adam_reference(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor], masters: Sequence[Tensor], work: Sequence[Tensor],
    index: Sequence[Tensor | None], *, steps: Sequence[Tensor], step: float, **scalars: Any,
) -> None:  # fmt: skip
    """AdamW on the selected entries of tensors, in place; every other entry stays unread and unwritten.

    ``p = decay p;  m += (1 - beta1)(g - m);  v = beta2 v + (1 - beta2) g²;  p -= step_size m / (√v/correction + eps)``

    Args:
        params: contiguous, any shape, of one dtype: float32, float64, bfloat16 or float16.
        grads: contiguous; as many elements as the parameter, of its dtype; or *compact*: one an entry, in memory order,
            of the dtype of the parameter or of ``exp_avgs``.
        exp_avgs, exp_avg_sqs: (entries,) float32, float64 for float64 parameters.
        max_exp_avg_sqs: of the same shapes, for AMSGrad; or empty.
        masters: of the same shapes, copies of the entries, used where they round to the parameter: where they do not,
            it was loaded or edited since the last step, and wins. Or empty.
        work, index: those of `talos_fast.optim.selection.Selection`.
        steps: 0-d, on the CPU; set to ``step``.
        step: the number of this step, from 1.
        scalars: ``decay`` = 1 - lr · weight_decay; AdamW's ``beta1``, ``beta2``, ``eps``; ``step_size`` =
            lr / (1 - beta1^t); ``correction`` = √(1 - beta2^t); ``grad_scale``, what the gradients are divided by; and
            ``maximize``, whether they are negated.

    Raises:
        TalosError: a gradient fits neither its parameter nor the entries. The C++ operator raises a RuntimeError for
            this, and for anything else that would let it leave its arguments' memory.
    """
    tops: Sequence[Tensor | None] = max_exp_avg_sqs or [None] * len(params)
    wides: Sequence[Tensor | None] = masters or [None] * len(params)
    for arguments in zip(params, grads, exp_avgs, exp_avg_sqs, tops, wides, work, index, strict=True):
        _update(*arguments, **scalars)
    for counter in steps:
        counter.fill_(step)


def _update(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, max_exp_avg_sq: Tensor | None,
    master: Tensor | None, work: Tensor, index: Tensor | None, *, decay: float, beta1: float, beta2: float,
    step_size: float, correction: float, eps: float, grad_scale: float, maximize: bool,
) -> None:  # fmt: skip
    chosen = places(work, index)
    entries = param.view(-1)[chosen]
    g = grad.view(-1) if _is_compact(grad, param, exp_avg) else grad.view(-1)[chosen]
    p, g = entries.to(exp_avg.dtype), g.to(exp_avg.dtype)
    if master is not None:
        p = torch.where(master.to(param.dtype) == entries, master, p)
    p = p * decay
    g = g / grad_scale * (-1 if maximize else 1)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    if max_exp_avg_sq is not None:
        torch.maximum(max_exp_avg_sq, exp_avg_sq, out=max_exp_avg_sq)
    top = exp_avg_sq if max_exp_avg_sq is None else max_exp_avg_sq
    p.addcdiv_(exp_avg, (top.sqrt() / correction).add_(eps), value=-step_size)
    param.view(-1)[chosen] = p.to(param.dtype)
    if master is not None:
        master.copy_(p)


def _is_compact(grad: Tensor, param: Tensor, exp_avg: Tensor) -> bool:
    """Whether ``grad`` has the selected entries only."""
    if grad.numel() == param.numel() and grad.dtype == param.dtype:
        return False
    if grad.numel() not in (param.numel(), exp_avg.numel()):
        raise TalosError(
            f"grad has {grad.numel()} entries: neither the {param.numel()} of param nor the {exp_avg.numel()} that are "
            "selected"
        )
    if grad.numel() != exp_avg.numel():
        raise TalosError(f"grad must have the dtype of param, {param.dtype}, but is {grad.dtype}")
    if grad.dtype not in (param.dtype, exp_avg.dtype):
        raise TalosError(
            f"grad of the selected entries must have the dtype of param or of exp_avg, {param.dtype} or "
            f"{exp_avg.dtype}, but is {grad.dtype}"
        )
    return True


def corrections(t: float, lr: float | Tensor, beta1: float, beta2: float, weight_decay: float) -> dict[str, float]:
    """The three scalars of step ``t`` that its updates share, in double unless ``lr`` is a tensor (as in torch)."""
    return {
        "decay": float(1 - lr * weight_decay),
        "step_size": float(lr / (1 - beta1**t)),
        "correction": math.sqrt(1 - beta2**t),
    }


ops.register(_SCHEMA, masked_adam_reference)
