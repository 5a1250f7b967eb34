"""Several vectors side by side, tensor by tensor, on the union of the entries that they move."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from talos_fast.delta import SparseDelta, union
from talos_fast.errors import TalosError
from talos_fast.sparse_vector import SparseVector, common
from talos_fast.task_vector import TaskVector


@dataclass(frozen=True)
class Stack:
    """The changes of one parameter in T vectors.

    Args:
        shape: of the parameter.
        indices: (U,) flat and ascending: what any of the vectors moves; None means every entry.
        values: (T, U), zero where a vector does not move the entry.
    """

    shape: tuple[int, ...]
    indices: Tensor | None
    values: Tensor


def stacks(vectors: Sequence[SparseVector]) -> Iterator[tuple[str, Stack]]:
    """Name and `Stack` of every parameter that any vector moves, one at a time, so that memory is bounded by a tensor.

    Raises:
        TalosError: no vector, or one name with different shapes.
    """
    if not vectors:
        raise TalosError("there is no task vector to merge; pass at least one")
    for name in dict.fromkeys(name for vector in vectors for name in vector.deltas):
        rows = [vector.deltas.get(name) for vector in vectors]
        moving = [row for row in rows if row is not None]
        shape = moving[0].shape
        if other := next((row.shape for row in moving if row.shape != shape), None):
            raise TalosError(f"{name!r}: vectors of shapes {shape} and {other} cannot be combined")
        indices = union(moving)
        spread = [None if row is None else row.spread(indices).values for row in rows]
        still = torch.zeros_like(next(values for values in spread if values is not None))
        yield name, Stack(shape, indices, torch.stack([still if values is None else values for values in spread]))


def total(values: Tensor) -> Tensor:
    """The sum of the changes, (T, U) -> (U,)."""
    return values.sum(dim=0)


def entrywise(vectors: Sequence[TaskVector], rule: Callable[[Tensor], Tensor]) -> TaskVector:
    """The vector whose entries are ``rule`` of the entries of several vectors; entries that become zero are left out.

    Args:
        vectors: T of one base.
        rule: (T, U) changes, zero where a vector does not move an entry, to (U,); must give zero for all zeros.

    Raises:
        TalosError: no vector, different bases or shapes.
    """
    deltas = {}
    base, info = common(vectors)
    for name, stack in stacks(vectors):
        merged = rule(stack.values)
        deltas[name] = SparseDelta(stack.shape, merged, stack.indices).select(merged != 0)
    return TaskVector.from_deltas(deltas, base=base, info=info)
