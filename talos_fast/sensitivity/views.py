"""Functions of a parameter alone, and elementwise ones that meet activations.

A view, a cast, 1 + γ, a table of positions or T5's relative bias is tracked in the parameter's place, until it is
broadcast over the samples: then it is expanded to one copy a sample (no memory is used), and the gradient of the copy
is its use. Everything before that is pulled back sample by sample.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from talos_fast.sensitivity.capture import Capture
from talos_fast.sensitivity.registry import ALIASING, CASTING, RULES, UncoveredError, named, rule

_VIEWS = (
    "view reshape flatten unflatten unsqueeze squeeze permute transpose t movedim narrow select chunk split unbind "
    "expand expand_as broadcast_to repeat view_as reshape_as clone __getitem__ index_select bfloat16 half double"
)
_ELEMENTWISE = (
    "add sub mul div where masked_fill maximum minimum __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ "
    "__truediv__ rsub"
)
_IN_PLACE = "add_ sub_ mul_ div_ __iadd__ __isub__ __imul__ __itruediv__"
_POINTWISE = "neg exp sigmoid tanh abs square sqrt rsqrt reciprocal pow clamp __neg__ __pow__"


ALIASING.update(named(_VIEWS), named(_ELEMENTWISE), named(_POINTWISE), CASTING, {F.embedding, F.softplus})
ALIASING.update({torch.Tensor.T.__get__, torch.Tensor.mT.__get__})  # type: ignore[attr-defined]


def _elementwise(function: Callable[..., Any], capture: Capture, *args: Any, **kwargs: Any) -> Any:
    """x ∘ p, with p expanded to the shape of the result."""
    tracked = [value for value in args if capture.alias(value) is not None]
    tensors = [value for value in args if isinstance(value, Tensor)]
    if len(tracked) != 1 or len(tensors) == 1 or any(isinstance(value, Tensor) for value in kwargs.values()):
        raise UncoveredError("an elementwise operation of several parameters, or of none with an activation")
    if tracked[0] is args[0] and function in _WRITING:
        raise UncoveredError("a parameter is modified in place")
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    copy = capture.expand(tracked[0], shape)
    return function(*(copy if value is tracked[0] else value for value in args), **kwargs)


_WRITING = set(named(_IN_PLACE))
for _function in [*named(_ELEMENTWISE), *_WRITING]:
    RULES[_function] = partial(_elementwise, _function)


@rule(torch.Tensor.expand)
def expand(capture: Capture, input: Tensor, *sizes: Any, **options: Any) -> Tensor:
    """One copy a sample: class tokens, prompts."""
    return capture.expand(input, input.detach().expand(*sizes, **options).shape)


@rule(torch.Tensor.expand_as)
def expand_as(capture: Capture, input: Tensor, other: Tensor) -> Tensor:
    """As `expand`."""
    return capture.expand(input, other.shape)


@rule(torch.broadcast_to, torch.Tensor.broadcast_to)
def broadcast_to(capture: Capture, input: Tensor, *size: Any, **options: Any) -> Tensor:
    """As `expand`."""
    return capture.expand(input, input.detach().broadcast_to(*size, **options).shape)


@rule(torch.Tensor.repeat)
def repeat(capture: Capture, input: Tensor, *sizes: Any, **options: Any) -> Tensor:
    """As `expand`, where only dimensions of size 1 are repeated."""
    sizes = sizes or tuple(options.values())
    times = tuple(sizes[0]) if isinstance(sizes[0], list | tuple) else sizes
    padded = (1,) * (len(times) - input.dim()) + tuple(input.shape)
    if any(size != 1 and count != 1 for size, count in zip(padded, times, strict=True)):
        raise UncoveredError("a parameter repeated along a dimension that has entries of its own")
    return capture.expand(input, [size * count for size, count in zip(padded, times, strict=True)]).contiguous()
