"""`Linearized`: a model in place of its first-order Taylor expansion, and what a task vector makes of a model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from talos_fast.edit import Edit
from talos_fast.errors import TalosError
from talos_fast.task_vector import TaskVector

Tangents = Callable[[], Mapping[str, Tensor]]
"""Gives the direction by parameter name; called once a forward, so that it may be computed from what trains."""


class Linearized(nn.Module):
    """f_lin(x) = f(x, θ0) + α J_θ f(x, θ0) τ of a model f (Ortiz-Jimenez et al. 2023, Eq. 3), as a module.

    One forward-mode pass gives both terms, and the second is differentiable in τ. The expansion is that of the network
    in evaluation mode, where it is one function. Gradients reach τ only; no parameter of the model is written.

    Args:
        model: f; what it returns, a tensor or a structure of tensors, is expanded.
        tangents: τ; the names it lacks do not move.
        origin: θ0, every parameter by name; by default the model's parameters as they are at each call.
    """

    def __init__(self, model: nn.Module, tangents: Tangents, origin: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.model = model
        self.alpha = 1.0
        self._tangents, self._origin = tangents, origin

    @classmethod
    def along(cls, model: nn.Module, vector: TaskVector) -> "Linearized":
        """The expansion of ``model`` at its parameters, along a task vector.

        Raises:
            TalosError: the vector names or shapes do not fit the model.
        """
        Edit(model, vector.deltas)  # checks names and shapes, and writes nothing
        parameters = dict(model.named_parameters())
        tangents = {name: delta.to(parameters[name]) for name, delta in vector.to_dense().items()}
        return cls(model, lambda: tangents)

    def move(self, alpha: float) -> None:
        """Sets α, as `Edit.move` does."""
        self.alpha = alpha

    def revert(self) -> None:
        """Nothing was written."""
        self.alpha = 0.0

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the model takes, to f_lin."""
        origin = self._origin or {name: p.detach() for name, p in self.model.named_parameters()}
        tangents = dict(self._tangents()) if self.alpha else {}

        def model(values: Mapping[str, Tensor]) -> Any:
            return torch.func.functional_call(self.model, {**origin, **values}, inputs, named)

        with differentiable_forward(self.model):
            if not tangents:
                return model({})
            primals = {name: origin[name] for name in tangents}
            value, slope, *_ = torch.func.jvp(model, (primals,), (tangents,))
        return tree_map(lambda v, s: v + self.alpha * s, value, slope)


@contextmanager
def differentiable_forward(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and kernels that forward-mode differentiation supports; everything is as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes.items():
            module.training = training


def edited(model: nn.Module, vector: TaskVector) -> tuple[nn.Module, Edit | Linearized]:
    """How a model moved along a vector is evaluated: the module to call, and what moves it to a coefficient and back.

    Vectors of non-linear fine-tuning are written into the model, those of linearized fine-tuning are a direction of its
    expansion.
    """
    if not vector.linearized:
        return model, Edit(model, vector.deltas)
    expansion = Linearized.along(model, vector)
    return expansion, expansion


@contextmanager
def moved(model: nn.Module, vector: TaskVector, coefficient: float = 1.0) -> Iterator[nn.Module]:
    """The module to call for ``model`` moved along a vector, inside the block; after it the model is bit-identical."""
    module, edit = edited(model, vector)
    try:
        edit.move(coefficient)
        yield module
    finally:
        edit.revert()


def require_parameters(vector: TaskVector, what: str) -> None:
    """Refuses a vector that is no change of parameters.

    Raises:
        TalosError: it was trained on the linearized model.
    """
    if vector.linearized:
        raise TalosError(
            f"{what}: the vector is of a linearized model (method {vector.info.get('method', '?')}), which no "
            "parameters hold; evaluate talos_fast.merge(base, vectors, alpha=…), which is a module"
        )
