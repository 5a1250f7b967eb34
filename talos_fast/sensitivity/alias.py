"""Tensors that are functions of one parameter, tracked in its place."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from talos_fast.sensitivity.registry import CASTING, UncoveredError
from talos_fast.sensitivity.uses import Outer, PerSample, Use, transposed


@dataclass(frozen=True)
class Alias:
    """A tensor that is a function of one parameter.

    Args:
        name: of the parameter.
        parameter: itself.
        tensor: the function's value.
        function: of the parameter; None for the parameter itself.
        place: the entries of the parameter that ``tensor`` holds, as a view of it; None if it holds something else.
    """

    name: str
    parameter: Tensor
    tensor: Tensor
    function: Callable[[Tensor], Tensor] | None = None
    place: Tensor | None = None

    def pull_back(self, use: Use) -> Use:
        """The use of the parameter, from a use of this alias."""
        if self.function is None:
            return use
        if isinstance(use, PerSample):
            grads = use.grads.reshape(len(use.grads), *self.tensor.shape)
            pull: Any = torch.func.vjp(self.function, self.parameter.detach())[1]
            return PerSample(torch.func.vmap(pull)(grads.to(self.tensor.dtype))[0])
        assert isinstance(use, Outer) and self.place is not None
        use = use if self.place.is_contiguous() else transposed(use)
        return replace(use, first=use.first + int(self.place.storage_offset()) - int(self.parameter.storage_offset()))

    def check_matrix(self) -> None:
        """Raises `UncoveredError` unless this is the parameter, or a block of its entries in order or transposed."""
        place = self.place
        in_order = place is not None and (place.is_contiguous() or (place.dim() == 2 and place.t().is_contiguous()))
        if self.function is not None and not (in_order and self.parameter.is_contiguous()):
            raise UncoveredError("a matrix that is computed from the parameter")


def derived(
    source: Alias, output: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[Alias]:
    """The aliases that ``output = func(*args, **kwargs)`` holds, a function of ``source`` and constants."""

    def function(parameter: Tensor, index: int | None) -> Tensor:
        value = parameter if source.function is None else source.function(parameter)
        put = lambda leaf: value if leaf is source.tensor else leaf  # noqa: E731
        result = func(*tree_map(put, args), **tree_map(put, kwargs))
        found: Tensor = result if index is None else result[index]
        return found

    owner = source.parameter.untyped_storage().data_ptr()
    parts = [(None, output)] if isinstance(output, Tensor) else list(enumerate(output))
    for index, tensor in parts:
        if tensor is source.tensor:
            continue
        # A view says itself which entries it holds; a cast holds those of its source.
        view = source.place is not None and tensor.untyped_storage().data_ptr() == owner
        place = tensor if view else source.place if func in CASTING else None
        yield Alias(source.name, source.parameter, tensor, partial(function, index=index), place)
