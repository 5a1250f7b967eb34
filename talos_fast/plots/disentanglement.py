"""The weight disentanglement error of a pair of tasks."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from talos_fast.plots.figure import new_figure, save


def plot_disentanglement(
    errors: Tensor, alphas: Sequence[float], path: str | Path, *, tasks: tuple[str, str], title: str = ""
) -> None:
    """Heat map of ξ(α1, α2) (Ortiz-Jimenez et al. 2023), with the range of the α search drawn on it.

    Args:
        errors: (A, A), in [0, 2]; ``errors[i, j]`` at α1 = alphas[i], α2 = alphas[j].
        alphas: ascending.
        path: of the picture.
        tasks: names, of α1 and α2.
        title: printed on top.
    """
    figure, axes = new_figure(5.4, 4.6)
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    axis = axes[0, 0]
    half = (alphas[1] - alphas[0]) / 2 if len(alphas) > 1 else 0.5
    extent = (alphas[0] - half, alphas[-1] + half, alphas[0] - half, alphas[-1] + half)
    image = axis.imshow(
        errors.T.numpy(), origin="lower", extent=extent, vmin=0, vmax=2, cmap="magma_r", interpolation="nearest"
    )
    axis.add_patch(Rectangle((0, 0), 1, 1, fill=False, edgecolor="tab:cyan", linewidth=2))
    outline = [withStroke(linewidth=2, foreground="w")]
    axis.text(0.5, 1.08, "search range", ha="center", va="bottom", fontsize=8, path_effects=outline)
    axis.set_xlabel(f"α of {tasks[0]}")
    axis.set_ylabel(f"α of {tasks[1]}")
    figure.colorbar(image, ax=axis, label="disentanglement error ξ (sum of both tasks)")
    figure.suptitle(title or "weight disentanglement")
    save(figure, path)
