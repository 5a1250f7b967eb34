"""`Takeover`: answers for some torch functions wherever they are called, whichever module calls them."""

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
PRODUCTS = (F.linear, F.conv1d, F.conv2d, F.conv3d, *MATMUL)
"""What multiplies an input with a weight: linear in both, and computed in the low precision of autocast."""


class Takeover(TorchFunctionMode):
    """Within it `answer` is called in place of each of ``functions``.

    Hooks and patched modules would have to know each class that holds a linear map; torch.compile traces through a mode
    without a graph break, and compiles anew when it is entered or left. torch switches a mode off while its handler
    runs, so the calls inside attention, and inside a checkpointed forward that the backward runs again, would be
    missed: the Python code of those is run with the mode entered once more.
    """

    functions: tuple[Callable[..., Any], ...]  # in a set torch.compile would not find them

    def answer(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What ``func(*args, **kwargs)`` gives; the mode is off meanwhile."""
        raise NotImplementedError

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """See the class."""
        kwargs = kwargs or {}
        if func in self.functions:
            return self.answer(func, args, kwargs)
        if func in _UNCHECKED:
            with self:
                return _UNCHECKED[func](*args, **kwargs)
        if func is checkpoint:  # of torch.compile only; elsewhere no mode is asked
            with self:  # dynamo lets a checkpoint enter a mode only if one was entered outside of it
                pass
            return func(self._within(args[0]), *args[1:], **kwargs)
        if func == Tensor.unflatten:  # in attention; torch.compile could not follow its super() before torch 2.14
            return torch.unflatten(*args, **kwargs)
        return func(*args, **kwargs)

    def _within(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with the mode on."""

        def inside(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return inside


def _unchecked(function: Any) -> FunctionType:
    """The same code without its opening `has_torch_function` check, which would hand the call to a mode."""
    scope = {name: value for name, value in function.__globals__.items() if name != "__name__"}
    never = dict.fromkeys(("has_torch_function", "has_torch_function_unary"), lambda _: False)
    opened = FunctionType(function.__code__, {**scope, **never}, function.__name__, function.__defaults__)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


_UNCHECKED = {
    f: _unchecked(f)
    for f in (F.multi_head_attention_forward, Tensor.backward, torch.autograd.backward, torch.autograd.grad)
}
