"""The paper's cost table: time of each phase of an iteration and peak memory, of every method in every variant.

Each contender is timed in turn with full fine-tuning ("nonlinear") in the variants chosen, in one process, so that a
row holds its own baselines and can be read as ratios whatever the machine was doing. Peak memory on the CPU is read in
a process of its own.
"""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from choice import Choice, choice
from contenders import VARIANTS, contender, peak_above_model, peak_in_own_process, set_up
from measure import keep_freed_memory
from records import merge_rows, refuse_nothing, stamp
from rivals import PaperIteration
from show import text
from workloads import SPECS, Workload, build, bytes_free, bytes_needed

from talos_fast.environment import environment
from talos_fast.profiling.iteration import FinetuneIteration
from talos_fast.profiling.measure import interleave
from talos_fast.profiling.memory import Memory
from talos_fast.profiling.work import entries_that_train, step_bytes
from talos_fast.writing import write_json

BASELINE = "nonlinear"


@pytest.mark.parametrize("model", SPECS)
def test_table(model: str, request: pytest.FixtureRequest) -> None:
    chosen = choice(request.config)
    table = Table(model, chosen)
    path = request.config.getoption("--results") / f"table_{model}_{chosen.device.type}.json"
    merge_rows(path, table.content())  # refuses another batch now, not after the first row
    for _ in table.measured():  # a run that is killed has lost the row it was at
        content = merge_rows(path, table.content())
        write_json(path, content)
    print("\n" + text(content))
    assert not table.broken, table.broken
    refuse_nothing(table.content()["rows"])


class Table:
    """The rows of one model, measured one after another.

    Args:
        model: a key of `SPECS`.
        chosen: what to measure.

    Attributes:
        broken: rows that failed for no good reason; a missing package and a lack of memory are good ones.
    """

    def __init__(self, model: str, chosen: Choice) -> None:
        self._model, self._chosen = model, chosen
        self._size = chosen.batch or getattr(SPECS[model], f"{chosen.device.type}_batch")
        self._about: dict[str, Any] = {"model": model, "batch": self._size, "bf16": chosen.bf16}
        self._rows: list[dict[str, Any]] = []
        self._baselines: dict[str, FinetuneIteration] = {}
        self._beside: dict[str, dict[str, list[float]]] = {}  # variant -> seconds of its baseline, measured last
        self._peaks: dict[tuple[str, str], int | None] = {}
        self._free = bytes_free(chosen.device)
        self.broken: list[str] = []

    def content(self) -> dict[str, Any]:
        """Everything measured so far, as JSON."""
        about = environment(self._chosen.device) | self._about
        return {"benchmark": "table", **about, "variants": VARIANTS, "rows": self._rows}

    def measured(self) -> Iterator[dict[str, Any]]:
        """The rows: the baselines first, every other contender beside them, and at last what memory holds alone."""
        order = [(BASELINE, variant) for variant in self._chosen.variants]
        others = [(m, v) for m in self._chosen.methods for v in self._chosen.variants if m != BASELINE]
        workload, missing = None, ""
        try:
            # What the aims are about comes first: on a machine that is lent by the minute the rest may not be reached.
            others.sort(key=lambda one: (self._needs_all(*one), one[0] != "talos"))
            if self._chosen.device.type == "cpu":
                self._read_peaks(order + others)  # before this process holds a model too
                keep_freed_memory()
            workload = self._built()
        except ImportError as error:
            missing = f"{error.name} is not installed"
        for method, variant in order + others:
            row = {"method": method, "variant": variant, **stamp()}
            lacking = missing or self._lacking(method, variant, baselines=0)
            row |= {"missing": lacking} if workload is None or lacking else self._row(workload, method, variant)
            self._rows.append(row)
            yield row

    def _needs_all(self, method: str, variant: str) -> bool:
        """Whether memory does not hold the baselines beside it."""
        return bool(self._lacking(method, variant, len(self._chosen.variants)))

    def _lacking(self, method: str, variant: str, baselines: int) -> str:
        """Why there is not memory enough, if there is not."""
        needed = bytes_needed(self._model, method, variant, baselines)
        if self._free is None or needed <= self._free:
            return ""
        return f"needs about {needed / 2**30:.0f} GiB, {self._free / 2**30:.0f} GiB are free"

    def _read_peaks(self, order: list[tuple[str, str]]) -> None:
        for method, variant in order:
            if self._lacking(method, variant, baselines=0):
                continue
            try:
                peak = peak_in_own_process(self._model, self._size, method, variant, self._chosen.bf16)
                self._peaks[method, variant] = peak
            except ImportError:
                raise
            except Exception as error:  # the other peaks must not be lost with this one
                self._break(method, variant, error)

    def _built(self) -> Workload:
        workload = build(self._model, self._size, self._chosen.device)
        sizes = {"model_bytes": sum(t.nbytes for t in (*workload.model.parameters(), *workload.model.buffers()))}
        self._about |= workload.about | sizes
        set_up(workload)
        return workload

    def _row(self, workload: Workload, method: str, variant: str) -> dict[str, Any]:
        try:
            if self._needs_all(method, variant):
                self._baselines.clear()
                gc.collect()
            return self._measured(workload, method, variant)
        except torch.OutOfMemoryError:
            return {"missing": "out of memory"}
        except Exception as error:  # the other rows must not be lost with this one
            return {"missing": self._break(method, variant, error)}
        finally:
            workload.model.zero_grad(set_to_none=True)
            Memory(self._chosen.device).held()  # gives back what is free
            if self._chosen.device.type == "cuda":
                torch.cuda.empty_cache()

    def _break(self, method: str, variant: str, error: Exception) -> str:
        message = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        self.broken.append(f"{method}, {variant}: {message}")
        return message

    def _measured(self, workload: Workload, method: str, variant: str) -> dict[str, Any]:
        chosen = self._chosen
        torch._dynamo.utils.counters.clear()
        if chosen.device.type == "cuda":
            iteration, peak = peak_above_model(workload, method, variant, chosen.bf16)
        else:
            peak, iteration = self._peaks.get((method, variant)), contender(workload, method, variant, chosen.bf16)
        key = f"{method} {variant}"
        group = {f"{BASELINE} {name}": baseline for name, baseline in self._baselines.items()} | {key: iteration}
        # Peaks were read in two iterations already; on a GPU that is warm-up enough, on the CPU it was another process.
        timings = interleave(group, chosen.device, warmup=1, rounds=chosen.rounds)
        if method == BASELINE:
            self._baselines[variant] = iteration
        if isinstance(iteration, PaperIteration):
            iteration.check()
        self._beside |= {name: timings[f"{BASELINE} {name}"].seconds for name in self._baselines}
        row = {"seconds": timings[key].seconds, "baselines": dict(self._beside), "peak_bytes": peak}
        row["host_was_busy"] = timings[key].host_was_busy
        row["alone"] = not self._baselines  # its baselines are those of the rows before it
        if variant == "compiled":
            row["graph_breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
        return row | self._counted(iteration, variant)

    def _counted(self, iteration: FinetuneIteration, variant: str) -> dict[str, Any]:
        # What the paper ran steps everything that has a selected entry.
        masks = None if variant == "paper" else iteration.setup.mask
        trained = iteration.setup.trained
        counted = {"trained": entries_that_train(trained, masks), "step_bytes": step_bytes(trained, masks)}
        if variant == "compiled":  # nothing can be counted inside; it computes what "eager" does
            return counted
        return counted | {"work": vars(iteration.work(masks))}
