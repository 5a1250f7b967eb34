"""How far masks made from the even and from the odd batches would agree, watched on a sample of rows.

The scores are held once, for all batches together: what a batch has added to the watched rows is the difference of
their scores before and after it, and goes to the batch's half.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from talos_fast.sensitivity.uses import Accumulator

# Entries. On ViT-tiny and MiniLM the Jaccard index is then within 0.001 of that over all, at 1 << 18 within 0.02.
WATCHED = 1 << 22


def watched_rows(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ascending indices into each parameter's first dimension, on the CPU, of about `WATCHED` entries in all.

    The same for all ranks and runs; all rows of a model that is small enough.
    """
    share = min(1.0, WATCHED / max(1, sum(p.numel() for p in parameters.values())))
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for name, p in parameters.items():
        length = len(p) if p.dim() else 1
        count = max(1, round(share * length)) if length else 0
        rows[name] = torch.randperm(length, generator=generator, device="cpu")[:count].sort().values
    return rows


class Halves:
    """Scores of the watched rows in one round, of even and of odd batches apart.

    Args:
        ledger: where the squares of all batches are summed; what is there already is counted for no half.
        rows: see `watched_rows`; those that the ledger leaves out keep a score of 0.
        like: name -> tensor of the watched rows' shape.

    Attributes:
        sums: name -> fp32 scores of the watched rows, on the CPU; of the even and of the odd batches.
    """

    def __init__(
        self, ledger: Mapping[str, Accumulator], rows: Mapping[str, Tensor], like: Mapping[str, Tensor]
    ) -> None:
        self._ledger = ledger
        self._places = {name: _places(accumulator, rows[name]) for name, accumulator in ledger.items()}
        self.sums = [
            {name: torch.zeros(rows.shape, dtype=torch.float32, device="cpu") for name, rows in like.items()}
            for _ in (0, 1)
        ]
        self._last = self._now()
        self._batch = 0

    def turn(self, batch: int) -> None:
        """To be called before each batch, with its number, and after the last one: counts what has been added since."""
        now = self._now()
        for name, (present, _) in self._places.items():
            self.sums[self._batch % 2][name][present] += (now[name] - self._last[name]).cpu()
        self._last, self._batch = now, batch

    def _now(self) -> dict[str, Tensor]:
        return {
            name: torch.atleast_1d(self._ledger[name].values)[places.to(self._ledger[name].values.device)]
            for name, (_, places) in self._places.items()
        }


def _places(accumulator: Accumulator, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the watched rows an accumulator holds, and where."""
    if accumulator.rows is None:
        return torch.ones(len(rows), dtype=torch.bool, device="cpu"), rows
    places = torch.searchsorted(accumulator.rows, rows).clamp_(max=len(accumulator.rows) - 1)
    present = accumulator.rows[places] == rows
    return present, places[present]
