"""torch's random generators: kept, brought back, and started over for every pass over the batches."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from talos_fast.forward import Batch, Batches


class RandomState:
    """torch's generators: the CPU's, the device's, and the one that shuffles the batches, if they have their own."""

    def __init__(self, batches: Batches, device: torch.device) -> None:
        loader = getattr(batches, "generator", None)
        self._loader = loader if isinstance(loader, torch.Generator) else None
        self._device = device if device.type == "cuda" else None

    def get(self) -> dict[str, Tensor]:
        """The states, as byte tensors."""
        states = {"cpu": torch.get_rng_state()}
        if self._device is not None:
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        if self._loader is not None:
            states["loader"] = self._loader.get_state()
        return states

    def set(self, states: Mapping[str, Tensor]) -> None:
        """Brings back what `get` gave; of generators that both sides have."""
        torch.set_rng_state(states["cpu"])
        if self._device is not None and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self._device)
        if self._loader is not None and "loader" in states:
            self._loader.set_state(states["loader"])


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's global generators start from a seed inside, and are as they were afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def repeatable(batches: Batches, seed: int, device: torch.device) -> Iterator[Batches]:
    """The batches, which come in one order however often they are read; all generators are as they were afterwards."""
    with seeded(seed, device):
        random = RandomState(batches, device)
        start = random.get()
        try:
            yield _Repeated(batches, random, start)
        finally:
            random.set(start)


class _Repeated:
    def __init__(self, batches: Batches, random: RandomState, start: Mapping[str, Tensor]) -> None:
        self._batches, self._random, self._start = batches, random, start

    def __iter__(self) -> Iterator[Batch]:
        self._random.set(self._start)
        return iter(self._batches)

    def __len__(self) -> int:
        sized: Any = self._batches
        return len(sized)
