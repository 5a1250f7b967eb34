"""The structure of masks: density by layer and kind, the weights of one block, and the overlap between tasks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from talos_fast.errors import TalosError
from talos_fast.mask import Mask
from talos_fast.plots.figure import new_figure, save
from talos_fast.plots.matrices import draw_matrix
from talos_fast.structure import KINDS, OUTSIDE, Count, density_by_kind, density_by_part, layers_of

Counts = Mapping[tuple[str, str], Count]
COLUMNS = 48  # cells along the longer side of a weight's picture


def _cells(mask: Tensor) -> Tensor:
    """Density of a matrix in at most COLUMNS × COLUMNS equal cells."""
    matrix = mask.float().reshape(mask.shape[0], -1)[None, None]
    size = (min(COLUMNS, matrix.shape[2]), min(COLUMNS, matrix.shape[3]))
    return torch.nn.functional.adaptive_avg_pool2d(matrix, size)[0, 0]


def plot_mask(masks: Mapping[str, Tensor], path: str | Path, *, title: str = "") -> None:
    """Density by layer and kind, and a picture of every weight matrix of the block with the most selected entries.

    Args:
        masks: name -> bool tensor, True = trainable (a `Mask` is such a mapping).
        path: of the PNG, PDF or SVG, written atomically.
        title: printed on top.

    Raises:
        TalosError: no tensor, matplotlib is missing, or the path cannot be written.
    """
    counts = density_by_part(masks)
    if not counts:
        raise TalosError("there is nothing to draw: the mask has no tensor")
    block, weights = _fullest_block(masks, counts)
    figure, axes = new_figure(3.2 * max(2, len(weights)), 6.4, nrows=2, ncols=max(1, len(weights)))
    grid = axes[0, 0].get_gridspec()
    for axis in axes[0]:
        axis.remove()
    _draw_density(figure, figure.add_subplot(grid[0, :]), counts)
    for axis, (name, mask) in zip(axes[1], weights.items(), strict=False):
        _draw_weight(axis, name.partition(f".{block.split()[-1]}.")[2] or name, mask)
    below = f"; below: the weights of block {block}" if block else ""
    figure.suptitle(title or f"mask structure{below}")
    save(figure, path)


def _fullest_block(masks: Mapping[str, Tensor], counts: Counts) -> tuple[str, dict[str, Tensor]]:
    """The block with the most selected entries, "" if there is none, and the masks of its weight matrices."""
    selected: dict[str, int] = {}
    for (layer, _), count in counts.items():
        if layer != OUTSIDE:
            selected[layer] = selected.get(layer, 0) + count.selected
    block = max(selected, key=lambda layer: selected[layer], default="")
    layers = layers_of(masks)
    return block, {name: mask for name, mask in masks.items() if mask.dim() >= 2 and layers[name] == block}


def _draw_density(figure: Any, axis: Any, counts: Counts) -> None:
    layers = list(dict.fromkeys(layer for layer, _ in counts))
    kinds = [kind for kind in KINDS if any(kind == k for _, k in counts)]
    table = np.full((len(kinds), len(layers)), np.nan)
    for (layer, kind), count in counts.items():
        table[kinds.index(kind), layers.index(layer)] = count.density
    draw_matrix(figure, axis, table.tolist(), kinds, layers, label="fraction that trains, by layer", limits=(0, 1))


def _draw_weight(axis: Any, name: str, mask: Tensor) -> None:
    axis.imshow(_cells(mask).numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    axis.set_title(f"{name}\n{mask.float().mean():.2f} of {tuple(mask.shape)}", fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])


def plot_mask_overlap(masks: Mapping[str, Mask], path: str | Path, *, title: str = "") -> None:
    """Jaccard index of the masks of every pair of tasks, and the density of each mask by kind of parameter.

    Args:
        masks: task -> its mask, of one model.
        path: of the picture.
        title: printed on top.

    Raises:
        TalosError: no mask, masks of different shapes, or matplotlib is missing.
    """
    if not masks:
        raise TalosError("there is no mask to draw; pass at least one")
    names, tasks = list(masks), list(masks.values())
    overlap = [[first.overlap(second)["total"] for second in tasks] for first in tasks]
    counts = [density_by_kind(mask) for mask in tasks]
    kinds = [kind for kind in KINDS if any(kind in count for count in counts)]
    density = [[count[kind].density if kind in count else float("nan") for count in counts] for kind in kinds]
    side = 1.8 + 0.62 * len(names)
    figure, axes = new_figure(2 * side + 2.2, max(3.0, side), ncols=2)
    draw_matrix(figure, axes[0, 0], overlap, names, names, label="overlap (Jaccard)", limits=(0, 1))
    draw_matrix(figure, axes[0, 1], density, kinds, names, label="fraction that trains", limits=(0, 1))
    figure.suptitle(title or "masks of the tasks")
    save(figure, path)
