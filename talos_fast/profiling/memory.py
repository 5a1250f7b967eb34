"""How much memory is held, and the highest that a run needed."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch


class Memory:
    """On CUDA what torch has allocated on the device; on the CPU the resident set of this process.

    The latter also counts what libraries keep for themselves, so it is best read in a process of its own. Both methods
    give None where the system does not say (no Linux, or a container that forbids it).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def held(self) -> int | None:
        """Bytes held now, after what is free has been given back."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return torch.cuda.memory_allocated(self._device)
        try:
            ctypes.CDLL(None).malloc_trim(0)
            return _resident("VmRSS")
        except (OSError, AttributeError):
            return None

    def peak(self, run: Callable[[], object]) -> int | None:
        """The most bytes that were held at any time during ``run``."""
        if self.held() is None or not self._reset():
            run()
            return None
        run()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device)
        return _resident("VmHWM")

    def _reset(self) -> bool:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return True
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark becomes what is resident now
        except OSError:
            return False
        return True


def above(before: int | None, peak: int | None) -> int | None:
    """The difference of two readings."""
    return None if before is None or peak is None else max(0, peak - before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
