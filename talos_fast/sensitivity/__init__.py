"""Per-sample squared gradients, and the threshold that turns them into a mask."""

from talos_fast.sensitivity.capture import RULES, Capture, rule
from talos_fast.sensitivity.engine import sensitivities
from talos_fast.sensitivity.selection import maskable_parameters
from talos_fast.sensitivity.threshold import kth_smallest, select_extreme

__all__ = ["RULES", "Capture", "kth_smallest", "maskable_parameters", "rule", "select_extreme", "sensitivities"]
