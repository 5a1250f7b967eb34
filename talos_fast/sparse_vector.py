"""`SparseVector`: for each parameter name, the entries that moved and by how much; the algebra of task vectors."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from talos_fast.delta import SparseDelta
from talos_fast.errors import TalosError
from talos_fast.fingerprint import Fingerprint, base_numel, join
from talos_fast.indexing import gather
from talos_fast.mask import Mask

V = TypeVar("V", bound="SparseVector")


def _is_factor(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 0 and not np.iscomplexobj(value)
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex())


class SparseVector:
    """A vector over the parameters of one base model: sparse from end to end, linear, and knows its base.

    Attributes:
        deltas: name -> the change of that parameter, of those that moved.
        base: fingerprint of the model that it changes; empty if unknown.
        info: provenance (JSON).
    """

    deltas: dict[str, SparseDelta]
    base: Fingerprint
    info: dict[str, Any]

    __array_ufunc__ = None  # or NumPy would make an array of vectors, one an entry

    @classmethod
    def from_deltas(
        cls,
        deltas: Mapping[str, SparseDelta],
        *,
        base: Fingerprint | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> Self:
        """A vector from its parts; without ``base`` it can be applied to any model of fitting names and shapes."""
        vector = cls.__new__(cls)
        vector._set(deltas, base or {}, info)
        return vector

    def _set(self, deltas: Mapping[str, SparseDelta], base: Fingerprint, info: Mapping[str, Any] | None) -> None:
        self.deltas = {name: delta for name, delta in deltas.items() if len(delta.values)}
        self.base, self.info = dict(base), dict(info or {})

    def with_deltas(self, deltas: Mapping[str, SparseDelta]) -> Self:
        """Other changes of the same base, with the same provenance."""
        return self.from_deltas(deltas, base=self.base, info=self.info)

    def __add__(self, other: Self) -> Self:
        if not isinstance(other, SparseVector):
            return NotImplemented
        base, info = common((self, other))
        deltas = dict(self.deltas)
        for name, delta in other.deltas.items():
            mine = deltas.get(name)
            if mine is not None and mine.shape != delta.shape:
                raise TalosError(f"{name!r}: vectors of shapes {mine.shape} and {delta.shape} cannot be combined")
            deltas[name] = delta if mine is None else mine.plus(delta)
        return self.from_deltas(deltas, base=base, info=info)

    def __radd__(self, other: object) -> Self:
        """Lets ``sum([a, b, c])`` start from 0."""
        if isinstance(other, Real) and other == 0:
            return self
        return NotImplemented

    def __mul__(self, factor: float | Tensor) -> Self:
        if not _is_factor(factor):
            return NotImplemented
        factor = float(factor)
        if not math.isfinite(factor):
            raise TalosError(f"a task vector times {factor}: the factor must be a finite number")
        scaled = {name: delta.scaled(factor) for name, delta in self.deltas.items()}
        return self.with_deltas(scaled)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Tensor) -> Self:
        if not _is_factor(divisor):
            return NotImplemented
        if not float(divisor) or math.isinf(divisor):
            raise TalosError(f"a task vector divided by {float(divisor):g}")
        return self * (1.0 / float(divisor))

    def __neg__(self) -> Self:
        return self * -1.0

    def __sub__(self, other: Self) -> Self:
        if not isinstance(other, SparseVector):
            return NotImplemented
        return self + (-other)

    def restrict(self, mask: Mapping[str, Tensor]) -> Self:
        """mask ⊙ τ: the entries that ``mask`` selects; a parameter that it does not name is left out.

        Args:
            mask: name -> bool tensor of the parameter's shape (a `Mask` is such a mapping).

        Raises:
            TalosError: a shape that differs, or a mask that is not bool.
        """
        kept = {}
        for name, delta in self.deltas.items():
            if name not in mask:
                continue
            if mask[name].dtype is not torch.bool:
                raise TalosError(f"{name!r}: the mask is {mask[name].dtype}, not torch.bool; True keeps an entry")
            if tuple(mask[name].shape) != delta.shape:
                raise TalosError(f"{name!r}: the mask has shape {tuple(mask[name].shape)}, the vector {delta.shape}")
            kept[name] = delta.select(gather(mask[name], delta.indices))
        return self.with_deltas(kept)

    def dot(self, other: "SparseVector") -> float:
        """The inner product of the two deltas."""
        return sum(delta.dot(other.deltas[name]) for name, delta in self.deltas.items() if name in other.deltas)

    def norm(self) -> float:
        """The Euclidean norm."""
        return math.sqrt(sum(float(delta.values.double().square().sum()) for delta in self.deltas.values()))

    def cosine(self, other: "SparseVector") -> float:
        """dot(a, b) / (|a| |b|), 0 if either is zero."""
        norms = self.norm() * other.norm()
        return self.dot(other) / norms if norms else 0.0

    def mask(self) -> Mask:
        """The entries that moved, as a `Mask`."""
        return Mask({name: delta.support() for name, delta in self.deltas.items()}, base=self.base)

    def overlap(self, other: "SparseVector") -> dict[str, float]:
        """Jaccard index of the entries that moved, by name and ``"total"``; see `Mask.overlap`."""
        return self.mask().overlap(other.mask())

    def to_dense(self) -> dict[str, Tensor]:
        """Name -> fp32 delta of the parameter's shape, for the tensors that moved."""
        return {name: delta.dense() for name, delta in self.deltas.items()}

    def __len__(self) -> int:
        return len(self.deltas)

    def __iter__(self) -> Iterator[str]:
        return iter(self.deltas)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} tensors, {self.nnz:,} entries moved, {self.nbytes / 1e6:.2f} MB)"

    @property
    def linearized(self) -> bool:
        """Whether it is a direction of the linearized model (see `talos_fast.linear`), not a change of parameters."""
        return bool(self.info.get("linearized", False))

    @property
    def nnz(self) -> int:
        """How many entries moved."""
        return sum(len(delta.values) for delta in self.deltas.values())

    @property
    def numel(self) -> int:
        """Entries of the base (of the moved tensors, if the base is unknown)."""
        return base_numel(self.base) or sum(delta.numel for delta in self.deltas.values())

    @property
    def density(self) -> float:
        """Entries that moved, as a fraction of `numel`."""
        return self.nnz / self.numel if self.numel else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in the file that `save_pretrained` writes."""
        return sum(delta.nbytes for delta in self.deltas.values())


def require_several(vectors: Iterable[V]) -> list[V]:
    """The vectors as a list; refuses a single vector, which iterates over its names and so would pass for a list.

    Raises:
        TalosError: it is one vector, or something else is among them.
    """
    if isinstance(vectors, SparseVector):
        raise TalosError("vectors: found one task vector; give a list, such as [vector]")
    chosen = list(vectors)
    for vector in chosen:
        if not isinstance(vector, SparseVector):
            raise TalosError(
                f"vectors: found {vector!r:.40}, a {type(vector).__name__}; give task vectors, such as "
                "TaskVector.from_pretrained(path)"
            )
    return chosen


def common(vectors: Sequence[SparseVector]) -> tuple[Fingerprint, dict[str, Any]]:
    """The base that all vectors share, and the part of their ``info`` that a combination of them keeps.

    Raises:
        TalosError: they were made from different bases, or some on a linearized model and some not.
    """
    base: Fingerprint = {}
    for vector in vectors:
        base = join(base, vector.base, "these task vectors")
    kinds = {vector.linearized for vector in vectors}
    if len(kinds) > 1:
        raise TalosError(
            "one of these task vectors is of a linearized model and the other is not; they are evaluated differently "
            "and cannot be added"
        )
    return base, {"linearized": True} if True in kinds else {}
