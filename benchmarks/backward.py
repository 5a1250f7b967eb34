"""Forward and backward of ViT-B/32 with a TaLoS mask: plain, on selected rows, with compacted gradients, with both.

Times are interleaved in one process. Memory is measured in a process of its own for each contender, as peak RSS above
the model, and exactly, as the most that torch's allocator held at once.
"""

import itertools
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from measure import in_turn, seconds
from records import header
from shapes import talos_mask
from torch import Tensor, nn

from talos_fast import MaskedAdam
from talos_fast.writing import write_json

# On selected rows, with compacted gradients; "all parameters" trains densely whatever the mask says.
CONTENDERS = {
    "all parameters": None,
    "selected tensors": (False, False),
    "selected rows": (True, False),
    "compacted": (False, True),
    "selected rows, compacted": (True, True),
}
SIZES = {"ViT-B-32": (224, 32, 768, 12, 12), "smoke": (32, 8, 64, 2, 2)}
BATCH = 8


def build(model: str) -> tuple[nn.Module, Tensor]:
    """The vision tower with random weights, and a batch."""
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(0)
    side, patch, width, layers, heads = SIZES[model]
    tower = VisionTransformer(side, patch, width, layers, heads, mlp_ratio=4.0, output_dim=64)
    return tower.train(), torch.randn(BATCH, 3, side, side)


@contextmanager
def iteration(tower: nn.Module, images: Tensor, name: str) -> Iterator[Callable[[], None]]:
    """Within it the tower is set up as the contender has it; yields one forward and backward, which adds gradients."""
    parameters = dict(tower.named_parameters())
    on_rows, compacted = CONTENDERS[name] or (False, False)
    shapes = {n: tuple(p.shape) for n, p in parameters.items() if n.endswith("in_proj_weight")}
    masks = {} if CONTENDERS[name] is None else talos_mask(shapes, torch.Generator().manual_seed(0))
    for n, p in parameters.items():
        p.requires_grad_(n in masks or not masks)
    trained = {n: p for n, p in parameters.items() if p.requires_grad}
    optimizer = MaskedAdam(trained.items(), masks=masks)
    handle = optimizer.compact_gradients() if compacted else None
    context = optimizer.selected_rows() if on_rows else nullcontext()

    def run() -> None:
        with context:
            tower(images).square().mean().backward()

    yield run
    tower.zero_grad()
    if handle is not None:
        handle.remove()


def allocator_peak(run: Callable[[], None]) -> int:
    """Bytes: of what torch allocates on the CPU in ``run``, the most that lived at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))


def peak_rss() -> int:
    """Bytes, since this program began; getrusage would go on from the process that started it."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def measure_memory(model: str, name: str) -> None:
    """Prints peaks in MiB, as JSON, of one batch and of two whose gradients add up; the work of a child process."""
    tower, images = build(model)
    with iteration(tower, images, name) as run:
        before = peak_rss()
        run()
        one = peak_rss()
        run()
        two = peak_rss()
        tower.zero_grad()
        peaks = {"rss": one - before, "rss_accumulating": two - before, "allocated": allocator_peak(run)}
        tower.zero_grad()
        peaks["allocated_accumulating"] = allocator_peak(lambda: [run(), run()])
    print(json.dumps({f"peak_{kind}_mib": bytes / 2**20 for kind, bytes in peaks.items()}))


def measure_times(model: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender, a round after another."""
    tower, images = build(model)

    def timed(name: str) -> float:
        with iteration(tower, images, name) as run:
            return seconds(run)

    return in_turn({name: partial(timed, name) for name in CONTENDERS}, rounds)


def write(request: pytest.FixtureRequest, what: str, model: str, rows: dict[str, dict[str, float]]) -> None:
    """Prints the rows and writes them, with the machine."""
    print(f"\n{what}, {model}, batch {BATCH}, {torch.get_num_threads()} threads")
    for name, row in rows.items():
        print(f"  {name:26s}", "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    content = header("cpu") | {"benchmark": what, "model": model, "batch": BATCH, "weights": "random", "rows": rows}
    write_json(request.config.getoption("--results") / f"{what}_{model}_cpu.json", content)


@pytest.mark.parametrize("model", SIZES)
def test_time(model: str, request: pytest.FixtureRequest) -> None:
    turns = measure_times(model, request.config.getoption("--rounds"))
    base = turns["selected tensors"]
    rows = {}
    for name, times in turns.items():
        ratios = [a / b for a, b in zip(times, base, strict=True)]
        rows[name] = {
            "median_ms": 1e3 * statistics.median(times), "min_ms": 1e3 * min(times), "max_ms": 1e3 * max(times),
            "of_selected_tensors": statistics.median(ratios), "of_selected_tensors_min": min(ratios),
            "of_selected_tensors_max": max(ratios), "rounds": len(times),
        }  # fmt: skip
    write(request, "backward_time", model, rows)


@pytest.mark.parametrize("model", SIZES)
def test_memory(model: str, request: pytest.FixtureRequest) -> None:
    rows = {}
    for name in list(CONTENDERS)[-1:] if model == "smoke" else CONTENDERS:
        child = subprocess.run([sys.executable, __file__, model, name], capture_output=True, text=True, check=True)
        rows[name] = json.loads(child.stdout.splitlines()[-1])
    write(request, "backward_memory", model, rows)


if __name__ == "__main__":
    measure_memory(*sys.argv[1:])
