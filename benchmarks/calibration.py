"""Sensitivity of one batch against one plain forward-backward, against other libraries, and as the paper released it.

All ways run on the same model and batch, interleaved in one process, so that a busy machine slows them alike. Groups:
``ours`` (and the floor of any one-backward method), ``peers`` (on a ViT whose attention they support), ``released``
(batches of 4, 8 and 16), ``memory`` (each way in a process of its own). A run replaces the rows that it measures.
"""

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from scorers import accumulating, contenders, forward_alone, plain
from subjects import SUBJECTS, Subject

import talos_fast
from talos_fast import ops
from talos_fast.profiling.memory import Memory, above
from talos_fast.sensitivity import sensitivities
from talos_fast.storage import write_json

BASELINE = "plain forward-backward"
BATCHES = {"ours": (16,), "peers": (16,), "released": (4, 8, 16)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What a batched backward must hold, what one holds, the same beside 4 bytes a score, and what ours does.
KEEPING = {"forward alone, activations kept": forward_alone, BASELINE: plain,
           f"{BASELINE}, gradients kept": accumulating,
           "talos-fast, full": lambda subject: lambda: sensitivities(subject.model, [subject.batch] * 2)}  # fmt: skip
# glibc keeps freed blocks of up to 32 MiB for later unless told to give them back: what is resident is in use then.
ALLOCATORS = {"memory": {"MALLOC_MMAP_THRESHOLD_": str(2**20)}, "memory with glibc's defaults": {}}


def timed(step: Any) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@pytest.mark.parametrize("group", ["ours", "peers", "released"])
@pytest.mark.parametrize("model", SUBJECTS)
def test_time(model: str, group: str, request: pytest.FixtureRequest) -> None:
    chosen(request, model, group)
    sizes = [int(request.config.getoption("--batch"))] if request.config.getoption("--batch") else BATCHES[group]
    wanted = request.config.getoption("--only")
    for size in sizes:
        torch.manual_seed(0)
        subject = SUBJECTS[model](size).to(DEVICE)
        steps = {BASELINE: plain(Subject(subject.model.eval(), subject.batch, size))}
        refused = {}
        for name, make in contenders(group):
            if wanted and wanted not in name:
                continue
            # The libraries instrument the module, so each way has a copy of its own.
            own = SUBJECTS[model](size).to(DEVICE) if group == "peers" else subject
            own.model.eval()
            try:
                steps[name] = make(own)
                steps[name]()
            except (ImportError, NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError) as error:
                refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                steps.pop(name, None)
        steps[BASELINE]()
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(request.config.getoption("--rounds")):
            for name, step in steps.items():
                seconds[name].append(timed(step))
        save(request, model, f"{group}, batch {size}", report(model, group, size, seconds, refused))


def chosen(request: pytest.FixtureRequest, model: str, group: str) -> None:
    """Skips what was not asked for."""
    if model not in request.config.getoption("--models").split(","):
        pytest.skip(f"not among --models {request.config.getoption('--models')}")
    if group not in request.config.getoption("--groups").split(","):
        pytest.skip(f"not among --groups {request.config.getoption('--groups')}")


def report(
    model: str, group: str, size: int, seconds: dict[str, list[float]], refused: dict[str, str]
) -> dict[str, Any]:
    """Prints the rows, and gives them."""
    plain_seconds = statistics.median(seconds[BASELINE])
    rows: dict[str, Any] = {}
    print(f"\n{model}, {group}, batch {size}, {torch.get_num_threads()} threads, backend {ops.backend(DEVICE)}")
    for name, times in seconds.items():
        ratios = [mine / base for mine, base in zip(times, seconds[BASELINE], strict=True)]
        rows[name] = {"ms_per_sample": 1e3 * statistics.median(times) / size, "of_plain": statistics.median(ratios),
                      "of_plain_min": min(ratios), "of_plain_max": max(ratios), "rounds": len(times)}  # fmt: skip
        row = rows[name]
        print(f"  {name:28s} {row['ms_per_sample']:9.2f} ms a sample   {row['of_plain']:6.3f} of plain "
              f"({row['of_plain_min']:.3f} … {row['of_plain_max']:.3f})")  # fmt: skip
    for name, reason in refused.items():
        rows[name] = {"refused": reason}
        print(f"  {name:28s} refused: {reason}")
    assert plain_seconds > 0
    return rows


def save(request: pytest.FixtureRequest, model: str, key: str, rows: dict[str, Any]) -> None:
    """Adds rows, with the machine and the date, to the results of a model."""
    stamp = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "talos_fast": talos_fast.__version__, "backend": ops.backend(DEVICE),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    path = request.config.getoption("--results") / f"calibration_{model}_{DEVICE}.json"
    content = json.loads(path.read_text()) if path.exists() else {"benchmark": "calibration", "model": model}
    content[key] = {**stamp, "rows": {**content.get(key, {}).get("rows", {}), **rows}}
    write_json(path, content)


def peak(rank: int, model: str, size: int, way: str, out: str) -> None:
    """In a process of its own: the peak of memory above the loaded model, in bytes."""
    torch.manual_seed(0)
    subject, memory = SUBJECTS[model](size).to(DEVICE), Memory(torch.device(DEVICE))
    subject.model.eval()
    before = memory.held()
    after = memory.peak(lambda: KEEPING[way](subject)())
    Path(out).write_text(json.dumps(above(before, after)))


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("model", SUBJECTS)
def test_memory(
    model: str, allocator: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen(request, model, "memory")
    if DEVICE == "cuda" and allocator != "memory":
        pytest.skip("glibc does not hold the memory of a GPU")
    for name, value in ALLOCATORS[allocator].items():
        monkeypatch.setenv(name, value)
    size = int(request.config.getoption("--batch") or 16)
    torch.manual_seed(0)
    scored = sum(p.numel() for p in SUBJECTS[model](1).scored.values())
    rows = {}
    print(f"\n{model}, {allocator}, batch {size}; 4 bytes a score are {scored * 4 / 2**20:.0f} MiB")
    for way in KEEPING:
        out = tmp_path / "peak.json"
        mp.spawn(peak, (model, size, way, str(out)), nprocs=1)
        found = json.loads(out.read_text())
        rows[way] = {"peak_bytes": found}
        print(f"  {way:40s} {'not measured' if found is None else f'{found / 2**20:9.0f} MiB above the model'}")
    save(request, model, f"{allocator}, batch {size}", rows)
