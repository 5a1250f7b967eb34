"""`profile`: what an iteration costs on the user's own model, mask and batch, beside full fine-tuning."""

import gzip
from numbers import Integral
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from talos_fast.batch import Batch, Batches, labels_of, to_device
from talos_fast.environment import environment
from talos_fast.errors import TalosError
from talos_fast.forward import Forward, default_forward
from talos_fast.mask import Mask
from talos_fast.methods import Options, Request, Setup, get_method
from talos_fast.methods.base import Deltas, compiled
from talos_fast.modules import device_of, require_plain
from talos_fast.profiling.iteration import LR, FinetuneIteration, without_export
from talos_fast.profiling.measure import interleave, peak
from talos_fast.profiling.memory import Memory, above
from talos_fast.profiling.result import BASELINE, Profile, Row
from talos_fast.profiling.work import Work, entries_that_train, step_bytes
from talos_fast.restoring import restoring_all_but_parameters, restoring_parameters
from talos_fast.step import Amp, Loss, autocasts, require_amp_and_clip
from talos_fast.task_vector import TaskVector
from talos_fast.train import train_mode
from talos_fast.writing import atomic, require_file


def profile(
    model: nn.Module,
    batches: Batches,
    *,
    method: str = "talos",
    mask: Mask | None = None,
    density: float | None = None,
    finetuned: TaskVector | None = None,
    rank: int | None = None,
    lora_alpha: float | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    clip: float | None = 1.0,
    amp: Amp = "auto",
    compile: bool = False,
    rounds: int = 5,
    warmup: int = 2,
    trace: str | Path | None = None,
) -> Profile:
    """Times iterations of ``method`` and of full fine-tuning on one batch, and counts what they must compute and move.

    The iterations are `finetune`'s, interleaved; the model ends bit-identical. It needs the memory of full fine-tuning
    and of a copy of the model.

    Args:
        model: as for `finetune`.
        batches: its first batch is used again and again; reading it is not timed.
        method, mask, density, finetuned, rank, lora_alpha, forward, loss, clip, amp, compile: as for `finetune`; "lota"
            needs ``finetuned``, since its first run is a full fine-tuning.
        rounds: measurements of each.
        warmup: rounds before them.
        trace: where to write one more iteration of ``method``, a Chrome trace of `torch.profiler`: .json or .json.gz.

    Raises:
        TalosError: what `finetune` would refuse, no round to measure, or a trace of another ending or in no folder.

    Example:
        >>> print(talos.profile(model, batches, mask=mask))  # doctest: +SKIP
    """
    if not all(isinstance(value, Integral) for value in (rounds, warmup)) or rounds < 1 or warmup < 0:
        raise TalosError(f"rounds={rounds}, warmup={warmup}: give integers, one round or more and no negative warm-up")
    if trace is not None:
        _require_trace(Path(trace))
    require_plain(model)
    require_amp_and_clip(amp, clip)
    options = Options(mask, density, finetuned, rank, lora_alpha)
    get_method(method).check(options)
    device = device_of(model)
    random = torch.random.fork_rng(devices={p.device for p in model.parameters() if p.is_cuda})
    with restoring_all_but_parameters(model), random, restoring_parameters(dict(model.named_parameters())):
        batch = to_device(_first(batches), device)
        train_mode(model)
        bench = _Bench(model, batch, forward or default_forward, loss or F.cross_entropy, clip, amp, compile)
        for name in dict.fromkeys((BASELINE, method)):
            bench.add(name, options if name == method else Options())
        rows = bench.rows(rounds, warmup)
        if trace is not None:
            _write_trace(bench.running[method], Path(trace))
    about = environment(device) | {
        "model": type(model).__name__, "batch": len(labels_of(batch, "the batch")), "bf16": bench.bf16,
        "dtype": str(bench.dtype).removeprefix("torch."), "compiled": compile,
        "rounds": int(rounds), "clip": None if clip is None else float(clip),
        "model_bytes": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
    }  # fmt: skip
    return Profile(rows, about)


class _Bench:
    """Methods that share one model, ready to be timed in turn."""

    def __init__(
        self, model: nn.Module, batch: Batch, forward: Forward, loss: Loss, clip: float | None, amp: Amp, compile: bool
    ) -> None:
        self._model, self._batch, self._forward, self._loss = model, batch, forward, loss
        self._clip, self._amp, self._compile = clip, amp, compile
        self._parameters = dict(model.named_parameters())
        self._flags = {p: p.requires_grad for p in self._parameters.values()}
        first = next(iter(self._parameters.values()))
        self.device, self.dtype, self.bf16 = first.device, first.dtype, autocasts(amp, first)
        self.running: dict[str, FinetuneIteration] = {}
        self._works: dict[str, Work] = {}
        self._peaks: dict[str, int | None] = {}

    def add(self, name: str, options: Options) -> None:
        """Counts what a method does and reads its peak memory."""
        counted = self._start(name, options, compile=False)  # nothing can be counted inside of what is compiled
        self._works[name] = counted.work(counted.setup.mask)
        del counted
        memory = Memory(self.device)
        before = memory.held()
        self.running[name] = self._start(name, options, self._compile)
        self._peaks[name] = above(before, peak(self.running[name], memory, self._compile))

    def rows(self, rounds: int, warmup: int) -> dict[str, Row]:
        """Times what was added."""
        timings = interleave(self.running, self.device, warmup=warmup, rounds=rounds)
        rows = {}
        for name, iteration in self.running.items():
            trained, mask = iteration.setup.trained, iteration.setup.mask
            rows[name] = Row(
                timings[name], self._peaks[name], self._works[name], step_bytes(trained, mask),
                entries_that_train(trained, mask),
            )  # fmt: skip
        return rows

    def _start(self, name: str, options: Options, compile: bool) -> FinetuneIteration:
        for p, flag in self._flags.items():
            p.requires_grad_(flag)
        request = Request(self._model, self._forward, LR, 0.1, options, _no_first_run)
        setup = without_export(get_method(name).prepare(request))
        if compile:
            setup = compiled(setup)
        return FinetuneIteration(setup, self._model, self._batch, self._loss, self._clip, self._amp)


def _no_first_run(setup: Setup) -> Deltas:
    raise TalosError("method 'lota' needs finetuned= to be profiled: its first run is a full fine-tuning")


def _require_trace(path: Path) -> None:
    """Refuses a file that `_write_trace` could not write, before the measurements that it comes after."""
    if not path.resolve().parent.is_dir():
        raise TalosError(f"trace={path}: its folder does not exist; make it first")
    if not path.name.endswith((".json", ".json.gz")):
        raise TalosError(f"trace={path}: a Chrome trace is .json or .json.gz; give one of these endings")
    require_file(path, "trace=")


def _first(batches: Batches) -> Batch:
    for batch in batches:
        return batch
    raise TalosError("batches: there is no batch; give at least one")


def _write_trace(iteration: FinetuneIteration, path: Path) -> None:
    iteration.prepare()
    with torch.profiler.profile(record_shapes=True, profile_memory=True) as profiler:
        iteration.run(lambda: None)
    with atomic(path) as temporary:
        try:
            profiler.export_chrome_trace(str(temporary))
            with gzip.open(temporary) if path.suffix == ".gz" else open(temporary, "rb") as written:
                if not written.read(1):  # torch says nothing of what it could not write
                    raise OSError("nothing was written")
        finally:
            Path(f"{temporary}.tmp").unlink(missing_ok=True)  # where torch writes first
