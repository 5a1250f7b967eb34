"""`Mask`: for each parameter name, which entries may move."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from talos_fast import storage
from talos_fast.arguments import resolve_density, share
from talos_fast.errors import TalosError
from talos_fast.fingerprint import Fingerprint, digest, identify
from talos_fast.indexing import flat_indices, support
from talos_fast.sensitivity.threshold import select_extreme


class Mask(Mapping[str, Tensor]):
    """Which entries of which parameters train: a mapping from name to a bool tensor, True = trainable.

    Args:
        tensors: name -> bool tensor of the parameter's shape; kept on the CPU.
        base: `fingerprint` of the model it was made for; empty if unknown, then only names and shapes are checked.
        info: how it was made (JSON), kept in the file.

    Raises:
        TalosError: a tensor is not bool.

    Example:
        >>> mask = Mask.from_scores({"w": torch.tensor([3.0, 1.0, 2.0, 4.0])}, density=0.5)
        >>> mask["w"].tolist()
        [False, True, True, False]
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], *, base: Fingerprint | None = None, info: Mapping[str, Any] | None = None
    ) -> None:
        for name, tensor in tensors.items():
            if tensor.dtype is not torch.bool:
                raise TalosError(f"mask of {name!r} is {tensor.dtype}, not torch.bool; True means trainable")
        self._tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        self.base: Fingerprint = dict(base or {})
        self.info: dict[str, Any] = dict(info or {})

    @classmethod
    def from_scores(
        cls,
        scores: Mapping[str, Tensor],
        density: float | None = None,
        *,
        sparsity: float | None = None,
        scope: Literal["global", "per_tensor"] = "global",
        keep: Literal["lowest", "highest"] = "lowest",
        base: Fingerprint | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> "Mask":
        """Selects the fraction ``density`` of the entries with the lowest (or highest) scores.

        Exactly ⌊density · N⌋ entries are selected (at least one); ties go to the earlier tensor and entry.

        Args:
            scores: name -> non-negative floating-point tensor of the parameter's shape.
            density: fraction in (0, 1]; default 0.1.
            sparsity: 1 - density, instead of it.
            scope: one threshold over all tensors, or one a tensor.
            keep: which end of the scores is selected.
            base: fingerprint of the model.
            info: provenance.

        Raises:
            TalosError: no scores, NaN or negative scores, a density outside (0, 1], or an unknown scope or end.
        """
        fraction = resolve_density(density, sparsity)
        if scope not in ("global", "per_tensor"):
            raise TalosError(f"scope={scope!r}: choose 'global' or 'per_tensor'")
        if keep not in ("lowest", "highest"):
            raise TalosError(f"keep={keep!r}: choose 'lowest' or 'highest'")
        alone = [{name: score} for name, score in scores.items() if score.numel()]
        groups = alone if alone and scope == "per_tensor" else [dict(scores)]
        selected = {name: torch.zeros(score.shape, dtype=torch.bool, device="cpu") for name, score in scores.items()}
        for group in groups:
            total = sum(score.numel() for score in group.values())
            selected |= select_extreme(group, max(1, share(fraction, total)), keep)
        return cls(selected, base=base, info={"density": fraction, "scope": scope, "keep": keep, **(info or {})})

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self.keys() == other.keys() and all(torch.equal(self[name], other[name]) for name in self)

    def __repr__(self) -> str:
        return f"Mask({len(self)} tensors, {self.selected:,} of {self.numel:,} entries, density {self.density:.4f})"

    @property
    def numel(self) -> int:
        """How many entries the mask speaks of."""
        return sum(tensor.numel() for tensor in self.values())

    @property
    def selected(self) -> int:
        """How many entries train."""
        return sum(self.counts().values())

    @property
    def density(self) -> float:
        """The fraction of entries that trains."""
        return self.selected / self.numel if self.numel else 0.0

    def counts(self) -> dict[str, int]:
        """Selected entries by name."""
        return {name: int(tensor.sum()) for name, tensor in self.items()}

    def overlap(self, other: "Mask") -> dict[str, float]:
        """Jaccard index |A ∩ B| / |A ∪ B| by name, and over everything under the key ``"total"``.

        A name that only one mask has counts as empty in the other; two empty selections overlap by 1.

        Raises:
            TalosError: a tensor's shapes differ.
        """
        result, both, either = {}, 0, 0
        for name in [*self, *(name for name in other if name not in self)]:
            first, second = self._tensors.get(name), other._tensors.get(name)
            first = torch.zeros_like(other[name]) if first is None else first
            second = torch.zeros_like(first) if second is None else second
            if first.shape != second.shape:
                raise TalosError(f"{name!r}: masks of shapes {tuple(first.shape)} and {tuple(second.shape)}")
            intersection, union = int((first & second).sum()), int((first | second).sum())
            result[name] = intersection / union if union else 1.0
            both, either = both + intersection, either + union
        return result | {"total": both / either if either else 1.0}

    def digest(self) -> str:
        """A 64-bit digest, as hex, of names, shapes and selected entries."""
        return digest({name: identify(tensor) for name, tensor in self.items()})

    def check(self, model: nn.Module) -> None:
        """Refuses a model that this mask does not fit.

        Raises:
            TalosError: a name that is no parameter, or a shape that differs.
        """
        parameters = dict(model.named_parameters())
        for name, tensor in self.items():
            if name not in parameters:
                raise TalosError(
                    f"the mask names {name!r}, which is no parameter of {type(model).__name__}; "
                    f"its parameters are called like {next(iter(parameters), None)!r}"
                )
            if tensor.shape != parameters[name].shape:
                raise TalosError(
                    f"{name!r}: the mask has shape {tuple(tensor.shape)}, "
                    f"the parameter {tuple(parameters[name].shape)}; calibrate on this architecture"
                )

    def freeze(self, model: nn.Module) -> list[str]:
        """Sets ``requires_grad`` on exactly the parameters that have a selected entry; returns their names.

        They come in the model's order: a mask that was read from a file has another one.

        Raises:
            TalosError: the mask does not fit the model.
        """
        self.check(model)
        counts = self.counts()
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            parameter.requires_grad_(counts.get(name, 0) > 0)
        return [name for name in parameters if counts.get(name)]

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, atomically; see `talos_fast.storage`."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.items():
            tensors |= storage.pack_selection(name, flat_indices(tensor), tensor.numel())
        shapes = {name: list(tensor.shape) for name, tensor in self.items()}
        storage.write(Path(path), "mask", tensors, {"shapes": shapes, "base": self.base, "info": self.info})

    @classmethod
    def load(cls, path: str | Path) -> "Mask":
        """Reads what `save` wrote.

        Raises:
            TalosError: missing, truncated, corrupted or foreign file.
        """
        _, tensors, content = storage.read(Path(path), ("mask",))
        masks = {}
        for name, shape in content["shapes"].items():
            indices = storage.unpack_selection(name, tensors, math.prod(shape))
            masks[name] = support(indices, tuple(shape))
        return cls(masks, base=content["base"], info=content["info"])
