"""Where a result was measured: machine, versions, threads, date."""

import platform
import time
from pathlib import Path
from typing import Any

import torch

from talos_fast import ops
from talos_fast.version import __version__


def environment(device: torch.device) -> dict[str, Any]:
    """What a result must carry to be compared with another, as JSON."""
    found: dict[str, Any] = {
        "device": device.type,
        "device_name": _name(device),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "backend": ops.backend(device),
        "talos_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if device.type == "cuda":
        found |= {"cuda": torch.version.cuda, "memory_bytes": torch.cuda.get_device_properties(device).total_memory}
    return found


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"
