"""`Watch`: the device notes whether a step was bad, and the host reads the note later, without waiting for it."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from talos_fast.errors import TalosError
from talos_fast.interrupt import uninterrupted
from talos_fast.optim import launch

Check = Callable[[list[float]], None]
"""Given the facts of a note, raises if something was wrong."""


@dataclass(frozen=True)
class _Note:
    facts: Tensor
    arrived: torch.cuda.Event | None
    check: Check
    then: Callable[[], None] | None


class Watch:
    """Keeps the host from waiting for a GPU at every step.

    The first bad note sets `found_inf` on the device, for good. An optimizer that is given it skips the bad step and
    every later one, so that whenever the host comes to know, the parameters are those from before the bad step.

    Args:
        device: where the notes are made.
        lag: how many notes may be unread when `settle` returns; 0: each is read at once.

    Attributes:
        found_inf: 0. or 1., of shape () on the device.
    """

    def __init__(self, device: torch.device, lag: int) -> None:
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)
        self._lag = lag
        self._notes: deque[_Note] = deque()

    def note(self, facts: Tensor, bad: Tensor, check: Check, then: Callable[[], None] | None = None) -> None:
        """Makes a note, and reads those that are due.

        While a CUDA graph is captured only the flag is written: a replay leaves the host no facts to check, but
        skips bad steps and those after them, and `found_inf` says so whenever the host cares to wait.

        Args:
            facts: (n,) numbers that ``check`` needs, on the device.
            bad: bool of shape (), on the device: whether ``check`` will raise.
            check: called on the host with the facts, later.
            then: called after it, if nothing was wrong with this and all earlier notes.

        Raises:
            TalosError: from ``check``, of this note or an earlier one.
        """
        torch.maximum(self.found_inf, bad.to(self.found_inf.dtype), out=self.found_inf)
        if launch.is_capturing():
            return
        arrived = None
        if facts.is_cuda:
            pinned = torch.empty(facts.shape, dtype=facts.dtype, device="cpu", pin_memory=True)
            facts, arrived = pinned.copy_(facts, non_blocking=True), torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(self.found_inf.device))
        self._notes.append(_Note(facts, arrived, check, then))
        self.settle(self._lag)

    def settle(self, unread: int = 0) -> None:
        """Reads notes, oldest first, until at most ``unread`` are left; waits for them if it must.

        Raises:
            TalosError: from the first check that finds something wrong; the notes after it are dropped.
        """
        with uninterrupted():  # or a note could be gone that has not called its ``then``
            while len(self._notes) > unread:
                note = self._notes[0]
                if note.arrived is not None:
                    note.arrived.synchronize()
                try:
                    note.check(note.facts.tolist())
                except TalosError:
                    self._notes.clear()
                    raise
                self._notes.popleft()
                if note.then is not None:
                    note.then()
