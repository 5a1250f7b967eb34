"""Backwards of which only row values are kept, from which the batch axis of every use is read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from talos_fast.sensitivity.axis import HALF, STEP, WIDE, Axis, codes, consistent, row_values
from talos_fast.sensitivity.calls import Call, Findings


class Observer:
    """Looks where the samples are, before the backward that is scored and during it.

    Args:
        samples: N, the number of samples in the batch.
        findings: what is known about the model; its axes are completed here.
    """

    def __init__(self, samples: int, findings: Findings) -> None:
        self.samples, self.findings = samples, findings
        self.looking = False
        self._codes: Tensor | None = None
        self._limits = WIDE

    def expect(self, output: Tensor) -> None:
        """To be called with every hooked output: gradients in fp16 get wider limits."""
        if output.dtype is torch.float16:
            self._limits = HALF

    def look(self, calls: Sequence[Call], logits: Tensor, coefficients: Tensor, generator: torch.Generator) -> None:
        """Runs the backward with codes, which the calls pass to `receive`, unless all axes are known.

        The backward that is scored must come next: it is the plain one of the comparison. In fp16 a plain one runs here
        too, since both have to be scaled up (see axis.py).
        """
        # What one probe leaves open, the next has to look at again: its gradient may be in other rows.
        if self.samples == 1 or (not self.findings.changing and all(call.key in self.findings.axes for call in calls)):
            return
        self.looking = True
        for call in calls:
            call.seen.clear()
        if self._limits is HALF:
            while not self._fits(calls, logits, coefficients * self.findings.scale) and self.findings.scale > 1:
                self.findings.scale /= STEP
            coefficients = coefficients * self.findings.scale
        self._codes = codes(self.samples, generator)
        code = self._codes.to(logits.device, logits.dtype)
        (logits * (coefficients * code[:, None])).sum().backward(retain_graph=True)
        self.looking = False

    def _fits(self, calls: Sequence[Call], logits: Tensor, coefficients: Tensor) -> bool:
        """Whether no gradient overflows, of a backward whose row values are kept."""
        for call in calls:
            call.seen.clear()
        (logits * coefficients).sum().backward(retain_graph=True)
        return all(bool(norms.isfinite().all()) for call in calls for _, norms in call.seen)

    def receive(self, call: Call, gradient: Tensor) -> None:
        """Keeps what is needed of a gradient (*rows, *features) while `looking`."""
        call.seen.append(row_values(gradient, call.features))

    def axis(self, call: Call, gradient: Tensor) -> Axis | None:
        """Where the samples are among the rows of the gradient that is scored; None if nowhere."""
        if self.samples == 1:
            return Axis(0, True)
        if not call.seen or self._codes is None:
            return self.findings.axes.get(call.key)
        *plain, (coded, _) = call.seen
        values, norms = plain[0] if plain else row_values(gradient, call.features)
        floor = HALF.floor if gradient.dtype is torch.float16 else WIDE.floor
        axes, said = consistent(coded, values, norms, self._codes, self._limits._replace(floor=floor))
        if said and len(axes) == 1:
            self.findings.axes[call.key] = axes[0]
        if len(axes) > 1 and bool((norms > 0).logical_and_(norms * self._codes.abs().min().item() <= floor).any()):
            return None  # they may differ in rows that are too small to tell
        # Several axes differ in rows without gradient only, so for this batch each is right.
        return axes[0] if axes else None

    def finish(self, calls: Sequence[Call]) -> None:
        """To be called when the backward that is scored has ended."""
        if self._codes is not None:
            for call in calls:
                if not call.reached:
                    self.findings.axes.setdefault(call.key, None)
        self._codes = None
