"""How several task vectors become one: task arithmetic and its post-hoc rivals, by name."""

from talos_fast.merging.breadcrumbs import breadcrumbs
from talos_fast.merging.consensus import consensus, tall_masks
from talos_fast.merging.dare import dare_linear, dare_ties
from talos_fast.merging.registry import METHODS, check_options, combine
from talos_fast.merging.ties import magnitude_prune, ties

__all__ = [
    "METHODS",
    "breadcrumbs",
    "check_options",
    "combine",
    "consensus",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "tall_masks",
    "ties",
]
