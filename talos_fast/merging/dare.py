"""DARE (Yu et al. 2024): drop changes at random, rescale the others so that the expectation stays."""

from collections.abc import Sequence

import torch

from talos_fast.arguments import check_fraction, checked_seed
from talos_fast.merging.ties import elected_mean
from talos_fast.stack import entrywise, total
from talos_fast.task_vector import TaskVector


def drop_and_rescale(vectors: Sequence[TaskVector], density: float, seed: int) -> list[TaskVector]:
    """Keeps each change with probability ``density`` and divides it by that; every vector has draws of its own.

    Only changes that exist are drawn for: dropping an entry that did not move changes nothing.
    """
    check_fraction("density", density)
    generator = torch.Generator().manual_seed(checked_seed("seed", seed))
    thinned = []
    for vector in vectors:
        kept = {}
        for name in sorted(vector.deltas):  # the order in which a file lists them is another
            delta = vector.deltas[name]
            keep = torch.rand(len(delta.values), generator=generator, dtype=torch.float32, device="cpu") < density
            kept[name] = delta.select(keep.to(delta.values.device)).scaled(1.0 / density)
        thinned.append(vector.with_deltas(kept))
    return thinned


def dare_linear(vectors: Sequence[TaskVector], *, density: float = 0.1, seed: int = 0) -> TaskVector:
    """DARE, then the sum.

    Args:
        vectors: of one base.
        density: 1 - p: the probability that a change is kept; kept ones are divided by it.
        seed: of the draws.

    Raises:
        TalosError: no vector, different bases, or a density outside (0, 1].
    """
    return entrywise(drop_and_rescale(vectors, density, seed), total)


def dare_ties(vectors: Sequence[TaskVector], *, density: float = 0.1, seed: int = 0) -> TaskVector:
    """DARE in place of trimming, then the election and the mean of `ties`.

    Args:
        vectors: of one base.
        density: 1 - p: the probability that a change is kept; kept ones are divided by it.
        seed: of the draws.

    Raises:
        TalosError: no vector, different bases, or a density outside (0, 1].
    """
    return entrywise(drop_and_rescale(vectors, density, seed), elected_mean)
