"""The systems that `finetune` offers, by name."""

from talos_fast.methods.base import Method, Options, Request, Setup
from talos_fast.methods.registry import METHODS, Compat, get_method

__all__ = ["METHODS", "Compat", "Method", "Options", "Request", "Setup", "get_method"]
