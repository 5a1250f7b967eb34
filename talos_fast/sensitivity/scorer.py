"""`Scorer`: adds the squared per-sample gradients of batches to ledgers, by capture or by torch.func."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import talos_fast.sensitivity.attention
import talos_fast.sensitivity.rules
import talos_fast.sensitivity.views  # noqa: F401  (these three fill the registry)
from talos_fast.arguments import require_integer
from talos_fast.batch import Batch, Batches, differentiable, labels_of, to_device
from talos_fast.errors import TalosError
from talos_fast.forward import Forward, check_logits, logits_of
from talos_fast.modules import device_of, usable_device
from talos_fast.ranks import Ranks
from talos_fast.sensitivity.calls import Findings
from talos_fast.sensitivity.capture import Capture
from talos_fast.sensitivity.estimators import Draws, Estimator, check_estimator, check_probed, injected, probe
from talos_fast.sensitivity.evaluation import scoring_mode
from talos_fast.sensitivity.examine import SAMPLES, examine
from talos_fast.sensitivity.per_sample import add_squares_by_func
from talos_fast.sensitivity.uses import Accumulator, Precision, Use, add_squares

logger = logging.getLogger("talos_fast")

Ledger = dict[str, Accumulator]
"""Parameter name -> where its squares are summed."""


@dataclass
class Scorer:
    """Scores batches of one model, and remembers what it has learned about the model.

    Args:
        model: bare, see `unwrapped`.
        parameters: name -> what is scored.
        forward: the user's hook.
        estimator: what is differentiated.
        repeats: R probes an input.
        precision: of the products.
    """

    model: nn.Module
    parameters: Mapping[str, Tensor]
    forward: Forward
    estimator: Estimator
    repeats: int
    precision: Precision
    findings: Findings = field(default_factory=Findings)

    def __post_init__(self) -> None:
        check_estimator(self.estimator)
        require_integer("samples_per_input", self.repeats, 1)
        if self.precision not in ("full", "bf16"):
            raise TalosError(f"precision={self.precision!r}: choose 'full' or 'bf16'")
        self._examined = 0
        self._announced: set[str] = set()
        self._random = torch.Generator().manual_seed(0)

    def ledger(
        self, dtype: torch.dtype | None, device: torch.device | str | None, kept: Mapping[str, Tensor] | None = None
    ) -> Ledger:
        """Empty sums for all parameters, or for the rows that have a True entry in ``kept``."""
        place = None if device is None else usable_device(device, "scores_device")
        ledger = {}
        for name, p in self.parameters.items():
            rows = None if kept is None else wanted_rows(kept[name])
            if rows is None or len(rows):
                wide = dtype or torch.promote_types(p.dtype, torch.float32)
                ledger[name] = Accumulator.zeros(p, wide, place, rows)
        return ledger

    def score(
        self, batches: Batches, ledger_of: Callable[[int], Ledger], seed: int, ranks: Ranks,
        labels: Sequence[Tensor] | None = None, bar: Callable[[Batches], Iterable[Batch]] = iter,
        stop: Callable[[], bool] = lambda: False,
    ) -> int:  # fmt: skip
        """Adds all batches to their ledgers; returns how many samples there were on all ranks.

        Args:
            batches: of this rank.
            ledger_of: number of a batch -> where its squares go; asked for when the model has been examined.
            seed: of the probes.
            ranks: the position of this rank's n-th sample in the data is n·world + rank, as `DistributedSampler` deals.
            labels: sampled labels to use instead of drawing.
            bar: wraps the batches, to show progress.
            stop: asked after each batch.

        Raises:
            TalosError: as `sensitivities`.
            KeyboardInterrupt: ``stop()`` was true.
        """
        device, count = device_of(self.model), 0
        with scoring_mode(self.model):
            for index, batch in enumerate(bar(batches)):
                where = f"batch {index}"
                batch = differentiable(to_device(batch, device))
                size = len(labels_of(batch, where))
                if self._examined < min(size, SAMPLES):  # again, if the first batch was of one sample
                    examine(self.model, self.parameters, self.forward, batch, where, self.findings, self._random)
                    self._examined = min(size, SAMPLES)
                draws = [
                    Draws(seed, [(count + n) * ranks.world + ranks.rank for n in range(size)], repeat)
                    for repeat in range(self.repeats)
                ]
                self._add(batch, ledger_of(index), draws, injected(self.estimator, labels, index, where), where)
                count += size
                if stop():
                    raise KeyboardInterrupt
        total = ranks.total(count)
        if not total:
            raise TalosError(
                "there is no batch to calibrate on; the iterable was empty (an iterator can be read only once)"
            )
        return total

    def _add(self, batch: Batch, ledger: Ledger, draws: Sequence[Draws], sampled: Tensor | None, where: str) -> None:
        """Adds one batch: captured parameters by one backward a probe, the others by torch.func."""
        captured = {name: self.parameters[name] for name in ledger if name not in self.findings.uncovered}
        done = dict.fromkeys(ledger, 0)

        def square(name: str, uses: list[Use]) -> None:
            add_squares(uses, ledger[name], self.precision)
            done[name] += 1

        with Capture(captured, len(labels_of(batch, where)), self.findings, square) as capture:
            logits, labels = logits_of(self.forward, self.model, batch, where)
        check_logits(logits, labels, where)
        check_probed(self.estimator, logits, sampled, where)
        # Squares of derivatives average over the repeats.
        probes = [probe(self.estimator, logits, labels, sampled, d) / self.repeats**0.5 for d in draws]
        capture.run(logits, probes, self._random)
        self._announce()
        for n, coefficients in enumerate(probes):
            rest = [name for name in ledger if name in self.findings.uncovered and done[name] <= n]
            if rest:
                parameters = {name: self.parameters[name] for name in rest}
                add_squares_by_func(self.model, parameters, ledger, self.forward, batch, coefficients)

    def _announce(self) -> None:
        """Says once for every parameter, in one line a reason, that it is not captured."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.findings.uncovered.items():
            if name not in self._announced:
                reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            self._announced.update(names)
            logger.warning(
                "no batched rule for %s (%s): per-sample gradients come from torch.func, more slowly",
                ", ".join(names), reason,
            )  # fmt: skip


def wanted_rows(kept: Tensor) -> Tensor | None:
    """Indices, on the CPU, of the rows of a bool tensor that hold a True entry; None if all do, or for vectors."""
    if kept.dim() < 2:
        return None if bool(kept.any()) else torch.zeros(0, dtype=torch.int64, device="cpu")
    alive = kept.flatten(1).any(1)
    return None if bool(alive.all()) else alive.nonzero()[:, 0].cpu()
