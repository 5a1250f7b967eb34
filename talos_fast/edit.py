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
from talos_fast.interrupt import uninterrupted
from talos_fast.modules import unwrapped


@dataclass(frozen=True)
class _Touched:
    """One tensor of the target: the entries that any direction moves, and what was there."""

    name: str
    tensor: Tensor
    indices: Tensor | None
    original: Tensor
    directions: tuple[tuple[int, SparseDelta], ...]

    def moved(self, coefficients: Sequence[float]) -> Tensor:
        """The entries at original + Σ coefficient * delta."""
        edited = self.original.to(torch.float64, copy=True)
        for number, delta in self.directions:
            delta.add_to(edited, coefficients[number])
        return edited.to(self.original.dtype)


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
        tensors = named_tensors(target)
        grouped: dict[str, list[tuple[int, SparseDelta]]] = {}
        for number, deltas in enumerate(directions):
            for name, delta in fitting(target, deltas).items():
                grouped.setdefault(name, []).append((number, delta.to(tensors[name].device)))
        self._count = len(directions)
        self._coefficients: tuple[float, ...] = (0.0,) * len(directions)
        self._touched = [_touch(name, tensors[name], moving) for name, moving in grouped.items()]

    def move(self, *coefficients: float) -> None:
        """Sets every touched entry to base + Σ coefficient * delta, computed in double and rounded once.

        Raises:
            TalosError: another number of coefficients, or one that is NaN or infinite or takes an entry there; the
                base is there then.
        """
        if len(coefficients) != self._count:
            raise TalosError(f"{len(coefficients)} coefficients for {self._count} directions; give one each")
        require_finite(coefficients)
        with uninterrupted():
            sound = [self._write(touched, coefficients) for touched in self._touched]
            if not all(map(bool, sound)):
                self.revert()
                whole = all(bool(_is_finite(touched.original)) for touched in self._touched)
                why = f"coefficients {coefficients} are too large" if whole else "the model holds such entries already"
                raise TalosError(f"entries would be NaN or infinite: {why}; the base is left as it was")
            self._coefficients = coefficients

    @staticmethod
    def _write(touched: _Touched, coefficients: Sequence[float]) -> Tensor:
        """Writes the entries of one tensor; returns whether they are finite, as a tensor, without waiting for it."""
        edited = touched.moved(coefficients)
        scatter_(touched.tensor, touched.indices, edited)
        return _is_finite(edited)

    def require_in_place(self, target: Target) -> None:
        """Refuses a target that does not hold what the last `move` wrote; running statistics may have gone on.

        Raises:
            TalosError: its tensors were replaced, or touched entries of its parameters changed.
        """
        now = named_tensors(target)
        if any(t.name not in now or now[t.name].data_ptr() != t.tensor.data_ptr() for t in self._touched):
            raise TalosError("tensors of the model were replaced after the task vector was applied; load it anew")
        moving = dict(unwrapped(target).named_parameters()) if isinstance(target, nn.Module) else now
        kept = [
            (gather(touched.tensor, touched.indices) == touched.moved(self._coefficients)).all()
            for touched in self._touched
            if touched.name in moving
        ]
        if not all(map(bool, kept)):
            raise TalosError(
                "entries of this task vector were changed after it was applied; revert what was applied last first, or "
                "load the model anew if it was trained since"
            )

    def revert(self) -> None:
        """Restores the very bits that were there."""
        with uninterrupted():
            for touched in self._touched:
                scatter_(touched.tensor, touched.indices, touched.original)
            self._coefficients = (0.0,) * self._count


def _is_finite(entries: Tensor) -> Tensor:
    """From the extremes, which propagate NaN: thirty times as fast as `isfinite` of every entry."""
    return torch.stack(entries.aminmax()).isfinite().all()


def _touch(name: str, tensor: Tensor, moving: list[tuple[int, SparseDelta]]) -> _Touched:
    indices = union([delta for _, delta in moving])
    directions = tuple((number, delta.spread(indices)) for number, delta in moving)
    return _Touched(name, tensor, indices, gather(tensor, indices), directions)


def fitting(target: Target, deltas: Mapping[str, SparseDelta]) -> dict[str, SparseDelta]:
    """As `by_first_names`, of changes that fit.

    Raises:
        TalosError: also a name that the target lacks, or another shape.
    """
    tensors, found = named_tensors(target), by_first_names(target, deltas)
    for name, delta in found.items():
        _check(name, delta, tensors)
    return found


def by_first_names(target: Target, deltas: Mapping[str, SparseDelta]) -> dict[str, SparseDelta]:
    """The changes of a module's parameters by their first names; a state dict calls a tied one by each of its names.

    Raises:
        TalosError: two names of one parameter that move apart.
    """
    if not isinstance(target, nn.Module):
        return dict(deltas)
    target = unwrapped(target)
    names = {p: name for name, p in target.named_parameters()}
    first = {name: names[p] for name, p in target.named_parameters(remove_duplicate=False)}
    found: dict[str, SparseDelta] = {}
    for alias, delta in deltas.items():
        inner = alias.removeprefix("module.").removeprefix("_orig_mod.")  # state dicts of wrapped models
        name = first.get(alias, first.get(inner, alias))
        if name in found and not torch.equal(found[name].dense(), delta.dense()):
            raise TalosError(
                f"{name!r} and {alias!r} are names of one parameter of the model, but the task vector moves them apart"
            )
        found.setdefault(name, delta)
    return found


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
