"""What remains of a calibration after each round, and the file that keeps it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from talos_fast.errors import TalosError
from talos_fast.mask import Mask

FILE = "calibration.safetensors"


@dataclass(frozen=True)
class Survivors:
    """A calibration between two rounds.

    Args:
        kept: name -> bool tensor on the parameter's device, True = not rejected so far.
        round: how many rounds are complete.
        seconds: spent so far.
        samples: scored in the last round, on all ranks.
        stability: of the last round, if it was asked for.
    """

    kept: dict[str, Tensor]
    round: int = 0
    seconds: float = 0.0
    samples: int = 0
    stability: float | None = None

    @classmethod
    def all(cls, parameters: Mapping[str, Tensor]) -> "Survivors":
        """The start: nothing rejected."""
        return cls({name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()})


class RoundFile:
    """The file of the last complete round: the mask so far, which `Mask.load` can read.

    Args:
        folder: made when the first round is complete; None keeps nothing.
        identity: what must be equal for a run to go on (JSON): the base, the recipe.
        resume: whether a file that is there is taken up; if not, it is overwritten.
    """

    def __init__(self, folder: str | Path | None, identity: Mapping[str, Any], resume: bool) -> None:
        self.path = None if folder is None else Path(folder) / FILE
        self._identity, self._resume = dict(identity), resume

    def save(self, state: Survivors) -> None:
        """Writes it, atomically."""
        if self.path is not None:
            progress = {name: getattr(state, name) for name in ("round", "seconds", "samples", "stability")}
            Mask(state.kept, info={"identity": self._identity, "progress": progress}).save(self.path)

    def load(self, parameters: Mapping[str, Tensor]) -> Survivors | None:
        """What `save` wrote; None if there is nothing to take up.

        Raises:
            TalosError: a damaged file, or one of another model or recipe; says what differs.
        """
        if self.path is None or not self._resume or not self.path.exists():
            return None
        mask = Mask.load(self.path)
        theirs = {"names": list(mask), **mask.info.get("identity", {})}
        for key, mine in {"names": list(parameters), **self._identity}.items():
            if theirs.get(key) != mine:
                raise TalosError(
                    f"{self.path}: a calibration with {key}={theirs.get(key)!r}, this one has {key}={mine!r}; use "
                    "another checkpoint_dir, or resume=False to start over"
                )
        kept = {name: tensor.to(parameters[name].device) for name, tensor in mask.items()}
        return Survivors(kept, **mask.info["progress"])
