"""The systems that `finetune` offers, by name."""

from talos_fast.methods.base import Setup
from talos_fast.methods.registry import METHODS, get_method

__all__ = ["METHODS", "Setup", "get_method"]
