"""`SparseDelta`: the entries of one tensor that moved, and by how much."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from talos_fast.errors import TalosError
from talos_fast.indexing import flat_indices, gather, scatter_, support
from talos_fast.storage import selection_nbytes


def _require_numbers(name: str, tensor: Tensor) -> None:
    if type(tensor.data).__name__ == "DTensor":  # importing the class would take longer than this library
        raise TalosError(f"{name!r} is a DTensor; gather the state dict first, such as with get_model_state_dict")
    if tensor.is_meta:
        raise TalosError(f"{name!r} is on the meta device, without numbers; load its weights first")
    if tensor.element_size() < 2:
        raise TalosError(f"{name!r} is {tensor.dtype}, which cannot be added to; convert the model to 16 bits or more")


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
            TalosError: shapes or dtypes differ, an entry is NaN or infinite, or a tensor has no numbers of its own.
        """
        for tensor in (base, finetuned):
            _require_numbers(name, tensor)
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

    def add_to(self, entries: Tensor, coefficient: float) -> None:
        """Adds coefficient times the change to the entries that move, (k,) fp64, in place."""
        entries += coefficient * self.values.double()
        if self.rest is not None:
            entries += coefficient * self.rest.double()

    def applied(self, base: Tensor) -> Tensor:
        """The trained entries, (k,) in the dtype of ``base`` (k,), which holds the original ones."""
        entries = base.to(torch.float64, copy=True)
        self.add_to(entries, 1.0)
        return entries.to(base.dtype)

    def _mapped(self, change: Callable[[Tensor], Tensor], indices: Tensor | None) -> "SparseDelta":
        """``change`` of the values and of what rounding lost, at other ``indices``."""
        rest = None if self.rest is None else change(self.rest)
        return SparseDelta(self.shape, change(self.values), indices, rest)

    def to(self, device: torch.device) -> "SparseDelta":
        """The same delta on a device."""
        if self.values.device == device:
            return self
        indices = None if self.indices is None else self.indices.to(device)
        return self._mapped(lambda entries: entries.to(device), indices)

    def scaled(self, factor: float) -> "SparseDelta":
        """Every change times ``factor``."""
        return self._mapped(lambda entries: entries * factor, self.indices)

    def dense(self) -> Tensor:
        """The delta of the parameter's shape, zero where nothing moved."""
        full = self.values.new_zeros(self.shape)
        scatter_(full, self.indices, self.values)
        return full

    def support(self) -> Tensor:
        """The bool tensor of the parameter's shape that is True where an entry moved."""
        return support(self.indices, self.shape)

    def select(self, keep: Tensor) -> "SparseDelta":
        """Only the entries where ``keep``, (k,) bool, is True."""
        if bool(keep.all()):
            return self
        indices = flat_indices(keep) if self.indices is None else self.indices[keep]
        return self._mapped(lambda entries: entries[keep], indices)

    def spread(self, indices: Tensor | None) -> "SparseDelta":
        """The same change on more entries, zero at the new ones; ``indices`` must hold all of its own."""
        if self.indices is None or (indices is not None and len(indices) == len(self.indices)):
            return self
        place = self.indices if indices is None else torch.searchsorted(indices, self.indices)

        def wider(entries: Tensor) -> Tensor:
            full = entries.new_zeros(self.numel if indices is None else len(indices))
            full[place] = entries
            return full

        return self._mapped(wider, indices)

    def plus(self, other: "SparseDelta") -> "SparseDelta":
        """The sum, present where either is; it is rounded once more, so neither's ``rest`` survives."""
        indices = union((self, other))
        values = self.spread(indices).values + other.spread(indices).values
        return SparseDelta(self.shape, values, indices)

    def dot(self, other: "SparseDelta") -> float:
        """The inner product, accumulated in double precision."""
        at_mine = gather(other.dense(), self.indices)
        return float(self.values.double() @ at_mine.double())


def union(deltas: Sequence[SparseDelta]) -> Tensor | None:
    """The flat, ascending indices of the entries that any of these deltas of one tensor moves; None means every entry.

    Linear in the size of the tensor: entries are marked, not sorted.
    """
    first = deltas[0].indices
    if all(delta.indices is first for delta in deltas):
        return first
    moved = torch.zeros(deltas[0].numel, dtype=torch.bool, device=deltas[0].values.device)
    for delta in deltas:
        if delta.indices is None:
            return None
        moved[delta.indices] = True
    indices = flat_indices(moved)
    return None if len(indices) == len(moved) else indices
