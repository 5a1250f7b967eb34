"""Sensitivity of one batch against one plain forward-backward, against other libraries, and as the paper released it.

All ways run on the same model and batch, interleaved in one process, so that a busy machine slows them alike. Groups:
``ours`` (and the floor of any one-backward method), ``peers`` (on a ViT whose attention they support), ``released``
(batches of 4, 8 and 16; on a GPU 16 and the official one), ``memory`` (each way in a process of its own). A run
replaces the rows that it measures.
"""

import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from measure import in_turn, seconds
from records import header, refuse_another_setting
from scorers import accumulating, contenders, forward_alone, plain
from subjects import SUBJECTS, Subject

from talos_fast import ops
from talos_fast.profiling.memory import Memory, above
from talos_fast.sensitivity import sensitivities
from talos_fast.writing import write_json

BASELINE = "plain forward-backward"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 16
RELEASED_ROUNDS = 2  # it takes minutes, and has a backward a sample to average over
PEERS = ("ViT-B-32-timm", "smoke")
# What a batched backward must hold, what one holds, the same beside 4 bytes a score, and what ours does.
KEEPING = {"forward alone, activations kept": forward_alone, BASELINE: plain,
           f"{BASELINE}, gradients kept": accumulating,
           "talos-fast, full": lambda subject: lambda: sensitivities(subject.model, [subject.batch] * 2)}  # fmt: skip
# glibc keeps freed blocks of up to 32 MiB for later unless told to give them back: what is resident is in use then.
ALLOCATORS = {"memory": {"MALLOC_MMAP_THRESHOLD_": str(2**20)}, "memory with glibc's defaults": {}}


@pytest.mark.parametrize("group", ["ours", "peers", "released"])
@pytest.mark.parametrize("model", SUBJECTS)
def test_time(model: str, group: str, request: pytest.FixtureRequest) -> None:
    if group == "peers" and model not in PEERS:
        pytest.skip(f"the peers' libraries are measured on {PEERS[0]}")
    option = request.config.option
    wanted = option.only
    if not any(wanted in name for name, _ in contenders(group)):
        pytest.skip(f"no way among {group} has {wanted} in its name")
    for size in [option.batch] if option.batch else sizes(group, model):
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
        rounds = min(option.rounds, RELEASED_ROUNDS) if group == "released" else option.rounds
        times = in_turn({name: partial(seconds, step, DEVICE) for name, step in steps.items()}, rounds, warmup=0)
        save(option.results, model, f"{group}, batch {size}", report(model, group, size, times, refused))
        assert not any(name.startswith("talos-fast") for name in refused), refused


def sizes(group: str, model: str) -> tuple[int, ...]:
    """Inputs a batch; the released procedure slows down with them, on the CPU too much for its own batches."""
    if group != "released":
        return (BATCH,)
    return (16, 32 if model.startswith("T5") else 64) if DEVICE == "cuda" else (4, 8, 16)


def report(
    model: str, group: str, size: int, rounds: dict[str, list[float]], refused: dict[str, str]
) -> dict[str, Any]:
    """Prints the rows, and gives them."""
    rows: dict[str, Any] = {}
    print(f"\n{model}, {group}, batch {size}, {torch.get_num_threads()} threads, backend {ops.backend(DEVICE)}")
    for name, times in rounds.items():
        ratios = [mine / base for mine, base in zip(times, rounds[BASELINE], strict=True)]
        rows[name] = {"ms_per_sample": 1e3 * statistics.median(times) / size, "of_plain": statistics.median(ratios),
                      "of_plain_min": min(ratios), "of_plain_max": max(ratios), "rounds": len(times)}  # fmt: skip
        row = rows[name]
        print(f"  {name:28s} {row['ms_per_sample']:9.2f} ms a sample   {row['of_plain']:6.3f} of plain "
              f"({row['of_plain_min']:.3f} … {row['of_plain_max']:.3f})")  # fmt: skip
    for name, reason in refused.items():
        rows[name] = {"refused": reason}
        print(f"  {name:28s} refused: {reason}")
    return rows


def save(folder: Path, model: str, key: str, rows: dict[str, Any]) -> None:
    """Adds rows, with the machine and the date, to the results of a model."""
    path, about = folder / f"calibration_{model}_{DEVICE}.json", header(DEVICE)
    content = json.loads(path.read_text()) if path.exists() else {"benchmark": "calibration", "model": model}
    earlier = content.get(key, {"rows": {}})
    if earlier["rows"].keys() - rows.keys():
        refuse_another_setting(path, earlier, about)
    content[key] = {**about, "rows": {**earlier["rows"], **rows}}
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
@pytest.mark.parametrize("group", ["memory"])
@pytest.mark.parametrize("model", SUBJECTS)
def test_memory(
    model: str, group: str, allocator: str, request: pytest.FixtureRequest, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if DEVICE == "cuda" and allocator != "memory":
        pytest.skip("glibc does not hold the memory of a GPU")
    ways = list(KEEPING)[-1:] if model == "smoke" else KEEPING
    for name, value in ALLOCATORS[allocator].items():
        monkeypatch.setenv(name, value)
    size = request.config.option.batch or BATCH
    torch.manual_seed(0)
    scored = sum(p.numel() for p in SUBJECTS[model](1).scored.values())
    rows = {}
    print(f"\n{model}, {allocator}, batch {size}; 4 bytes a score are {scored * 4 / 2**20:.0f} MiB")
    for way in ways:
        out = tmp_path / "peak.json"
        mp.spawn(peak, (model, size, way, str(out)), nprocs=1)
        found = json.loads(out.read_text())
        rows[way] = {"peak_bytes": found}
        print(f"  {way:40s} {'not measured' if found is None else f'{found / 2**20:9.0f} MiB above the model'}")
    save(request.config.option.results, model, f"{allocator}, batch {size}", rows)
