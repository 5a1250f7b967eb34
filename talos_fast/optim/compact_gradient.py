"""`CompactGradient`: what stands in ``p.grad`` for a gradient of which only the selected entries are kept.

It has the parameter's shape, so that everything which walks over gradients finds one, and holds (entries,) numbers.
What is linear goes through to them: the accumulation of autograd (a dense gradient is gathered on its way in),
`zero_grad`, GradScaler's unscaling with its check for infinities, torch's ``clip_grad_norm_``. All else is refused.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from talos_fast.errors import TalosError
from talos_fast.optim.compact_operator import gather_selected
from talos_fast.optim.selection import Selection

_aten = torch.ops.aten
_ZEROS = {_aten.zero_.default, _aten._foreach_zero_.default}
_IN_PLACE = {
    *_ZEROS, _aten.mul_.Tensor, _aten.div_.Tensor, _aten._foreach_mul_.Tensor, _aten._foreach_mul_.Scalar,
    _aten._foreach_div_.Scalar, _aten._amp_foreach_non_finite_check_and_unscale_.default,
}  # fmt: skip
_NORMS = {_aten.linalg_vector_norm.default, _aten._foreach_norm.Scalar}


class CompactGradient(Tensor):
    """The selected entries of one parameter's gradient.

    Args:
        parameter: whose gradient it is; gives shape, strides, dtype and device.
        selection: which of its entries are kept.
        values: (entries,) float32, float64 for float64 parameters, in the parameter's memory order.
        whole_norm: 2-norm of the gradient before it was compacted, 0-d, where that is wanted.

    Attributes:
        passes: how many gradients were added up; ``whole_norm`` says nothing about the sum of several.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    selection: Selection
    values: Tensor  # type: ignore[assignment]
    whole_norm: Tensor | None
    passes: int

    @staticmethod
    def __new__(
        cls: "type[CompactGradient]",
        parameter: Tensor,
        selection: Selection,
        values: Tensor,
        whole_norm: Tensor | None = None,
    ) -> "CompactGradient":
        """A tensor without storage of its own, laid out as the parameter."""
        self: CompactGradient = torch.Tensor._make_wrapper_subclass(
            cls, parameter.shape, strides=parameter.stride(), dtype=parameter.dtype, device=parameter.device
        )
        self.selection, self.values, self.whole_norm, self.passes = selection, values, whole_norm, 1
        return self

    @classmethod
    def of(cls, parameter: Tensor, selection: Selection, dense: Tensor, keep_norm: bool) -> "CompactGradient":
        """What is kept of a dense gradient of the parameter's shape."""
        values = gather_selected(dense, selection)
        return cls(parameter, selection, values, _norm(dense, values) if keep_norm else None)

    def add_values(self, values: Tensor) -> None:
        """Adds the selected entries of another backward pass, (entries,)."""
        self.values.add_(values)
        self.passes += 1

    def _add_dense(self, dense: Tensor) -> "CompactGradient":
        gather_selected(dense, self.selection, into=self.values)
        self.passes += 1
        if self.whole_norm is not None and self.passes == 1:  # the first after zero_grad(set_to_none=False)
            self.whole_norm = _norm(dense, self.values)
        return self

    def require(self, selection: Selection | None) -> None:
        """Refuses to be read under another selection.

        Raises:
            TalosError: it was made by the hooks of another optimizer, or for a mask that is no more.
        """
        if self.selection is not selection:
            raise TalosError(
                f"the gradient of a parameter of shape {tuple(self.shape)} was compacted by another optimizer, or for "
                "another mask; remove() what its compact_gradients returned, and set the gradients to None"
            )

    def measured(self, entries: str) -> Tensor:
        """A tensor whose 2-norm is that of the gradient over ``"all"`` or ``"selected"`` entries.

        Raises:
            TalosError: "all", where that norm was not kept or was kept of one of several backward passes.
        """
        if entries == "selected":
            return self.values
        where = f"the compacted gradient of a parameter of shape {tuple(self.shape)}"
        if self.whole_norm is None:
            raise TalosError(
                f"{where} has no norm over all entries: clip with entries='selected', or pass norm='all' to "
                "compact_gradients"
            )
        if self.passes > 1:
            # |a + b|² needs the product of a and b, and the unselected entries of a are gone.
            raise TalosError(
                f"{where} is the sum of {self.passes} backward passes, whose norm over all entries is not known; "
                "clip with entries='selected', or say compact_gradients(norm='all', accumulate=…)"
            )
        return self.whole_norm

    def _parts(self) -> list[Tensor]:
        return [self.values] if self.whole_norm is None else [self.values, self.whole_norm]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"CompactGradient({self.selection.count} of {self.numel()} entries: {self.values})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Sends what is linear on to the entries, and refuses the rest."""
        target, rest = args[0], args[1:]
        scalar = not any(isinstance(other, Tensor) and other.numel() != 1 for other in rest)
        if func in _IN_PLACE and scalar:
            return _in_place(func, target, rest)
        if func in _NORMS and rest in ((), (2,)):
            return func(_measured(target), *rest, **(kwargs or {}))
        if func is _aten.add_.Tensor and isinstance(target, cls) and not isinstance(rest[0], cls) and not kwargs:
            return target._add_dense(rest[0])
        raise TalosError(
            f"{func} of a compacted gradient, which has its selected entries only; read its .values, or do without "
            "compact_gradients (DistributedDataParallel has to: it moves whole gradients)"
        )


def _norm(dense: Tensor, values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(dense.detach(), dtype=values.dtype)
    return norm


def _measured(target: Any) -> Any:
    """Plain tensors of the same 2-norms, for one tensor or a list."""
    if not isinstance(target, Tensor):
        return [_measured(member) for member in target]
    if not isinstance(target, CompactGradient):
        return target
    return target.measured("selected" if target.whole_norm is None else "all")


def _in_place(func: Any, target: Any, rest: tuple[Any, ...]) -> Any:
    """A linear function in place, on one tensor or on a list that may hold dense ones too."""
    members = [target] if isinstance(target, Tensor) else target
    parts = [part for m in members for part in (m._parts() if isinstance(m, CompactGradient) else [m])]
    if isinstance(target, Tensor):
        for part in parts:
            func(part, *rest)
    else:
        for dtype in {part.dtype for part in parts}:
            func([part for part in parts if part.dtype is dtype], *rest)
    if func in _ZEROS:
        for member in members:
            if isinstance(member, CompactGradient):
                member.passes = 0
    return target if isinstance(target, Tensor) else None
