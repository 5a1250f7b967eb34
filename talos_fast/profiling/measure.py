"""How iterations are timed."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from talos_fast.profiling.iteration import PHASES, FinetuneIteration
from talos_fast.profiling.memory import Memory

COLUMNS = {
    "fwd-bwd": ("forward_backward", "release"),
    "clip": ("clip",),
    "step": ("step",),
    "clip+step": ("clip", "step"),
    "total": PHASES,
}
"""What is shown, and which phases it sums."""


@dataclass(frozen=True)
class Timings:
    """Seconds of each round, in the order in which the rounds ran.

    Args:
        seconds: phase -> one number a round.
        host: seconds until the host had asked a GPU for all of "forward_backward"; empty on a CPU, which is the host.
    """

    seconds: Mapping[str, list[float]]
    host: list[float] = field(default_factory=list)

    def of(self, *phases: str) -> list[float]:
        """The sum of these phases, of all without arguments, for each round."""
        return [sum(times) for times in zip(*(self.seconds[phase] for phase in phases or PHASES), strict=True)]

    def median(self, *phases: str) -> float:
        """The median over the rounds of `of`."""
        return statistics.median(self.of(*phases))

    def ratio(self, reference: "Timings", *phases: str) -> float:
        """The median over the rounds of this time / the reference's in the same round: slow moments cancel."""
        pairs = zip(self.of(*phases), reference.of(*phases), strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    @property
    def host_was_busy(self) -> bool:
        """Whether the host was busy with "forward_backward" for nearly all of its time on a GPU.

        Then the GPU waited for it; or it for the GPU, whose queue was full, or in a forward that reads values.
        """
        return bool(self.host) and statistics.median(self.host) > 0.9 * self.median("forward_backward")


def peak(iteration: FinetuneIteration, memory: Memory, compiles: bool) -> int | None:
    """Peak bytes of two iterations, the first of which makes the moments; None if `memory` cannot tell.

    Args:
        iteration: one that has not run.
        memory: of its device.
        compiles: whether its first run compiles. Autotuning then takes memory that no later iteration needs, so two
            more run first, unmeasured.
    """
    if compiles:
        _run_twice(iteration)
    return memory.peak(partial(_run_twice, iteration))


def _run_twice(iteration: FinetuneIteration) -> None:
    for _ in range(2):
        iteration.prepare()
        iteration.run(lambda: None)


def interleave(
    iterations: Mapping[str, FinetuneIteration], device: torch.device, *, warmup: int, rounds: int
) -> dict[str, Timings]:
    """Times the iterations in turn, round after round, so that a slow moment of the machine hits them alike.

    Args:
        iterations: name -> what to time.
        device: CUDA devices are timed by events on their stream, everything else by the host's clock.
        warmup: rounds that are not counted.
        rounds: rounds that are.
    """
    found = {name: Timings({phase: [] for phase in PHASES}) for name in iterations}
    for turn in range(warmup + rounds):
        for name, iteration in iterations.items():
            iteration.prepare()
            times, host = _on_cuda(iteration, device) if device.type == "cuda" else (_on_host(iteration), None)
            if turn < warmup:
                continue
            for phase, elapsed in zip(PHASES, times, strict=True):
                found[name].seconds[phase].append(elapsed)
            if host is not None:
                found[name].host.append(host)
    return found


def _on_host(iteration: FinetuneIteration) -> list[float]:
    stamps = [time.perf_counter()]
    iteration.run(lambda: stamps.append(time.perf_counter()))
    return [after - before for before, after in pairwise(stamps)]


def _on_cuda(iteration: FinetuneIteration, device: torch.device) -> tuple[list[float], float]:
    """The phases by the device's clock, and the first one by the host's."""
    torch.cuda.synchronize(device)
    events: list[Any] = []
    stamps = []

    def mark() -> None:
        stamps.append(time.perf_counter())
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record(torch.cuda.current_stream(device))

    mark()
    iteration.run(mark)
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)], stamps[1] - stamps[0]
