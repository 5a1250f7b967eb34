"""Time, memory and counted work of an iteration, a method beside full fine-tuning."""

from talos_fast.profiling.profile import profile
from talos_fast.profiling.result import Profile

__all__ = ["Profile", "profile"]
