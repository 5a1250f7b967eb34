"""Timing of contenders in one process."""

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(
    contenders: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Seconds of each contender: median, least, most. One after the other in every round; the first does not count.

    On a GPU by its own clock, and of several calls at once: one may take less than the host needs to ask for it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(1 + rounds):
        for name, run in contenders.items():
            taken = _on_gpu(run) if device == "cuda" else _on_cpu(run)
            if turn:
                seconds[name].append(taken)
    return {
        name: {"median": statistics.median(times), "min": min(times), "max": max(times)}
        for name, times in seconds.items()
    }


def _on_cpu(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _on_gpu(run: Callable[[], object], calls: int = 20) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(40_000_000)  # some 20 ms, in which the host gets ahead: else the GPU waits for each launch
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


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
