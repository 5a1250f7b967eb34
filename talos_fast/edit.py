"""`Edit`: a model held at base + coefficient * delta, able to move along and to go back, bit for bit."""

from collections.abc import Mapping

from torch import Tensor

from talos_fast.delta import SparseDelta
from talos_fast.errors import TalosError
from talos_fast.fingerprint import Target, named_tensors
from talos_fast.indexing import gather, scatter_


class Edit:
    """Keeps the original entries that ``deltas`` touch, so that any coefficient starts from the base and none drifts.

    Args:
        target: a module or state dict, edited in place; nothing is written before `move`.
        deltas: name -> change.

    Raises:
        TalosError: a name that the target lacks, or another shape.
    """

    def __init__(self, target: Target, deltas: Mapping[str, SparseDelta]) -> None:
        tensors = named_tensors(target)
        for name, delta in deltas.items():
            if name not in tensors:
                example = next(iter(tensors), None)
                raise TalosError(
                    f"the task vector moves {name!r}, which the model lacks; its tensors are like {example!r}"
                )
            if tuple(tensors[name].shape) != delta.shape:
                raise TalosError(
                    f"{name!r}: the vector has shape {delta.shape}, the model {tuple(tensors[name].shape)}"
                )
        self._deltas = dict(deltas)
        self._tensors: dict[str, Tensor] = {name: tensors[name] for name in deltas}
        self._originals = {name: gather(self._tensors[name], self._on_device(name)) for name in deltas}

    def _on_device(self, name: str) -> Tensor | None:
        indices = self._deltas[name].indices
        return None if indices is None else indices.to(self._tensors[name].device)

    def move(self, coefficient: float) -> None:
        """Sets every touched entry to base + coefficient * delta, computed in double and rounded once."""
        for name, delta in self._deltas.items():
            scatter_(self._tensors[name], self._on_device(name), delta.applied(self._originals[name], coefficient))

    def revert(self) -> None:
        """Restores the very bits that were there."""
        for name, original in self._originals.items():
            scatter_(self._tensors[name], self._on_device(name), original)
