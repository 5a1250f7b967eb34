"""`SparseDelta`: the entries of one tensor that moved, and by how much."""

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from talos_fast.errors import TalosError
from talos_fast.indexing import flat_indices, gather
from talos_fast.storage import selection_nbytes


@dataclass(frozen=True)
class SparseDelta:
    """The change of one tensor: ``values`` at flat, ascending C-order ``indices`` of a tensor of ``shape``.

    Args:
        shape: of the parameter.
        values: (k,) fp32, or fp64 for an fp64 model.
        indices: (k,) int32 or int64; None means every entry.
        rest: (k,) like ``values``, or None. What rounding lost: where base + values does not round to the trained
            entry, ((base + values) + rest) in double precision does. Nearly always zero, so files hold only the
            exceptions.
    """

    shape: tuple[int, ...]
    values: Tensor
    indices: Tensor | None = None
    rest: Tensor | None = None

    @classmethod
    def between(cls, name: str, base: Tensor, finetuned: Tensor) -> "SparseDelta":
        """The delta that takes ``base`` to ``finetuned`` exactly; both of one shape and dtype, any strides.

        Raises:
            TalosError: shapes or dtypes differ, or an entry is NaN or infinite.
        """
        if base.shape != finetuned.shape or base.dtype != finetuned.dtype:
            raise TalosError(
                f"{name!r}: pretrained is {base.dtype} {tuple(base.shape)}, finetuned is {finetuned.dtype} "
                f"{tuple(finetuned.shape)}; a task vector needs two states of one model"
            )
        old, new = base.detach().cpu().reshape(-1), finetuned.detach().cpu().reshape(-1)
        moved = old != new
        indices = None if bool(moved.all()) else flat_indices(moved)
        old, new = gather(old, indices), gather(new, indices)
        wide = torch.promote_types(base.dtype, torch.float32)
        values = (new.double() - old.double()).to(wide)
        if not bool(values.isfinite().all()):
            raise TalosError(f"{name!r}: the difference holds NaN or infinite entries; the fine-tuning diverged")
        reached = old.double() + values.double()
        rest = torch.where(reached.to(new.dtype) == new, 0.0, new.double() - reached).to(wide)
        return cls(tuple(base.shape), values, indices, rest if bool(rest.any()) else None)

    @property
    def numel(self) -> int:
        """Entries of the parameter."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in a file: the values and the smaller of indices and bitmask."""
        width = self.values.element_size()
        exceptions = 0 if self.rest is None else (width + 4) * int(self.rest.count_nonzero())
        return width * len(self.values) + exceptions + selection_nbytes(len(self.values), self.numel)

    def applied(self, base: Tensor, coefficient: float) -> Tensor:
        """The edited entries, (k,) in the dtype of ``base`` (k,), which holds the original ones."""
        edited = base.double() + coefficient * self.values.to(base.device).double()
        if self.rest is not None:
            edited += coefficient * self.rest.to(base.device).double()
        return edited.to(base.dtype)

    def scaled(self, factor: float) -> "SparseDelta":
        """Every change times ``factor``."""
        rest = None if self.rest is None else self.rest * factor
        return replace(self, values=self.values * factor, rest=rest)

    def dense(self) -> Tensor:
        """The delta of the parameter's shape, zero where nothing moved."""
        full = self.values.new_zeros(self.numel)
        full[slice(None) if self.indices is None else self.indices] = self.values
        return full.view(self.shape)

    def support(self) -> Tensor:
        """The bool tensor of the parameter's shape that is True where an entry moved."""
        full = torch.zeros(self.numel, dtype=torch.bool)
        full[slice(None) if self.indices is None else self.indices] = True
        return full.view(self.shape)

    def plus(self, other: "SparseDelta") -> "SparseDelta":
        """The sum, present where either is; it is rounded once more, so neither's ``rest`` survives."""
        if self.indices is None or other.indices is None:
            return SparseDelta(self.shape, (self.dense() + other.dense()).reshape(-1))
        indices, place = torch.cat([self.indices, other.indices]).unique(sorted=True, return_inverse=True)
        moved = torch.cat([self.values, other.values])
        values = moved.new_zeros(len(indices)).index_add_(0, place, moved)
        return SparseDelta(self.shape, values, None if len(indices) == self.numel else indices)

    def dot(self, other: "SparseDelta") -> float:
        """The inner product, accumulated in double precision."""
        at_mine = gather(other.dense(), self.indices)
        return float(self.values.double() @ at_mine.double())
