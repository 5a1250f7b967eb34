"""Runs Python with the emulated CUDA device: ``python tests/emulated_cuda/run.py -m pytest -p plugin -m gpu tests``."""

import os
import sys

from libraries import FOLDER, HERE, RUNTIME, build


def environment() -> dict[str, str]:
    """That of a process in which torch finds the device."""
    paths = [str(HERE), str(FOLDER), os.environ.get("PYTHONPATH", "")]
    inherited = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return inherited | {
        "LD_PRELOAD": str(RUNTIME), "PYTHONPATH": os.pathsep.join(filter(None, paths)), "TRITON_INTERPRET": "1"
    }  # fmt: skip


if __name__ == "__main__":
    build()
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment())
