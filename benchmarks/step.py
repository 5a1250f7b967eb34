"""The optimizer step: MaskedAdam against torch's AdamW on all parameters, and against a dense masked AdamW.

All step the same weights and gradients in one process. Each is interleaved with fused AdamW, so that a busy machine
slows the two alike, and then dropped, so that a model needs the memory of two optimizers and not of all. On a CPU all
are measured in several sweeps: where the machine's memory is now fast and now slow, one moment says little. On a GPU
the host gets 20 ms ahead of a step, and what it takes is a figure of its own; torch's for-loop needs more than that.
"""

import math
import statistics
from functools import partial
from typing import Any

import pytest
import torch
from measure import AHEAD, in_turn, seconds
from occupancy import occupancy
from records import header, refuse_nothing
from shapes import MASKS, MODELS, Masks
from steppers import RIVALS, Stepper, clipping, stepping, tiny_copies
from workloads import bytes_free

from talos_fast.optim.selection import select
from talos_fast.profiling.memory import Memory
from talos_fast.writing import write_json

BASELINE = "AdamW fused"
SWEEPS = 3
DENSE = (BASELINE, "AdamW foreach", "AdamW for-loop")
# What is timed, and what it is called after the baseline and after ours.
KINDS = {"step": (stepping, "", ""), "loop": (clipping, ", unscale + clip + step", ", clip + step")}


