"""Capture held against a plain backward a sample, on a few samples, before anything is scored.

What differs is scored by torch.func instead, whatever the reason: a rule that is wrong, a use that no torch function
shows (a kernel of its own), a layout that capture did not understand. Full tensors are not kept for it: a score S,
seen as a matrix, is held against its expectation by S r and rᵀ S for fixed random r > 0.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from talos_fast.batch import Batch, labels_of, take
from talos_fast.errors import TalosError
from talos_fast.forward import Forward, check_logits, logits_of
from talos_fast.sensitivity.calls import Findings
from talos_fast.sensitivity.capture import Capture
from talos_fast.sensitivity.per_sample import gradients_one_by_one
from talos_fast.sensitivity.uses import Accumulator, Use, add_squares

SAMPLES = 2  # the fewest among which interaction shows
ATTEMPTS = 8  # forwards, each of which may find more uses that are not one row a sample


class Sketch(NamedTuple):
    """What is kept of a score: its products with random vectors from both sides."""

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, score: Tensor) -> "Sketch":
        """Linear in the score."""
        matrix = score.flatten(1) if score.dim() > 1 else score.view(-1, 1)
        return cls(_random(matrix.shape[0], matrix) @ matrix, matrix @ _random(matrix.shape[1], matrix))

    def plus(self, other: "Sketch | None") -> "Sketch":
        """The sketch of the sum of two scores."""
        return self if other is None else Sketch(self.left + other.left, self.right + other.right)

    @property
    def largest(self) -> float:
        """The largest entry."""
        return max(float(side.max()) if side.numel() else 0.0 for side in self)

    def near(self, other: "Sketch", tolerance: float, floor: float) -> bool:
        """Whether both sides agree, to ``tolerance`` of their largest entry."""
        return all(
            bool(((mine - theirs).abs() <= tolerance * theirs.max() + floor).all())
            for mine, theirs in zip(self, other, strict=True)
            if mine.numel()
        )


def _random(size: int, like: Tensor) -> Tensor:
    vector = torch.rand(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64, device="cpu") + 0.5
    return vector.to(like.device, like.dtype)


def examine(
    model: nn.Module, parameters: Mapping[str, Tensor], forward: Forward, batch: Batch, where: str, findings: Findings,
    generator: torch.Generator,
) -> None:  # fmt: skip
    """Completes ``findings`` from a few samples of a batch.

    Raises:
        TalosError: the logits of a sample depend on the other ones, or the model insists on checkpointing.
    """
    samples = len(labels_of(batch, where))
    few = take(batch, 0, min(SAMPLES, samples), samples)
    for _ in range(ATTEMPTS):
        before = len(findings.shared)
        try:
            captured, logits, probe = _captured(model, parameters, forward, few, where, findings, generator)
        except CheckpointError as error:
            raise TalosError(
                f"{where}: gradient checkpointing cannot be combined with capture ({str(error).splitlines()[0]}); turn "
                "it off for calibration and use smaller batches, which do not change the result"
            ) from error
        if len(findings.shared) == before:
            break
    expected: dict[str, Sketch] = {}
    tolerance = _tolerance(logits, parameters)

    def receive(name: str, gradient: Tensor) -> None:
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        expected[name] = Sketch.of(wide.square()).plus(expected.get(name))

    for n, alone in enumerate(gradients_one_by_one(model, parameters, forward, batch, probe, receive, size=samples)):
        if float((alone - logits[n]).abs().max()) > tolerance * (1 + float(logits.abs().max())):
            raise TalosError(
                f"{where}: logits change with the other samples of the batch, so there is no gradient per sample; "
                "remove what mixes samples or draws random numbers in evaluation mode"
            )
    scale = max((sketch.largest for sketch in expected.values()), default=0.0)
    for name, p in parameters.items():
        zero = Sketch.of(torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)))
        # Scores of a tensor with a zero true gradient are rounding noise on either side, of a few ulps: key biases, or
        # queries and keys of a decoder that sees one token.
        ulp, wanted = torch.finfo(zero.left.dtype).eps ** 2 * scale, expected.get(name, zero)
        floor = 1024 * ulp if wanted.largest <= 1024 * ulp else ulp
        if name not in findings.uncovered and not captured.get(name, zero).near(wanted, tolerance, floor):
            findings.uncovered[name] = "capture disagrees with a plain backward"


def _tolerance(logits: Tensor, parameters: Mapping[str, Tensor]) -> float:
    """What two ways of computing the same may differ by, relative to the largest entry."""
    types = {logits.dtype, *(p.dtype for p in parameters.values())}
    if torch.is_autocast_enabled(logits.device.type):
        types.add(torch.get_autocast_dtype(logits.device.type))
    coarsest = max(torch.finfo(dtype).eps for dtype in types)
    return 1e-6 if coarsest < 1e-12 else max(1e-2, 16 * coarsest)


def _captured(
    model: nn.Module, parameters: Mapping[str, Tensor], forward: Forward, batch: Batch, where: str, findings: Findings,
    generator: torch.Generator,
) -> tuple[dict[str, Sketch], Tensor, Tensor]:  # fmt: skip
    """Sketches of the captured scores, the logits (N, K), and what they were probed with."""
    sketches: dict[str, Sketch] = {}

    def square(name: str, uses: list[Use]) -> None:
        p = parameters[name]
        sum_of_squares = Accumulator.zeros(p, torch.promote_types(p.dtype, torch.float32), None)
        add_squares(uses, sum_of_squares, "full")
        sketches[name] = Sketch.of(sum_of_squares.values)

    tracked = {name: p for name, p in parameters.items() if name not in findings.uncovered}
    with Capture(tracked, len(labels_of(batch, where)), findings, square, exploring=True) as capture:
        logits, labels = logits_of(forward, model, batch, where)
    check_logits(logits, labels, where)
    probe = torch.linspace(-1.0, 1.5, logits.numel(), dtype=logits.dtype, device=logits.device).view_as(logits)
    capture.run(logits, [probe], generator)
    return sketches, logits.detach(), probe
