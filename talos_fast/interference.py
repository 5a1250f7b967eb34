"""`interference`: where task vectors get in each other's way, without running the model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from talos_fast.errors import TalosError
from talos_fast.markdown import grid
from talos_fast.sparse_vector import common, require_several
from talos_fast.stack import stacks
from talos_fast.task_vector import TaskVector

Matrix = tuple[tuple[float, ...], ...]

COLUMNS = ("pair", "cosine", "overlap", "sign conflict", "norm on shared entries")

# Entries whose statistics exist at a time, in double precision: 8 MB a vector and quantity.
BLOCK = 2**20


@dataclass(frozen=True)
class Interference:
    """How T vectors relate; an entry is moved where its change is not zero.

    Args:
        names: of the vectors.
        entries: moved by each.
        norms: Euclidean.
        norm_shares: ‖τ_a‖² / Σ_t ‖τ_t‖².
        cosine: (T, T).
        overlap: (T, T): entries that both move, of those that either moves (Jaccard).
        sign_conflict: (T, T): opposite signs, of the entries that both move; 0 where there is none.
        shared_norm: (T, T): the share of ‖τ_a‖² on entries that b moves too; rows a.
    """

    names: tuple[str, ...]
    entries: tuple[int, ...]
    norms: tuple[float, ...]
    norm_shares: tuple[float, ...]
    cosine: Matrix
    overlap: Matrix
    sign_conflict: Matrix
    shared_norm: Matrix

    def rows(self) -> list[tuple[str, ...]]:
        """One row a pair under `COLUMNS`; the last cell is the share of the first and of the second vector."""
        pairs = [(a, b) for a in range(len(self.names)) for b in range(a + 1, len(self.names))]
        return [
            (
                f"{self.names[a]}, {self.names[b]}",
                f"{self.cosine[a][b]:.4f}",
                f"{self.overlap[a][b]:.4f}",
                f"{self.sign_conflict[a][b]:.4f}",
                f"{self.shared_norm[a][b]:.4f}, {self.shared_norm[b][a]:.4f}",
            )
            for a, b in pairs
        ]

    def __str__(self) -> str:
        """The rows as a Markdown table."""
        return grid([COLUMNS, *self.rows()])

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return asdict(self)


def interference(
    vectors: Sequence[TaskVector] | Mapping[str, TaskVector], *, names: Sequence[str] | None = None
) -> Interference:
    """Cosine, overlap, sign conflicts and norm shares of every pair of vectors; sparse, tensor by tensor.

    Args:
        vectors: of one base, or name -> vector.
        names: one a vector; default: the task that each was trained on, else its number.

    Raises:
        TalosError: no vector, another number of names, different bases or shapes.

    Example:
        >>> print(talos.interference({"cars": cars, "dtd": dtd}))
    """
    chosen = require_several(vectors.values() if isinstance(vectors, Mapping) else vectors)
    if isinstance(vectors, Mapping):
        names = names or list(vectors)
    if names is None:
        names = [str(vector.info.get("task", number)) for number, vector in enumerate(chosen)]
    if len(names) != len(chosen):
        raise TalosError(f"{len(names)} names for {len(chosen)} task vectors; give one a vector")
    common(chosen)
    count = len(chosen)
    dot, both, agreement, inside = (torch.zeros(count, count, dtype=torch.float64, device="cpu") for _ in range(4))
    for _, stack in stacks(chosen):
        for values in stack.values.split(BLOCK, dim=1):
            values = values.double()
            moved, signs = (values != 0).double(), values.sign()
            dot += values @ values.T
            both += moved @ moved.T
            agreement += signs @ signs.T
            inside += values.square() @ moved.T
    entries, squares = both.diagonal(), dot.diagonal()
    either = entries[:, None] + entries[None, :] - both
    norms = squares.sqrt()
    return Interference(
        names=tuple(names),
        entries=tuple(int(n) for n in entries),
        norms=tuple(norms.tolist()),
        norm_shares=tuple(_ratio(squares, squares.sum()).tolist()),
        cosine=_matrix(_ratio(dot, norms[:, None] * norms[None, :])),
        overlap=_matrix(_ratio(both, either)),
        sign_conflict=_matrix(_ratio((both - agreement) / 2, both)),
        shared_norm=_matrix(_ratio(inside, squares[:, None])),
    )


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def _matrix(values: Tensor) -> Matrix:
    return tuple(tuple(row) for row in values.tolist())
