"""torch's random generators: kept, brought back, and started over for every pass over the batches."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from talos_fast.batch import Batch, Batches


def sources(batches: Batches) -> list[Any]:
    """The batches, and what chooses and makes their samples: a loader's samplers and data set."""
    inner = getattr(batches, "batch_sampler", None)
    found = [batches, getattr(batches, "sampler", None), inner, getattr(inner, "sampler", None)]
    return [one for one in (*found, getattr(batches, "dataset", None)) if one is not None]


class RandomState:
    """torch's generators: the CPU's, the device's, and those that the batches have of their own.

    Persistent workers are started here, because the first ``iter(loader)`` draws a seed and later ones do not.
    """

    def __init__(self, batches: Batches, device: torch.device) -> None:
        given = [getattr(source, "generator", None) for source in sources(batches)]
        own = {id(one): one for one in given if isinstance(one, torch.Generator)}
        self._own = {f"batches{number}": one for number, one in enumerate(own.values())}
        self._device = device if device.type == "cuda" else None
        if getattr(batches, "persistent_workers", False):
            before = self.get()
            iter(batches)
            self.set(before)

    def seed_own(self, seed: int) -> None:
        """Lets those of the batches start from a seed."""
        for generator in self._own.values():
            generator.manual_seed(seed)

    def get(self) -> dict[str, Tensor]:
        """The states, as byte tensors."""
        states = {"cpu": torch.get_rng_state()}
        if self._device is not None:
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        return states | {name: generator.get_state() for name, generator in self._own.items()}

    def set(self, states: Mapping[str, Tensor]) -> None:
        """Restores what `get` gave, for the generators that are there on both sides."""
        torch.set_rng_state(states["cpu"])
        if self._device is not None and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self._device)
        for name, generator in self._own.items():
            if name in states:
                generator.set_state(states[name])


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's global generators, the CPU's and the device's, start from a seed inside, and are restored on exit."""
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed devices that are not restored
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def repeatable(batches: Batches, seed: int, device: torch.device) -> Iterator[Batches]:
    """The batches, which come in one order however often they are read; restores all generators on exit."""
    with seeded(seed, device):
        random = RandomState(batches, device)
        before = random.get()
        random.seed_own(seed)
        try:
            yield _Repeated(batches, random, random.get())
        finally:
            random.set(before)


class _Repeated:
    def __init__(self, batches: Batches, random: RandomState, start: Mapping[str, Tensor]) -> None:
        self._batches, self._random, self._start = batches, random, start

    def __iter__(self) -> Iterator[Batch]:
        self._random.set(self._start)
        return iter(self._batches)

    def __len__(self) -> int:
        sized: Any = self._batches
        return len(sized)
