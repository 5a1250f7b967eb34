"""From a mask to what a step reads: a work table and the cheapest of three index encodings.

Entries are numbered in *memory order*: that of the parameter's strides, so that channels_last weights are stepped as
they lie. The work table has a row of four int64 for every block of at most 1,024 selected entries: the element where
the block begins, its place in the index, its first compact entry, and its count of entries. The index costs, for a
parameter whose selected entries have density d:

=========== ============================================== ===================================================
encoding    index                                          bytes an entry, rows of the work table included
=========== ============================================== ===================================================
``runs``    none; every row is a run of neighbours         32 / (length of a run, cut at 1,024): 0.03 if all are
                                                           selected, 32 / width for whole rows of a matrix
``bits``    a bit an element, in tiles of 1,024 elements;  0.16 / d; tiles without a selected entry cost nothing
            uint8
``offsets`` 16 bits from the start of a tile of 65,536     2 + 32 / (entries of a tile, cut at 1,024)
=========== ============================================== ===================================================

The one with the fewest bytes is taken, but bits already where they cost no more than 1.5 times the offsets: with bits
the parameter and its gradient are read as streams, with offsets an element at a time, and on two AVX-512 cores the two
took the same time at a density of 5 %. Below it offsets win (by 4 at 1 %), at 8 % they take 1.15 times as long.

The C++ operator checks that no row, bit or offset leaves the parameter, its state or the index. That rows do not
overlap is what `select` guarantees.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from talos_fast.indexing import index_dtype

BLOCK = 1024
TILE = 65536
ROW_BYTES = 32
STREAM = 1.5  # bytes of bits that are worth one of offsets


@dataclass(frozen=True)
class Selection:
    """The selected entries of one parameter.

    Args:
        count: how many entries are selected.
        numel: how many the parameter has.
        order: its dimensions by falling stride: ``parameter.permute(order)`` is in memory order.
        work: (rows, 4) int64, on the parameter's device.
        index: None for ``runs``, uint8 for ``bits``, int16 for ``offsets`` (read as unsigned: torch's own uint16 cannot
            be pickled); on the parameter's device.
    """

    count: int
    numel: int
    order: tuple[int, ...]
    work: Tensor
    index: Tensor | None

    @property
    def encoding(self) -> str:
        """``"runs"``, ``"bits"`` or ``"offsets"``."""
        if self.index is None:
            return "runs"
        return "bits" if self.index.dtype is torch.uint8 else "offsets"

    def to(self, device: torch.device) -> "Selection":
        """The same, with work table and index on a device."""
        index = None if self.index is None else self.index.to(device)
        return replace(self, work=self.work.to(device), index=index)

    @property
    def nbytes(self) -> int:
        """Bytes of the index and the work table."""
        return self.work.nbytes + (0 if self.index is None else self.index.nbytes)

    def flags(self) -> np.ndarray:
        """The mask as flat bools in memory order."""
        rows = self.work.cpu().numpy()
        flags = np.zeros(-(-self.numel // BLOCK) * BLOCK, dtype=bool)
        if self.index is None:
            flags[_spread(rows[:, 0], rows[:, 3])] = True
        elif self.encoding == "bits":
            tiles = np.unpackbits(self.index.cpu().numpy(), bitorder="little").view(bool).reshape(-1, BLOCK)
            flags.reshape(-1, BLOCK)[rows[:, 0] // BLOCK] = tiles
        else:
            flags[np.repeat(rows[:, 0], rows[:, 3]) + self.index.cpu().numpy().view(np.uint16)] = True
        return flags[: self.numel]

    @cached_property
    def in_c_order(self) -> bool:
        """Whether memory order is C order: of a contiguous parameter, unless it was made so after this selection."""
        return self.order == tuple(range(len(self.order)))

    @cached_property
    def positions(self) -> Tensor:
        """The selected positions in memory order, ascending, int32 where that suffices; for plain torch only."""
        found = torch.from_numpy(np.flatnonzero(self.flags()))
        return found.to(self.work.device, index_dtype(self.numel))


def places(work: Tensor, index: Tensor | None) -> Tensor:
    """The selected positions in memory order, ascending, int64, where the work table lies."""
    counts = work[:, 3]
    if index is not None and index.dtype is torch.uint8:
        bits = index.view(-1, BLOCK // 8, 1) >> torch.arange(8, dtype=torch.uint8, device=index.device) & 1
        return (work[:, :1] + torch.arange(BLOCK, device=index.device))[bits.view(-1, BLOCK).bool()]
    if index is None:
        within = torch.arange(int(counts.sum()), device=work.device)
        return within + torch.repeat_interleave(work[:, 0] - work[:, 2], counts)
    return torch.repeat_interleave(work[:, 0], counts) + (index.long() & 0xFFFF)


def select(mask: Tensor, parameter: Tensor, order: tuple[int, ...] | None = None) -> Selection:
    """The selection of a bool ``mask`` of the parameter's shape, in the cheapest encoding (see above).

    Entries are numbered in ``order``, by default that of the parameter's strides.
    """
    order = memory_order(parameter) if order is None else order
    flags = mask.detach().cpu().permute(order).reshape(-1).numpy()
    count = int(np.count_nonzero(flags))
    starts, lengths = _runs(flags)
    tiles = _per_tile(flags, BLOCK)
    rows = {
        "runs": int(_blocks(lengths).sum()),
        "bits": int(np.count_nonzero(tiles)),
        "offsets": int(_blocks(_per_tile(flags, TILE)).sum()),
    }
    index_bytes = {"runs": 0, "bits": rows["bits"] * BLOCK // 8, "offsets": 2 * count}
    cost: dict[str, float] = {name: ROW_BYTES * rows[name] + index_bytes[name] for name in rows}
    cost["offsets"] *= STREAM
    cheapest = min(cost, key=lambda name: cost[name])
    if cheapest == "runs":
        work, index = _cut(starts, lengths), None
    elif cheapest == "bits":
        work, index = _as_bits(flags, tiles)
    else:
        work, index = _as_offsets(flags)
    on = parameter.device
    table = torch.from_numpy(np.ascontiguousarray(work, dtype=np.int64)).to(on)
    return Selection(count, parameter.numel(), order, table, None if index is None else torch.from_numpy(index).to(on))


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions by falling stride; where they tie, as they come."""
    strides: tuple[int, ...] = tensor.stride()
    return tuple(sorted(range(tensor.dim()), key=lambda d: -strides[d]))


