"""Pictures: the structure of a mask, and the weight disentanglement error of a pair of tasks. Needs matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from talos_fast.errors import TalosError
from talos_fast.storage import atomic
from talos_fast.structure import KINDS, density_by_part

COLUMNS = 48  # cells along the longer side of a weight's picture


def _figure(width: float, height: float, **grid: Any) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TalosError("plots need matplotlib; pip install 'talos-fast[plots]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(squeeze=False, **grid)


def _save(figure: Any, path: str | Path) -> None:
    with atomic(Path(path)) as temporary:
        figure.savefig(temporary, dpi=130, format=Path(path).suffix.removeprefix(".") or "png")


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
        TalosError: matplotlib is missing, or the path cannot be written.
    """
    counts = density_by_part(masks)
    layers = sorted({layer for layer, _ in counts})
    kinds = [kind for kind in KINDS if any(kind == k for _, k in counts)]
    table = np.full((len(kinds), len(layers)), np.nan)
    for (layer, kind), count in counts.items():
        table[kinds.index(kind), layers.index(layer)] = count.density
    by_layer = {layer: sum(c.selected for (number, _), c in counts.items() if number == layer) for layer in layers}
    block = max((layer for layer in layers if layer >= 0), key=lambda layer: by_layer[layer], default=-1)
    marker = f".{block}."
    weights = {name: mask for name, mask in masks.items() if marker in f".{name}" and mask.dim() >= 2}
    figure, axes = _figure(3.2 * max(2, len(weights)), 6.4, nrows=2, ncols=max(1, len(weights)))
    grid = axes[0, 0].get_gridspec()
    for axis in axes[0]:
        axis.remove()
    top = figure.add_subplot(grid[0, :])
    image = top.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    top.set_yticks(range(len(kinds)), kinds)
    top.set_xticks(range(len(layers)), ["outside" if layer < 0 else str(layer) for layer in layers])
    top.set_xlabel("layer")
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            top.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="w" if value < 0.6 else "k"
            )
    figure.colorbar(image, ax=top, label="fraction that trains")
    for axis, (name, mask) in zip(axes[1], weights.items(), strict=False):
        axis.imshow(_cells(mask).numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        axis.set_title(f"{name.split(marker)[-1]}\n{mask.float().mean():.2f} of {tuple(mask.shape)}", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle(title or f"mask structure; below: the weights of block {block}")
    _save(figure, path)


def plot_disentanglement(
    errors: Tensor, alphas: Sequence[float], path: str | Path, *, tasks: tuple[str, str], title: str = ""
) -> None:
    """Heat map of ξ(α1, α2) (Ortiz-Jimenez et al. 2023), with the range of the α search drawn on it.

    Args:
        errors: (A, A), in [0, 1]; ``errors[i, j]`` at α1 = alphas[i], α2 = alphas[j].
        alphas: ascending.
        path: of the picture.
        tasks: names, of α1 and α2.
        title: printed on top.
    """
    from matplotlib.patches import Rectangle

    figure, axes = _figure(5.4, 4.6)
    axis = axes[0, 0]
    half = (alphas[1] - alphas[0]) / 2
    extent = (alphas[0] - half, alphas[-1] + half, alphas[0] - half, alphas[-1] + half)
    image = axis.imshow(
        errors.T.numpy(), origin="lower", extent=extent, vmin=0, vmax=1, cmap="magma_r", interpolation="nearest"
    )
    axis.add_patch(Rectangle((0, 0), 1, 1, fill=False, edgecolor="tab:cyan", linewidth=2))
    axis.text(0.5, 1.03, "search range", color="tab:cyan", ha="center", va="bottom", fontsize=8)
    axis.set_xlabel(f"α of {tasks[0]}")
    axis.set_ylabel(f"α of {tasks[1]}")
    figure.colorbar(image, ax=axis, label="disentanglement error ξ (mean of both tasks)")
    figure.suptitle(title or "weight disentanglement")
    _save(figure, path)