class Bench:
    """The steppers of one model on one device, made when they are measured."""

    def __init__(self, model: str, device: str, rounds: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.device, self.rounds = device, rounds
        self.sweeps = 1 if device == "cuda" else min(SWEEPS, rounds)
        self.shapes = MODELS[model]
        self.weights = {name: torch.randn(shape, generator=generator).mul_(0.02).to(device)
                        for name, shape in self.shapes.items()}  # fmt: skip
        self.gradients = {name: torch.randn(shape, generator=generator).mul_(1e-3).to(device)
                          for name, shape in self.shapes.items()}  # fmt: skip
        self.numel = sum(w.numel() for w in self.weights.values())
        self.masks: Masks | None = None
        self._baselines: dict[str, Stepper | None] = {}
        self._measured: dict[str, list[tuple[float, float | None]]] = {}  # of a row: of each round, and the baseline's
        self.rows: dict[str, dict[str, Any]] = {}

    def make(self, rival: str, kind: str, small: bool = False) -> Stepper:
        """A stepper over all parameters, or over as many small ones."""
        build, with_mask, _ = RIVALS[rival]
        masks = self.masks if with_mask else None
        arguments = tiny_copies(self.weights, masks) if small else (self.weights, self.gradients, masks)
        return KINDS[kind][0](build(*arguments))

    def compare(self, rival: str, kind: str, label: str) -> None:
        """Adds to the row ``label``: the rival beside the baseline of the same kind, or alone where memory is short."""
        baseline = self.settle(rival, kind)
        lacking = baseline is None if rival == BASELINE else self.needs(rival) > self.free()
        if lacking:
            self.rows.setdefault(label, {"missing": f"needs {self.needs(rival) / 2**30:.0f} GiB"})
            return
        stepper = baseline if rival == BASELINE else self.make(rival, kind)
        assert stepper is not None
        pair = {label: partial(seconds, stepper.run, self.device, AHEAD)}  # the host's share is a figure of its own
        if baseline is not None and baseline is not stepper:
            pair[BASELINE] = partial(seconds, baseline.run, self.device, AHEAD)
        times = in_turn(pair, -(-self.rounds // self.sweeps))
        rounds = self._measured.setdefault(label, [])
        rounds += zip(times[label], times.get(BASELINE, [None] * len(times[label])), strict=True)
        self.rows[label] = self.row(rival, rounds, kind) | {
            "state_bytes": stepper.state_bytes(), "host_us": self.host(rival, kind),
        }  # fmt: skip

    def needs(self, rival: str) -> int:
        """Bytes that the rival takes at most beside weights and gradients."""
        return 4 * self.numel * RIVALS[rival][2]

    def settle(self, rival: str, kind: str) -> Stepper | None:
        """The baseline of this kind, if it and the rival fit side by side; and no other."""
        self._baselines = {k: b for k, b in self._baselines.items() if k == kind}
        needed = 0 if rival == BASELINE else self.needs(rival)
        if kind not in self._baselines and needed + self.needs(BASELINE) < self.free():
            self._baselines[kind] = self.make(BASELINE, kind)
        elif kind in self._baselines and needed > self.free():
            self._baselines.clear()
        return self._baselines.get(kind)

    def free(self) -> float:
        """Bytes that can still be allocated, with a tenth to spare."""
        Memory(torch.device(self.device)).held()  # gives back what is free
        if self.device == "cuda":
            torch.cuda.empty_cache()
        free = bytes_free(torch.device(self.device))
        return math.inf if free is None else 0.9 * free

    def row(self, rival: str, rounds: list[tuple[float, float | None]], kind: str) -> dict[str, Any]:
        """Figures of one stepper: medians over the rounds, the ratio's too, of the two steps of a round."""
        times = [own for own, _ in rounds]
        row = {"median_ms": 1e3 * statistics.median(times), "min_ms": 1e3 * min(times), "max_ms": 1e3 * max(times),
               "rounds": len(times)}  # fmt: skip
        pairs = [(own, fused) for own, fused in rounds if fused is not None]
        if pairs:
            ratios = [own / fused for own, fused in pairs]
            return row | {
                "of_fused": statistics.median(ratios), "of_fused_min": min(ratios), "of_fused_max": max(ratios),
                "fused_ms": 1e3 * statistics.median(fused for _, fused in pairs),
                "interleaved": len(pairs) == len(rounds),
            }  # fmt: skip
        fused_ms = row["median_ms"] if rival == BASELINE else self.rows[BASELINE + KINDS[kind][1]].get("median_ms")
        ratio = None if fused_ms is None else row["median_ms"] / fused_ms
        return row | {"of_fused": ratio, "fused_ms": fused_ms, "interleaved": rival == BASELINE}

    def host(self, rival: str, kind: str) -> float:
        """Microseconds of the host: a step of as many tensors of 8 elements."""
        stepper = self.make(rival, kind, small=True)
        return 1e6 * statistics.median(in_turn({rival: partial(seconds, stepper.run)}, 20, warmup=10)[rival])


@pytest.mark.parametrize("model", MODELS)
def test_step(model: str, request: pytest.FixtureRequest) -> None:
    option = request.config.option
    bench = Bench(model, option.device or ("cuda" if torch.cuda.is_available() else "cpu"), option.rounds)
    occupancies: dict[str, dict[str, float]] = {}
    for _ in range(bench.sweeps):
        sweep(bench, occupancies)
        content = {
            "benchmark": "step", "model": model, "parameters": bench.numel, "tensors": len(bench.shapes),
            "rows": bench.rows, "masks": occupancies, "rounds": bench.rounds, **header(bench.device),
        }  # fmt: skip
        # After each sweep: a run that is killed has lost the one it was in.
        write_json(option.results / f"step_{model}_{bench.device}.json", content)
    show(content)
    refuse_nothing(bench.rows.values())


def sweep(bench: Bench, occupancies: dict[str, dict[str, float]]) -> None:
    """Measures everything once more."""
    for rival in DENSE:
        bench.compare(rival, "step", rival)
    bench.compare(BASELINE, "loop", BASELINE + KINDS["loop"][1])
    for name, make in MASKS.items():
        bench.masks = make(bench.shapes, torch.Generator().manual_seed(1))
        if name not in occupancies:
            chosen = {n: select(m, bench.weights[n]) for n, m in bench.masks.items()}
            occupancies[name] = occupancy(bench.masks, chosen)
        for kind, (_, _, called) in KINDS.items():
            bench.compare("MaskedAdam", kind, f"MaskedAdam, {name}{called}")
        if name == "TaLoS mask":
            bench.compare("dense masked AdamW", "step", f"dense masked AdamW, {name}")


def show(content: dict[str, Any]) -> None:
    """Prints the table."""
    print(f"\n{content['model']}: {content['parameters']:,} parameters in {content['tensors']} tensors, "
          f"{content['device_name']}, {content['threads']} threads")  # fmt: skip
    for name, row in content["rows"].items():
        if "missing" in row:
            print(f"  {name:48s} not measured: {row['missing']}")
            continue
        spread = f"{row['min_ms']:8.1f} … {row['max_ms']:8.1f}"
        ratio = "   —  " if row["of_fused"] is None else f"{row['of_fused']:6.3f}"
        print(f"  {name:48s} {row['median_ms']:8.1f} ms ({spread}) {ratio} of fused{'' if row['interleaved'] else '*'} "
              f"{row['state_bytes'] / 1e6:9.1f} MB  host {row['host_us']:6.0f} µs")  # fmt: skip
    print("  * not interleaved with fused")
    for name, found in content["masks"].items():
        print(f"  {name:16s} {found['density']:.3f} selected; sectors {found['sectors_32']:.2f}, lines "
              f"{found['lines_64']:.2f}; floors {found['floor_32']:.3f}, {found['floor_64']:.3f}, of reads "
              f"{found['read_floor_64']:.3f}")  # fmt: skip
