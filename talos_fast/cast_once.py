"""`CastOnce`: under autocast, weights that do not train are cast to the compute dtype once, not in every step."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from talos_fast.takeover import PRODUCTS, Takeover


class CastOnce(Takeover):
    """Products of matrices and convolutions get a cast copy of each frozen weight, made here.

    autocast casts the operands of these functions, and remembers, until it is left, the casts of leaves that train. So
    a frozen float32 weight is cast at every use: in each step, and again in a forward that checkpointing repeats.
    Only what autocast would cast is replaced, by the same bits, and the model itself is not touched: embeddings,
    norms and the dtypes that its code asks for stay as they are.

    The copies take 2 bytes an entry for as long as this lives. The peak of a step hardly changes: without them autograd
    keeps such casts, of all layers above the lowest that trains, until the backward pass has used them.

    Args:
        model: its parameters that require no gradient must not change from now on. Buffers that are written to are cast
            anew; in compiled code, which cannot ask for that, autocast casts all of them.
        dtype: autocast's.
        fixed: further tensors that the forward reads as weights and that do not change.
    """

    functions = PRODUCTS

    def __init__(self, model: nn.Module, dtype: torch.dtype, fixed: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._dtype = dtype
        self._casts = {t: t.detach().to(dtype) for t in (*_frozen(model), *fixed) if t.dtype is torch.float32}
        self._versions = {t: _version(t) for t in self._casts}
        self._buffers = dict.fromkeys(model.buffers())

    def answer(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The function on cast weights, where autocast would cast them."""
        return func(*map(self._cast, args), **{name: self._cast(value) for name, value in kwargs.items()})

    def _cast(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value not in self._casts:
            return value
        if torch.compiler.is_compiling() and value in self._buffers:
            return value
        device = value.device.type
        casts = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is self._dtype
        if casts and not torch.compiler.is_compiling() and _version(value) != self._versions[value]:
            self._casts[value], self._versions[value] = value.detach().to(self._dtype), _version(value)
        return self._casts[value] if casts else value


def _version(tensor: Tensor) -> int:
    """How often it was written to, as some modules do to their buffers; 0 for inference tensors, which do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _frozen(model: nn.Module) -> dict[Tensor, None]:
    """The tensors of a model that do not train, without tables that are only looked up."""
    found: dict[Tensor, None] = {}
    for module in model.modules():
        if not isinstance(module, nn.Embedding):
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            found |= dict.fromkeys(t for t in own if not t.requires_grad)
    return found
