"""Per-sample squared gradients, and the threshold that turns them into a mask."""

from talos_fast.sensitivity.capture import Capture
from talos_fast.sensitivity.engine import sensitivities
from talos_fast.sensitivity.registry import ALIASING, RULES, UncoveredError, rule
from talos_fast.sensitivity.selection import maskable_parameters
from talos_fast.sensitivity.threshold import kth_smallest, select_extreme
from talos_fast.sensitivity.uses import Lookup, Outer, PerSample

__all__ = [
    "ALIASING",
    "RULES",
    "Capture",
    "Lookup",
    "Outer",
    "PerSample",
    "UncoveredError",
    "kth_smallest",
    "maskable_parameters",
    "rule",
    "select_extreme",
    "sensitivities",
]
