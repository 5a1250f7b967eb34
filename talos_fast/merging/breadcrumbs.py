"""Model Breadcrumbs (Davari and Belilovsky 2024): neither the outliers nor the negligible changes."""

from collections.abc import Sequence

from talos_fast.arguments import share
from talos_fast.delta import SparseDelta
from talos_fast.errors import TalosError
from talos_fast.stack import entrywise, total
from talos_fast.task_vector import TaskVector


def breadcrumbs(vectors: Sequence[TaskVector], *, beta: float = 0.85, gamma: float = 0.01) -> TaskVector:
    """In every tensor of every vector, removes the ⌊βn⌋ smallest and the ⌊γn⌋ largest of n entries; then the sum.

    Entries that do not move are the smallest of all. The paper writes γ for what remains below the outliers: its 99 %
    is 0.01 here. The released TaLoS scripts cut row by row and keep fixed shares; this is the paper's cut by layer.

    Args:
        vectors: of one base.
        beta: the fraction of small changes to remove, in [0, 1).
        gamma: the fraction of large changes to remove, in [0, 1).

    Raises:
        TalosError: no vector, different bases, or fractions that leave nothing.
    """
    if not (beta >= 0 and gamma >= 0 and beta + gamma < 1):
        raise TalosError(f"beta={beta}, gamma={gamma}: fractions to remove; both from 0, and less than 1 together")
    return entrywise([_cut(vector, beta, gamma) for vector in vectors], total)


def _cut(vector: TaskVector, beta: float, gamma: float) -> TaskVector:
    return vector.with_deltas({name: _between(delta, beta, gamma) for name, delta in vector.deltas.items()})


def _between(delta: SparseDelta, beta: float, gamma: float) -> SparseDelta:
    smallest, largest = share(beta, delta.numel), share(gamma, delta.numel)
    order = delta.values.abs().argsort(descending=True, stable=True)
    keep = delta.values.new_zeros(len(order), dtype=order.dtype).bool()
    keep[order[largest : delta.numel - smallest]] = True
    return delta.select(keep)
