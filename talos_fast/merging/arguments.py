"""Checks that the merging methods share."""

from talos_fast.errors import TalosError


def check_fraction(name: str, value: float) -> None:
    """Refuses what is no fraction in (0, 1]."""
    if not 0.0 < value <= 1.0:
        raise TalosError(f"{name}={value}: the fraction of entries to keep must be in (0, 1]")
