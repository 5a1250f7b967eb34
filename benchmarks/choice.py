"""What one run of the table measures, from the options of pytest."""

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
from contenders import VARIANTS
from workloads import SPECS

from talos_fast.methods import METHODS


@dataclass(frozen=True)
class Choice:
    """What is measured.

    Args:
        preset: "cpu", "gpu" or "smoke".
        device: the preset's.
        models, methods, variants: names.
        batch: inputs a batch; None for the preset's.
        rounds: measurements of each contender.
        bf16: whether under autocast.
    """

    preset: str
    device: torch.device
    models: list[str]
    methods: list[str]
    variants: list[str]
    batch: int | None
    rounds: int
    bf16: bool


def choice(config: pytest.Config) -> Choice:
    """The options, checked."""
    option = config.option
    device = torch.device("cuda" if option.preset == "gpu" else "cpu")
    return Choice(
        option.preset, device, _names("--models", option.models, SPECS), _names("--methods", option.methods, METHODS),
        _names("--variants", option.variants, VARIANTS), option.batch, option.rounds,
        option.amp == "bf16" or (option.amp == "auto" and device.type == "cuda"),
    )  # fmt: skip


def _names(flag: str, given: str | None, known: Iterable[str]) -> list[str]:
    chosen = list(known) if given is None else given.split(",")
    if unknown := [name for name in chosen if name not in known]:
        raise pytest.UsageError(f"{flag} {unknown[0]}: choose among {', '.join(known)}")
    return chosen
