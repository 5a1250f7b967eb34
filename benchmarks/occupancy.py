"""How much memory a mask makes a step touch, and the share of a dense step that this is at least."""

from collections.abc import Mapping

from torch import Tensor

from talos_fast.optim.selection import Selection
from talos_fast.profiling.work import touched_sectors

DENSE_BYTES = 28  # an element of fp32: p, g, m, v read, p, m, v written
DENSE_READ = 16


def occupancy(masks: Mapping[str, Tensor], selections: Mapping[str, Selection]) -> dict[str, float]:
    """Of fp32 weights: the share of 32-byte sectors and 64-byte lines with a selected entry, and what they imply.

    Floors are counted bytes over those of fused AdamW on all parameters: p read and written and g read where a sector
    (or line) has a selected entry, both moments read and written for every entry, and the index read. ``read_floor`` is
    the same of what is read, for machines that reads limit.
    """
    numel, entries = sum(m.numel() for m in masks.values()), sum(s.count for s in selections.values())
    index = sum(s.nbytes for s in selections.values() if s.count)
    sectors = sum(8 * touched_sectors(mask) for mask in masks.values())
    lines = sum(16 * touched_sectors(mask, size=64) for mask in masks.values())
    moments = 16 * entries + index
    return {
        "selected": entries, "density": entries / numel, "index_bytes": index,
        "sectors_32": sectors / numel, "lines_64": lines / numel,
        "floor_32": (12 * sectors + moments) / (DENSE_BYTES * numel),
        "floor_64": (12 * lines + moments) / (DENSE_BYTES * numel),
        "read_floor_64": (8 * lines + 8 * entries + index) / (DENSE_READ * numel),
    }  # fmt: skip
