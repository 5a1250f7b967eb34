"""Pictures of masks, vectors and studies. Needs matplotlib."""

from talos_fast.plots.disentanglement import plot_disentanglement
from talos_fast.plots.efficiency import plot_efficiency
from talos_fast.plots.masks import plot_mask, plot_mask_overlap
from talos_fast.plots.matrices import plot_interference, plot_matrix

__all__ = [
    "plot_disentanglement",
    "plot_efficiency",
    "plot_interference",
    "plot_mask",
    "plot_mask_overlap",
    "plot_matrix",
]
