"""The registry of rules: which torch functions capture understands, and how users teach it more."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from talos_fast.sensitivity.uses import Use

Rule = Callable[..., Any]
RULES: dict[Callable[..., Any], Rule] = {}
ALIASING: set[Callable[..., Any]] = set()
"""Functions that may be applied to a parameter alone: deterministic, and differentiable by torch.func."""
CASTING: set[Callable[..., Any]] = {torch.Tensor.to, torch.Tensor.float, torch.Tensor.type_as, torch.Tensor.contiguous}
"""Those of them that leave every entry where it is."""
CUTTING: set[Callable[..., Any]] = {torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__}  # type: ignore[attr-defined]
"""Functions through which no gradient flows."""


def named(names: str) -> list[Callable[..., Any]]:
    """The functions of these names, as methods of a tensor and as functions of torch."""
    found = [getattr(owner, name, None) for owner in (torch.Tensor, torch) for name in names.split()]
    return [function for function in found if function is not None]


CHOOSING: set[Callable[..., Any]] = {
    *named("nonzero argwhere masked_select sort msort argsort topk unique unique_consecutive"),
    torch._C._VariableFunctions._pack_padded_sequence, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__,
    torch.Tensor.item, torch.Tensor.__index__, torch.Tensor.__int__,
}  # fmt: skip
"""Functions by which values decide which rows there are, or in which order: tokens without padding, experts."""


def chooses_rows(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether what the result's rows stand for depends on values."""
    if func is torch.where:
        return len(args) == 1
    if func in (torch.repeat_interleave, torch.Tensor.repeat_interleave):
        counts = kwargs["repeats"] if "repeats" in kwargs else args[-1] if len(args) < 2 else args[1]
        return isinstance(counts, Tensor) and counts.numel() > 1
    if func is not torch.Tensor.__getitem__:
        return func in CHOOSING
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) for part in index)


Split = Callable[..., Tensor]
"""``split(tensor, features=1)``: (*rows, *features) -> (N, T, *features), for tensors with the rows of the output."""

Make = Callable[[Tensor, Split], Use]
"""``make(gradient, split)``: the use of a parameter, from the gradient of the output."""


def rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Registers ``handler(capture, *args, **kwargs) -> output`` for torch functions; users may add their own.

    The handler is called when a tracked parameter is among the arguments. It computes the output, and gives it to
    `Capture.use` with the formula of each parameter's use; or raises `UncoveredError`, before it hooks anything.

    Example:
        >>> @rule(torch.nn.functional.prelu)
        ... def prelu(capture, input, weight):
        ...     if weight.numel() != 1:
        ...         raise UncoveredError("a slope a channel")
        ...     negative = input.detach().clamp(max=0)
        ...     slope = lambda g, split: PerSample(split(g * negative).sum((1, 2))[:, None])
        ...     return capture.use(torch.nn.functional.prelu(input, weight), {weight: slope})
    """

    def register(handler: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, handler))
        return handler

    return register


class UncoveredError(Exception):
    """Raised by a rule, before it hooks anything, when it does not apply to these arguments."""
