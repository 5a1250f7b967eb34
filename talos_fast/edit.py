"""`Edit`: a model held at base + Σ coefficient * delta, able to move along and to go back, bit for bit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from talos_fast.delta import SparseDelta, union
from talos_fast.errors import TalosError
from talos_fast.fingerprint import Target, named_tensors
from talos_fast.indexing import gather, scatter_


@dataclass(frozen=True)
class _Touched:
    """One tensor of the target: the entries that any direction moves, and what was there."""

    tensor: Tensor
    indices: Tensor | None
    original: Tensor
    directions: tuple[tuple[int, SparseDelta], ...]


class Edit:
    """Keeps the original entries that ``directions`` touch, so that any coefficients start from the base, none drifts.

    A move reads and writes the touched entries only. They and the changes lie on the target's device meanwhile.

    Args:
        target: a module or state dict, edited in place; nothing is written before `move`.
        directions: name -> change; one mapping for each coefficient of `move`.

    Raises:
        TalosError: a name that the target lacks, another shape, or two names of one tied parameter that move apart.
    """

    def __init__(self, target: Target, *directions: Mapping[str, SparseDelta]) -> None:
        tensors, first = named_tensors(target), _first_names(target)
        grouped: dict[str, list[tuple[int, SparseDelta]]] = {}
        for number, deltas in enumerate(directions):
            own: dict[str, tuple[str, SparseDelta]] = {}
            for alias, delta in deltas.items():
                name = first.get(alias, alias)
                _check(name, delta, tensors)
                if name in own:
                    _require_equal(*own[name], alias, delta)
                    continue
                own[name] = alias, delta
                grouped.setdefault(name, []).append((number, delta.to(tensors[name].device)))
        self._count = len(directions)
        self._touched = [_touch(tensors[name], moving) for name, moving in grouped.items()]

    def move(self, *coefficients: float) -> None:
        """Sets every touched entry to base + Σ coefficient * delta, computed in double and rounded once.

        Raises:
            TalosError: another number of coefficients, or one that is NaN or infinite; nothing is written then.
        """
        if len(coefficients) != self._count:
            raise TalosError(f"{len(coefficients)} coefficients for {self._count} directions; give one each")
        require_finite(coefficients)
        for touched in self._touched:
            edited = touched.original.to(torch.float64, copy=True)
            for number, delta in touched.directions:
                delta.add_to(edited, coefficients[number])
            scatter_(touched.tensor, touched.indices, edited.to(touched.original.dtype))

    def revert(self) -> None:
        """Restores the very bits that were there."""
        for touched in self._touched:
            scatter_(touched.tensor, touched.indices, touched.original)


def _touch(tensor: Tensor, moving: list[tuple[int, SparseDelta]]) -> _Touched:
    indices = union([delta for _, delta in moving])
    directions = tuple((number, delta.spread(indices)) for number, delta in moving)
    return _Touched(tensor, indices, gather(tensor, indices), directions)


def _first_names(target: Target) -> dict[str, str]:
    """Each name of a module's parameter -> its first one; a state dict calls tied parameters by each of theirs."""
    if not isinstance(target, nn.Module):
        return {}
    names = {p: name for name, p in target.named_parameters()}
    return {name: names[p] for name, p in target.named_parameters(remove_duplicate=False)}


def _require_equal(name: str, delta: SparseDelta, other: str, same: SparseDelta) -> None:
    if not torch.equal(delta.dense(), same.dense()):
        raise TalosError(f"{name!r} and {other!r} are one parameter of the model, but the task vector moves them apart")


def _check(name: str, delta: SparseDelta, tensors: Mapping[str, Tensor]) -> None:
    if name not in tensors:
        example = next(iter(tensors), None)
        hint = ""
        if name.removeprefix("encoder.") in tensors:
            hint = "; a command's vector is of an encoder: talos_fast.models.Classifier(model, torch.nn.Identity())"
        raise TalosError(
            f"the task vector moves {name!r}, which the model lacks; its tensors are like {example!r}{hint}"
        )
    if tuple(tensors[name].shape) != delta.shape:
        raise TalosError(f"{name!r}: the vector has shape {delta.shape}, the model {tuple(tensors[name].shape)}")


def require_finite(coefficients: Sequence[float]) -> None:
    """Refuses coefficients that would destroy what they move.

    Raises:
        TalosError: one is NaN or infinite.
    """
    if not all(map(math.isfinite, coefficients)):
        raise TalosError(f"coefficients {coefficients}: every one must be a finite number; nothing was moved")
