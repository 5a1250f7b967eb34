"""The command line, ``talos-fast``."""

from talos_fast.cli.commands import app, main

__all__ = ["app", "main"]
