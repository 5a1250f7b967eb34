"""What remains of a calibration after each round, and the file that keeps it."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from talos_fast.batch import Batches
from talos_fast.fingerprint import batch_digest
from talos_fast.mask import Mask
from talos_fast.ranks import Ranks
from talos_fast.stability import watched_rows
from talos_fast.storage import require_same_run

FILE = "calibration.safetensors"


Flags = dict[str, Tensor]
"""Parameter name -> bool tensor, True = not rejected so far."""


@dataclass(frozen=True)
class Survivors:
    """A calibration between two rounds.

    Args:
        kept: by all data, with the parameter's shape and device.
        halves: by the even and by the odd batches, of the watched rows, on the CPU; none if they are not followed.
        rows: the watched rows, see `watched_rows`.
        round: how many rounds are complete.
        seconds: spent so far.
        samples: scored in the last round, on all ranks.
    """

    kept: Flags
    halves: list[Flags]
    rows: dict[str, Tensor]
    round: int = 0
    seconds: float = 0.0
    samples: int = 0

    @classmethod
    def all(cls, parameters: Mapping[str, Tensor], halves: bool) -> "Survivors":
        """The start: nothing rejected."""
        rows = watched_rows(parameters)
        kept = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
        half = {
            name: torch.ones(len(rows[name]), *p.shape[1:], dtype=torch.bool, device="cpu")
            for name, p in parameters.items()
        }
        return cls(kept, [half, half] if halves else [], rows)

    @property
    def stability(self) -> float | None:
        """The Jaccard index of both halves' masks, if they were followed."""
        if not self.halves or not self.round:
            return None
        even, odd = self.halves
        pairs = [(mask, odd[name]) for name, mask in even.items()]
        either = sum(int((one | other).sum()) for one, other in pairs)
        return round(sum(int((one & other).sum()) for one, other in pairs) / either, 4)

    def alive(self) -> Flags:
        """What any of the masks has kept."""
        alive = {name: torch.atleast_1d(mask).clone() for name, mask in self.kept.items()}
        for half in self.halves:
            for name, mask in half.items():
                alive[name][self.rows[name].to(alive[name].device)] |= mask.to(alive[name].device)
        return {name: mask.view_as(self.kept[name]) for name, mask in alive.items()}


def data_digest(batches: Batches, ranks: Ranks) -> str:
    """A digest, as hex, of the first batch of every rank together, which is read twice.

    Where two reads differ (augmentation without a seed) the first batch says nothing of the data: the digest is that of
    no batch, so that such a run is only taken up with batches that vary too, whichever they are.
    """
    once, again = ([batch_digest(batch) for batch in islice(batches, 1)] for _ in range(2))
    mine = int(once[0][:12], 16) if once == again != [] else 0  # so short that sums stay within int64
    return f"{ranks.total(mine):x}"


class RoundFile:
    """The file of the last complete round.

    Args:
        folder: made when the first round is complete; None keeps nothing.
        identity: what must be equal for a run to go on (JSON): the base, the recipe, the data.
        resume: whether a file that is there is taken up; if not, it is overwritten.
    """

    def __init__(self, folder: str | Path | None, identity: Mapping[str, Any], resume: bool) -> None:
        self.path = None if folder is None else Path(folder) / FILE
        self._identity, self._resume = dict(identity), resume

    def save(self, state: Survivors, ranks: Ranks) -> None:
        """Writes it, atomically, on the first rank."""
        if self.path is not None and ranks.rank == 0:
            parts = [state.kept, *state.halves]
            masks = {f"{part}:{name}": tensor for part, mask in enumerate(parts) for name, tensor in mask.items()}
            progress = {name: getattr(state, name) for name in ("round", "seconds", "samples")}
            Mask(masks, info={"identity": self._identity, "progress": progress}).save(self.path)

    def load(self, parameters: Mapping[str, Tensor], ranks: Ranks) -> Survivors | None:
        """What `save` wrote; None if there is nothing to take up.

        Raises:
            TalosError: a damaged file, or one of another model or recipe (says what differs); or ranks see different
                files.
        """
        there = self.path is not None and self._resume and self.path.exists()
        found = self._read(parameters) if there else None
        ranks.require_shared(self.path, found.round if found else 0)
        return found

    def _read(self, parameters: Mapping[str, Tensor]) -> Survivors:
        assert self.path is not None
        file = Mask.load(self.path)
        masks: dict[str, dict[str, Tensor]] = {}
        for key, tensor in file.items():
            part, name = key.split(":", 1)
            masks.setdefault(part, {})[name] = tensor
        theirs = {**file.info.get("identity", {}), "parameters": sorted(masks.get("0", {}))}
        require_same_run(self.path, theirs, {**self._identity, "parameters": sorted(parameters)})
        kept = {name: masks["0"][name].to(p.device) for name, p in parameters.items()}
        halves = [masks[part] for part in ("1", "2") if part in masks]
        return Survivors(kept, halves, watched_rows(parameters), **file.info["progress"])
