"""A run that can be taken up again, one safetensors file: trained parameters, optimizer, position and random state."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from talos_fast import storage
from talos_fast.ranks import Ranks

FILE = "checkpoint.safetensors"
FIRST = "first"
"""The folder, inside that of a LoTA run, for the full fine-tuning which that begins with."""


def remove(folder: Path) -> None:
    """Deletes what `Checkpoint` wrote in a folder, and in that of a first run; the folders stay where others wrote."""
    for place in (folder / FIRST, folder):
        for file in (place / FILE, *place.glob(f".{FILE}.*")):  # a run that was killed leaves half a file
            file.unlink(missing_ok=True)
        with suppress(OSError):
            place.rmdir()


@dataclass(frozen=True)
class Position:
    """Where a run stands: ``batch`` of ``epoch`` is the next to be read."""

    step: int = 0
    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True)
class Progress:
    """What a checkpoint holds beside parameters and moments, of each rank.

    Args:
        position: where the run stands.
        epoch_random: the random states at the start of the epoch.
        step_random: those after the last step.
        data: `batch_digest` of the epoch's first batch; empty without a checkpoint.
        loss: of the last batch, shape ().
        seconds: of training so far, interruptions left out.
    """

    position: Position
    epoch_random: dict[str, Tensor]
    step_random: dict[str, Tensor]
    data: str
    loss: Tensor
    seconds: float = 0.0


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read: where its run stands, and what that run had moved."""

    progress: Progress
    parameters: Mapping[str, Tensor]
    moments: Mapping[int, Mapping[str, Tensor]]

    @torch.no_grad()
    def restore(self, trained: Mapping[str, Tensor], optimizer: Optimizer) -> None:
        """Puts parameters and moments back where `Checkpoint.save` found them."""
        for name, p in trained.items():
            p.copy_(self.parameters[name])
        places = [p for group in optimizer.param_groups for p in group["params"]]
        state = {number: _laid_out(moments, places[number]) for number, moments in self.moments.items()}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Checkpoint:
    """One run's checkpoint file, on one rank or on several that share a file system.

    Args:
        folder: made when the first checkpoint is written.
        identity: what must be equal for a run to go on (JSON): the base, the mask, the recipe.
        resume: whether an existing checkpoint is taken up; if not, it is overwritten.
        ranks: that train together, and all call `save`.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], resume: bool, ranks: Ranks) -> None:
        self.path = Path(folder) / FILE
        self._identity = {**identity, "ranks": ranks.world}
        self._resume = resume
        self._ranks = ranks

    def save(self, trained: Mapping[str, Tensor], optimizer: Optimizer, progress: Progress) -> None:
        """Writes the run's state, atomically, on the first rank; nothing before the first step.

        Raises:
            TalosError: the folder cannot be written; the old checkpoint is untouched.
        """
        if progress.position.step:
            all_progress = self._ranks.gathered(replace(progress, loss=progress.loss.cpu()))
            if self._ranks.rank == 0:
                self._write(trained, optimizer, all_progress)

    def _write(self, trained: Mapping[str, Tensor], optimizer: Optimizer, all_progress: list[Progress]) -> None:
        tensors = {f"parameter.{name}": p.detach().cpu() for name, p in trained.items()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{key}": value.detach().cpu() for key, value in state.items()}
        for rank, one in enumerate(all_progress):
            tensors |= {f"epoch_random{rank}.{key}": value for key, value in one.epoch_random.items()}
            tensors |= {f"step_random{rank}.{key}": value for key, value in one.step_random.items()}
        content = {"identity": self._identity, "ranks": [_facts(one) for one in all_progress]}
        storage.write(self.path, "checkpoint", tensors, content)

    def read(self) -> Saved | None:
        """What `save` wrote of this rank; None if there is nothing to take up.

        Raises:
            TalosError: the file is damaged, or of a run with another base, mask or recipe; says what differs.
        """
        if not (self._resume and self.path.exists()):
            return None
        _, tensors, content = storage.read(self.path, ("checkpoint",))
        storage.require_same_run(self.path, content["identity"], self._identity)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, key = name.split(".", 1)
            parts.setdefault(part, {})[key] = tensor
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts.get("optimizer", {}).items():
            number, key = name.split(".", 1)
            moments.setdefault(int(number), {})[key] = tensor
        rank = self._ranks.rank
        facts = content["ranks"][rank]
        progress = Progress(
            Position(**facts["position"]), parts[f"epoch_random{rank}"], parts[f"step_random{rank}"],
            facts["data"], torch.tensor(facts["loss"]), facts["seconds"],
        )  # fmt: skip
        return Saved(progress, parts["parameter"], moments)


def _laid_out(moments: Mapping[str, Tensor], p: Tensor) -> dict[str, Tensor]:
    """The moments laid out as their parameter: a file keeps no layout, and fused AdamW walks through both alike."""
    return {
        key: torch.empty_like(p, dtype=value.dtype, device=value.device).copy_(value)
        if value.shape == p.shape
        else value
        for key, value in moments.items()
    }


def _facts(progress: Progress) -> dict[str, Any]:
    """What of it is JSON."""
    position, loss = asdict(progress.position), float(progress.loss)
    return {"position": position, "data": progress.data, "loss": loss, "seconds": progress.seconds}