def _runs(flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False))
    return edges[::2], edges[1::2] - edges[::2]


def _per_tile(flags: np.ndarray, tile: int) -> np.ndarray:
    whole = len(flags) // tile * tile
    counts = [np.count_nonzero(part) for part in flags[:whole].reshape(-1, tile)]
    return np.array([*counts, np.count_nonzero(flags[whole:])], dtype=np.int64)


def _blocks(counts: np.ndarray) -> np.ndarray:
    """How many blocks hold that many entries each."""
    return (counts + BLOCK - 1) // BLOCK


def _spread(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """All members of the ranges, one after another."""
    firsts = np.cumsum(lengths) - lengths
    return np.repeat(starts - firsts, lengths) + np.arange(lengths.sum())


def _cut(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Runs cut into rows of the work table."""
    parts = _blocks(lengths)
    within = _spread(np.zeros_like(parts), parts) * BLOCK
    counts = np.minimum(np.repeat(lengths, parts) - within, BLOCK)
    return np.stack([np.repeat(starts, parts) + within, np.zeros_like(counts), np.cumsum(counts) - counts, counts], 1)


def _as_bits(flags: np.ndarray, tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    live = np.flatnonzero(tiles)
    padded = np.zeros(len(tiles) * BLOCK, dtype=bool)
    padded[: len(flags)] = flags
    index = np.packbits(padded.reshape(-1, BLOCK)[live], bitorder="little")
    counts = tiles[live]
    work = np.stack([live * BLOCK, np.arange(len(live)) * (BLOCK // 8), np.cumsum(counts) - counts, counts], 1)
    return work, index


def _as_offsets(flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    counts = _per_tile(flags, TILE)
    rows = _cut(np.cumsum(counts) - counts, counts)
    bases = np.repeat(np.arange(len(counts)) * TILE, _blocks(counts))
    work = np.stack([bases, rows[:, 2], rows[:, 2], rows[:, 3]], 1)
    return work, (np.flatnonzero(flags) % TILE).astype(np.uint16).view(np.int16)
