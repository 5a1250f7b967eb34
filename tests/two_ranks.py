"""Two processes of torch.distributed, for tests of what they do together."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

needs_gloo = pytest.mark.skipif(sys.platform == "win32", reason="gloo over a file")


def on_two_ranks(work: Callable[[int, Path], None], folder: Path) -> None:
    """Calls ``work(rank, folder)`` in two processes of one gloo group; fails if it fails in one."""
    mp.spawn(_process, (work, folder), nprocs=2)


def _process(rank: int, work: Callable[[int, Path], None], folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    work(rank, folder)
    (folder / f"done{rank}").touch()
    while not all((folder / f"done{other}").exists() for other in range(2)):
        time.sleep(0.01)  # a connection that is closed now would end what the other still reads
    # DistributedDataParallel leaves threads of gloo's behind, and one that drops a tensor while Python ends aborts it.
    os._exit(0)
