"""`MaskedAdam`: AdamW over the selected entries only."""

from talos_fast.optim.masked_adam import MaskedAdam

__all__ = ["MaskedAdam"]
