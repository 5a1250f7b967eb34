"""TIES-Merging (Yadav et al. 2023): trim, elect a sign, average what agrees with it."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from talos_fast.arguments import check_fraction, share
from talos_fast.delta import SparseDelta
from talos_fast.sensitivity.threshold import select_extreme
from talos_fast.stack import entrywise, total
from talos_fast.task_vector import TaskVector

Scope = Literal["global", "per_tensor"]


def trim(vector: TaskVector, density: float, scope: Scope) -> TaskVector:
    """The largest changes of a vector, by magnitude; the rest is zero.

    Args:
        vector: of N entries, counted over its whole base: those that do not move are the smallest of all.
        density: keeps ⌊density · N⌋ entries (at least one), fewer where fewer move; ties go to the earlier entry.
        scope: one threshold over all tensors (the paper's), or one a tensor (peft's and mergekit's).
    """
    check_fraction("density", density)
    groups = [vector.deltas] if scope == "global" else [{name: delta} for name, delta in vector.deltas.items()]
    kept: dict[str, SparseDelta] = {}
    for group in groups:
        entries = vector.numel if scope == "global" else sum(delta.numel for delta in group.values())
        count = max(1, share(density, entries))
        if count < sum(len(delta.values) for delta in group.values()):
            chosen = select_extreme({name: delta.values.abs() for name, delta in group.items()}, count, "highest")
            group = {name: delta.select(chosen[name]) for name, delta in group.items()}
        kept |= group
    return vector.with_deltas(kept)


def elected_mean(values: Tensor) -> Tensor:
    """The mean of the changes whose sign is that of their sum; zero where the changes balance exactly.

    (T, U) -> (U,). Zeros take no part: they neither vote nor count in the mean.
    """
    elected = values.double().sum(dim=0).sign().to(values.dtype)
    agreeing = (values.sign() == elected) & (values != 0)
    return (values * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp(min=1)


def ties(vectors: Sequence[TaskVector], *, density: float = 0.2, scope: Scope = "global") -> TaskVector:
    """TIES: trim each vector, elect the sign of every entry by total mass, average the values of that sign.

    The released TaLoS scripts elect from absolute values, which makes every sign positive; this is the paper's rule.

    Args:
        vectors: of one base.
        density: the fraction of each vector's entries that trimming keeps (the paper's k, 20 %).
        scope: of the trimming: over the whole vector, or tensor by tensor.

    Raises:
        TalosError: no vector, different bases, or a density outside (0, 1].
    """
    return entrywise([trim(vector, density, scope) for vector in vectors], elected_mean)


def magnitude_prune(vectors: Sequence[TaskVector], *, density: float = 0.2, scope: Scope = "global") -> TaskVector:
    """The sum of the vectors, each trimmed to its largest changes: TIES without the election.

    Args:
        vectors: of one base.
        density: the fraction of each vector's entries that trimming keeps.
        scope: of the trimming: over the whole vector, or tensor by tensor.

    Raises:
        TalosError: no vector, different bases, or a density outside (0, 1].
    """
    return entrywise([trim(vector, density, scope) for vector in vectors], total)
