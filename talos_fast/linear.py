"""`Linearized`: the first-order Taylor expansion of a model, called in the model's place."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from talos_fast.batch import Batch
from talos_fast.edit import fitting, require_finite
from talos_fast.errors import TalosError
from talos_fast.forward import Forward
from talos_fast.gradient_checkpointing import is_checkpointed_block
from talos_fast.modules import unwrapped
from talos_fast.tangents import Direction, Tangents
from talos_fast.task_vector import TaskVector

Directions = Callable[[], Mapping[str, Direction]]
"""Gives the direction by parameter name; called once a forward, so that it may be computed from what trains."""


@dataclass(frozen=True)
class _Fixed:
    """Directions that stay as they are."""

    directions: Mapping[str, Tensor]

    def __call__(self) -> Mapping[str, Tensor]:
        return self.directions


def dense_direction(model: nn.Module, vector: TaskVector) -> dict[str, Tensor]:
    """The change of each parameter, dense.

    Raises:
        TalosError: the vector does not fit the model, or moves a buffer.
    """
    parameters = dict(model.named_parameters())
    deltas = fitting(model, vector.deltas)
    if buffers := sorted(deltas.keys() - parameters.keys()):
        raise TalosError(f"the vector moves the buffer {buffers[0]!r}, by which a linearized model has no derivative")
    return {name: delta.dense().to(parameters[name]) for name, delta in deltas.items()}


class Linearized(nn.Module):
    """f_lin(x) = f(x, θ0) + α J_θ f(x, θ0) τ of a model f (Ortiz-Jimenez et al. 2023, Eq. 3), as a module.

    One forward-mode pass gives both terms, and the second is differentiable in τ. The expansion is that of the network
    in evaluation mode, where it is one function. Gradients reach τ only; no parameter of the model is written.

    Args:
        model: f; what it returns, a tensor or a structure of tensors, is expanded.
        tangents: τ; the names it lacks do not move.
        origin: θ0, every parameter by name; by default the model's parameters as they are at each call.

    Raises:
        TalosError: when called, and not compiled, if an operation of the model has no forward-mode derivative.
    """

    def __init__(self, model: nn.Module, tangents: Directions, origin: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.model = model
        self.alpha = 1.0
        self._tangents, self._origin = tangents, origin
        self._kept: ExitStack | None = None
        self._open = False
        self._called = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise AttributeError(
                f"{error}: for a linear method forward= must call the model itself, which stands for the linearized one"
            ) from None

    @classmethod
    def along(cls, model: nn.Module, vector: TaskVector) -> "Linearized":
        """The expansion of ``model``, or of what is in its wrappers, at its parameters, along a task vector.

        Raises:
            TalosError: the vector names or shapes do not fit the model.
        """
        model = unwrapped(model)
        return cls(model, _Fixed(dense_direction(model, vector)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As of any module; a fixed direction is cast and moved with the model."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if isinstance(self._tangents, _Fixed):
            self._tangents = _Fixed({name: fn(tangent) for name, tangent in self._tangents.directions.items()})
        return self

    def move(self, alpha: float) -> None:
        """Sets α, as `Edit.move` does."""
        require_finite((alpha,))
        self.alpha = alpha

    def revert(self) -> None:
        """Back to α = 0; no parameter was ever written."""
        self.alpha = 0.0

    @contextmanager
    def around(self) -> Iterator[None]:
        """Enter it around forward and backward: gradient checkpointing runs parts of the forward in the backward."""
        with ExitStack() as self._kept:
            try:
                yield
            finally:
                self._kept = None

    def logits(self, forward: Forward, batch: Batch) -> Tensor:
        """What the user's ``forward`` makes of it.

        Raises:
            TalosError: it called another model; not seen where it is compiled.
        """
        if torch.compiler.is_compiling():
            return forward(self, batch)
        self._called = False
        logits = forward(self, batch)
        if not self._called:
            raise TalosError("forward= did not call the model that it was given, which stands for the linearized one")
        return logits

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """f_lin of the inputs that the model takes."""
        self._called = True
        if self._open:
            return self._evaluated(inputs, named)
        if torch.compiler.is_compiling():  # which cannot trace ExitStack; compiled code is not run again
            with self._expanded():
                return self._evaluated(inputs, named)
        if torch.is_inference_mode_enabled():  # which silently drops tangents
            with torch.inference_mode(False), torch.no_grad():
                return self.forward(*inputs, **named)
        with ExitStack() as until:
            tangents = until.enter_context(self._expanded())
            output = self._evaluated(inputs, named)
            # Unless a checkpoint will run parts of the forward again, the level of the tangents ends here: a backward
            # pass inside it would itself be differentiated.
            if self._kept is not None and tangents.again:
                self._kept.push(until.pop_all())
        return output

    def _evaluated(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        try:
            output = self.model(*inputs, **named)
        except NotImplementedError as error:
            if not re.search("forward (mode )?AD", str(error)):
                raise
            raise TalosError(
                f"the model cannot be linearized: {str(error).partition(' because ')[0].rstrip('.')}; use another "
                "implementation of it (of checkpoints use_reentrant=False), or a method that is not linear"
            ) from error
        return tree_map_only(Tensor, self._value, output)

    def _value(self, dual: Tensor) -> Tensor:
        value, slope = unpack_dual(dual)
        moved: Tensor = value if slope is None else value + self.alpha * slope
        return moved

    @contextmanager
    def _expanded(self) -> Iterator[Tangents]:
        """Within it the model's parameters are duals, and evaluate with their tangents."""
        directions = self._tangents() if self.alpha else {}
        with eval_mode(self.model), dual_level():
            held: dict[Tensor, Tensor] = {}
            moves: dict[Tensor, tuple[Tensor, Direction]] = {}
            for name, p in self.model.named_parameters():
                start = self._origin[name] if self._origin else p.detach() if p.requires_grad else p
                direction = directions.get(name)
                if isinstance(direction, Tensor):
                    direction = direction.to(start)  # the model inside may have been moved by itself
                held[p] = make_dual(start, direction) if isinstance(direction, Tensor) else start
                if direction is not None:
                    moves[held[p]] = start, direction
            with holding(self.model, held), Tangents(moves) as tangents:
                self._open = True
                try:
                    yield tangents
                finally:
                    self._open = False


@contextmanager
def holding(model: nn.Module, held: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Puts other tensors in the place of a model's parameters, tied ones together."""
    places = [(m._parameters, name, p) for m in model.modules() for name, p in m._parameters.items() if p is not None]
    try:
        for parameters, name, p in places:
            parameters[name] = held.get(p, p)  # type: ignore[assignment]
        yield
    finally:
        for parameters, name, p in places:
            parameters[name] = p


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for all modules but blocks that checkpoint themselves; restores all modes on exit."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module, training in modes.items():
            # Blocks of Hugging Face checkpoint in training mode only, so they stay in it; the dropouts inside do not.
            module.training = training and is_checkpointed_block(module)
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def differentiable_forward(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and kernels that torch's own forward-mode differentiation supports; restores all on exit."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with eval_mode(model), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
