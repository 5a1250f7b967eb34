"""TALL masks and Consensus merging (Wang et al. 2024): what in the sum of the vectors belongs to which task."""

from collections.abc import Sequence

import torch
from torch import Tensor

from talos_fast.errors import TalosError
from talos_fast.indexing import scatter_
from talos_fast.mask import Mask
from talos_fast.sparse_vector import common
from talos_fast.stack import entrywise, stacks
from talos_fast.task_vector import TaskVector


def _claimed(values: Tensor, lam: float) -> Tensor:
    """|τ_t| ≥ λ |τ_MTL - τ_t|, (T, U) bool; never True where task t moves nothing."""
    rest = (values.sum(dim=0) - values).abs_()
    return (values.abs() >= lam * rest) & (values != 0)


def tall_masks(vectors: Sequence[TaskVector], *, lam: float = 0.4) -> list[Mask]:
    """One mask a task: m_t = [|τ_t| ≥ λ |τ_MTL - τ_t|], with τ_MTL = Σ_t τ_t.

    ``sum(vectors).restrict(mask)`` is what the paper reconstructs task t from. The released TaLoS scripts leave out the
    absolute value on the right and so keep more; this is the paper's rule. Where a task moves nothing its mask is
    False: the definition holds there only where τ_MTL is zero too.

    Args:
        vectors: of one base.
        lam: λ; larger keeps less. The paper searches 0.2 … 0.6.

    Raises:
        TalosError: no vector, different bases, or a λ that is not positive.
    """
    _check(lam)
    masks: list[dict[str, Tensor]] = [{} for _ in vectors]
    for name, stack in stacks(vectors):
        for mask, claimed in zip(masks, _claimed(stack.values, lam), strict=True):
            full = torch.zeros(stack.shape, dtype=torch.bool, device="cpu")
            scatter_(full, stack.indices, claimed.cpu())
            mask[name] = full
    base, _ = common(vectors)
    return [Mask(mask, base=base, info={"selection": "tall_mask", "lam": lam}) for mask in masks]


def consensus(vectors: Sequence[TaskVector], *, lam: float = 0.4, agreement: int = 2) -> TaskVector:
    """Consensus: τ_MTL where at least ``agreement`` tasks' TALL masks hold; entries of fewer tasks are removed.

    Sparse vectors overlap little: an entry that one task alone moves has the claim of that task alone, and is removed.

    Args:
        vectors: of one base.
        lam: λ of the TALL masks.
        agreement: how many tasks must claim an entry (the paper's k).

    Raises:
        TalosError: no vector, different bases, a λ that is not positive, or an agreement that cannot be reached.
    """
    _check(lam)
    if not 1 <= agreement <= len(vectors):
        raise TalosError(f"agreement={agreement} of {len(vectors)} tasks: give 1 to the number of vectors")

    def rule(values: Tensor) -> Tensor:
        return values.sum(dim=0) * (_claimed(values, lam).sum(dim=0) >= agreement)

    return entrywise(vectors, rule)


def _check(lam: float) -> None:
    if not lam > 0:
        raise TalosError(f"lam={lam}: must be positive")
