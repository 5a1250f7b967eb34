"""Numbers that several functions take: their checks, and exact shares."""

import math
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

from talos_fast.errors import TalosError


def number(name: str, value: Any) -> float:
    """The value as Python's own; refuses what is no real number, as True and False are none.

    Tensors and arrays without dimensions are numbers.
    """
    if isinstance(value, bool) or not (isinstance(value, Real | Decimal) or getattr(value, "ndim", None) == 0):
        raise TalosError(f"{name}={value!r}: must be a number, not a {type(value).__name__}")
    return float(value)


def require_integer(name: str, value: Any, least: int) -> None:
    """Refuses what is no integer, or too small a one."""
    if isinstance(value, bool) or not (isinstance(value, Integral) and int(value) >= least):
        raise TalosError(f"{name}={value!r}: must be an integer, at least {least}")


def check_fraction(name: str, value: float) -> None:
    """Refuses what is no fraction in (0, 1]."""
    number(name, value)
    if not 0.0 < value <= 1.0:
        raise TalosError(f"{name}={value}: the fraction of entries to keep must be in (0, 1]")


def resolve_density(density: float | None, sparsity: float | None = None) -> float:
    """The fraction that trains, from either word for it; 0.1 without one.

    Raises:
        TalosError: both are given, one is no number, or the density is outside (0, 1].
    """
    if density is not None and sparsity is not None:
        raise TalosError(f"density={density} and sparsity={sparsity}: give one of them (sparsity = 1 - density)")
    value = 0.1 if density is None else number("density", density)
    if sparsity is not None:
        rest = number("sparsity", sparsity)
        # 0.1 of 0.9, not 0.09999999999999998
        value = float(1 - Fraction(repr(rest))) if math.isfinite(rest) else 1 - rest
    if not 0.0 < value <= 1.0:
        if sparsity is not None:
            raise TalosError(f"sparsity={sparsity}: the fraction of entries that stays must be in [0, 1)")
        raise TalosError(f"density={value}: the fraction of entries that trains must be in (0, 1]")
    return value


def share(fraction: float, total: int) -> int:
    """⌊fraction · total⌋ of the number as it is written: 0.29 of 100 is 29, not 28, as in binary fractions."""
    return math.floor(Fraction(repr(float(fraction))) * total)


def checked_seed(name: str, value: int) -> int:
    """The seed as Python's own integer; refuses what torch and NumPy do not both take."""
    if not (isinstance(value, Integral) and 0 <= value < 2**63):
        raise TalosError(f"{name}={value}: must be an integer, from 0 to 2**63 - 1")
    return int(value)


def check_weight_decay(value: float) -> None:
    """Refuses what moves weights away from zero, or nowhere."""
    number("weight_decay", value)
    if not 0 <= value < math.inf:
        raise TalosError(f"weight_decay={value}: must be finite, at least 0")
