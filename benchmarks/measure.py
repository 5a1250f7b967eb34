"""Timing of contenders in one process."""

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
AHEAD = 40_000_000  # cycles of a GPU: some 20 ms


def in_turn(contenders: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """The seconds of each contender, which gives its own; one after the other in every round.

    So a slow moment of the machine hits them alike. The rounds of the warm-up do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name, timed in contenders.items():
            taken = timed()
            if turn >= warmup:
                seconds[name].append(taken)
    return seconds


def interleaved(
    contenders: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Seconds of each contender: median, least, most. On a GPU of several calls at once, see `seconds_queued`."""
    clock = seconds_queued if device == "cuda" else seconds
    return {
        name: {"median": statistics.median(times), "min": min(times), "max": max(times)}
        for name, times in in_turn({n: partial(clock, run) for n, run in contenders.items()}, rounds).items()
    }


def seconds(run: Callable[[], object], device: str = "cpu", ahead: int = 0) -> float:
    """Of one call; on a GPU by its own clock.

    ``ahead``: cycles that the GPU sleeps first, so that the host has asked for everything before it begins; otherwise
    it waits for the host, and that counts.
    """
    if device == "cuda":
        return _between_events(run, ahead)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def seconds_queued(run: Callable[[], object], calls: int = 20) -> float:
    """Of one of several calls on a GPU: one may take less than the host needs to ask for it."""

    def queue() -> None:
        for _ in range(calls):
            run()

    return _between_events(queue, AHEAD) / calls


def _between_events(run: Callable[[], object], ahead: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if ahead:
        torch.cuda._sleep(ahead)
    begin.record()
    run()
    end.record()
    end.synchronize()
    elapsed: float = begin.elapsed_time(end)
    return elapsed / 1e3


def keep_freed_memory() -> None:
    """Has glibc keep what is freed.

    Else large gradients go back to the system after a step and come anew in the next, or do not, as the heap happens to
    lie: a compiled forward and backward pass on T5-Large took 4.7 to 5.0 s beside two methods, 3.5 beside a third.
    """
    mmap_threshold, trim_threshold = -3, -1
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, 2**25)  # the most that it takes
        mallopt(trim_threshold, -1)
