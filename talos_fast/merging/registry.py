"""The merging methods by name, and `combine`, which runs one."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, get_args

from talos_fast.errors import TalosError
from talos_fast.merging.breadcrumbs import breadcrumbs
from talos_fast.merging.consensus import consensus
from talos_fast.merging.dare import dare_linear, dare_ties
from talos_fast.merging.ties import magnitude_prune, ties
from talos_fast.sparse_vector import require_several
from talos_fast.task_vector import TaskVector


def task_arithmetic(vectors: Sequence[TaskVector]) -> TaskVector:
    """Σ_t τ_t (Ilharco et al. 2023)."""
    return sum(vectors[1:], start=vectors[0])


METHODS: dict[str, Callable[..., TaskVector]] = {
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare_linear,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
    "breadcrumbs": breadcrumbs,
    "consensus": consensus,
}
"""Each takes the vectors, and options by keyword; "dare" is the paper's name of what peft calls "dare_linear"."""


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """Refuses an unknown method, and options that it does not have or that are of another type.

    Raises:
        TalosError: names the method or the option.
    """
    if method not in METHODS:
        raise TalosError(f"method={method!r}: choose one of {', '.join(METHODS)}")
    parameters = inspect.signature(METHODS[method]).parameters
    known = {name: parameter.annotation for name, parameter in parameters.items() if name != "vectors"}
    for name, value in sorted(options.items()):
        if name not in known:
            raise TalosError(f"method {method!r} has no option {name!r}; it has {', '.join(known) or 'no options'}")
        if words := get_args(known[name]):
            fits, wanted = value in words, f"one of {', '.join(words)}"
        else:
            number, wanted = (Integral, "an integer") if known[name] is int else (Real, "a number")
            fits = isinstance(value, number) and not isinstance(value, bool)
        if not fits:
            raise TalosError(f"{name}={value!r}: an option of method {method!r}; give {wanted}")


def combine(
    vectors: Sequence[TaskVector],
    weights: Sequence[float] | None = None,
    method: str = "task_arithmetic",
    **options: Any,
) -> TaskVector:
    """The vectors w_t τ_t merged into one.

    Args:
        vectors: of one base.
        weights: one a vector; all 1 by default. They scale the vectors before anything else is done.
        method: one of `METHODS`.
        **options: of the method, such as ``density``.

    Raises:
        TalosError: no vector, another number of weights or one that is not finite, vectors of different bases, an
            unknown method, or an option that the method does not have or refuses.
    """
    check_options(method, options)
    vectors = require_several(vectors)
    if not vectors:
        raise TalosError("there is no task vector to merge; pass at least one")
    if weights is not None and len(weights) != len(vectors):
        raise TalosError(f"{len(weights)} weights for {len(vectors)} task vectors; give one a vector")
    if weights is not None and not all(map(math.isfinite, weights)):
        raise TalosError(f"weights {list(weights)}: every one must be a finite number")
    scaled = vectors if weights is None else [float(w) * vector for w, vector in zip(weights, vectors, strict=True)]
    return METHODS[method](scaled, **options)
