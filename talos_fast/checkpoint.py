"""A run that can be taken up again, one safetensors file: trained parameters, optimizer, position and random state."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from talos_fast import storage
from talos_fast.errors import TalosError

FILE = "checkpoint.safetensors"


@dataclass(frozen=True)
class Position:
    """Where a run stands: ``batch`` of ``epoch`` is the next to be read."""

    step: int = 0
    epoch: int = 0
    batch: int = 0


class RandomState:
    """torch's generators: the CPU's, the device's, and the one that shuffles the batches, if they have their own."""

    def __init__(self, batches: Any, device: torch.device) -> None:
        loader = getattr(batches, "generator", None)
        self._loader = loader if isinstance(loader, torch.Generator) else None
        self._device = device if device.type == "cuda" else None

    def get(self) -> dict[str, Tensor]:
        """The states, as byte tensors."""
        states = {"cpu": torch.get_rng_state()}
        if self._device is not None:
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        if self._loader is not None:
            states["loader"] = self._loader.get_state()
        return states

    def set(self, states: Mapping[str, Tensor]) -> None:
        """Brings back what `get` gave; of generators that both sides have."""
        torch.set_rng_state(states["cpu"])
        if self._device is not None and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self._device)
        if self._loader is not None and "loader" in states:
            self._loader.set_state(states["loader"])


@dataclass(frozen=True)
class Progress:
    """What a checkpoint holds beside parameters and moments: where the run stands, and the random states there."""

    position: Position
    epoch_random: dict[str, Tensor]
    step_random: dict[str, Tensor]


class Checkpoint:
    """One run's checkpoint file.

    Args:
        folder: made when the first checkpoint is written.
        identity: what must be equal for a run to go on (JSON): the base, the mask, the recipe.
        resume: whether an existing checkpoint is taken up; if not, it is overwritten.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], resume: bool) -> None:
        self.path = Path(folder) / FILE
        self._identity = dict(identity)
        self._resume = resume

    def save(self, trained: Mapping[str, Tensor], optimizer: Optimizer, progress: Progress) -> None:
        """Writes the run's state, atomically.

        Raises:
            TalosError: the folder cannot be written; the old checkpoint is untouched.
        """
        tensors = {f"parameter.{name}": p.detach().cpu() for name, p in trained.items()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{key}": value.detach().cpu() for key, value in state.items()}
        tensors |= {f"epoch_random.{key}": value for key, value in progress.epoch_random.items()}
        tensors |= {f"step_random.{key}": value for key, value in progress.step_random.items()}
        content = {"identity": self._identity, "position": asdict(progress.position)}
        storage.write(self.path, "checkpoint", tensors, content)

    @torch.no_grad()
    def load(self, trained: Mapping[str, Tensor], optimizer: Optimizer) -> Progress | None:
        """Puts parameters and moments back where `save` found them; None if there is nothing to take up.

        Raises:
            TalosError: the file is damaged, or of a run with another base, mask or recipe; says what differs.
        """
        if not (self._resume and self.path.exists()):
            return None
        _, tensors, content = storage.read(self.path, ("checkpoint",))
        for key, mine in self._identity.items():
            theirs = content["identity"].get(key)
            if theirs != mine:
                raise TalosError(
                    f"{self.path}: a run with {key}={theirs!r}, this one has {key}={mine!r}; "
                    "use another checkpoint_dir, or resume=False to start over"
                )
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, key = name.split(".", 1)
            parts.setdefault(part, {})[key] = tensor
        for name, p in trained.items():
            p.copy_(parts["parameter"][name])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts.get("optimizer", {}).items():
            number, key = name.split(".", 1)
            state.setdefault(int(number), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return Progress(Position(**content["position"]), parts["epoch_random"], parts["step_random"])
