"""`MaskedAdam`: AdamW over the selected entries only."""

from talos_fast.optim.convert import from_adamw, to_adamw
from talos_fast.optim.masked_adam import MaskedAdam

__all__ = ["MaskedAdam", "from_adamw", "to_adamw"]
