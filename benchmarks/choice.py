"""What one run of the table measures, from the options of pytest."""

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
from contenders import VARIANTS

from talos_fast.methods import METHODS


@dataclass(frozen=True)
class Choice:
    """What is measured.

    Args:
        preset: "cpu", "gpu" or "smoke".
        device: the preset's.
        methods, variants: names.
        batch: inputs a batch; None for the preset's.
        rounds: measurements of each contender.
        bf16: whether under autocast.
    """

    preset: str
    device: torch.device
    methods: list[str]
    variants: list[str]
    batch: int | None
    rounds: int
    bf16: bool


def choice(config: pytest.Config) -> Choice:
    """The options, completed by the preset.

    Raises:
        pytest.UsageError: a method or variant that there is not.
    """
    option = config.option
    device = torch.device("cuda" if option.preset == "gpu" else "cpu")
    methods = list(METHODS) if option.methods is None else option.methods
    refuse_unknown("--methods", methods, METHODS)
    refuse_unknown("--variants", option.variants, VARIANTS)
    return Choice(
        option.preset, device, methods, option.variants, option.batch, option.rounds,
        option.amp == "bf16" or (option.amp == "auto" and device.type == "cuda"),
    )  # fmt: skip


def refuse_unknown(flag: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises UsageError if a name given is not among those known."""
    if unknown := [name for name in given if name not in known]:
        raise pytest.UsageError(f"{flag} {unknown[0]!r}: choose among {', '.join(known)}")
