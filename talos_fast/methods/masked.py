"""Training the entries of a mask: what TaLoS and LoTA share."""

from typing import Any

from talos_fast.errors import TalosError
from talos_fast.mask import Mask
from talos_fast.methods.base import Request, Setup, differences, snapshot
from talos_fast.optim import MaskedAdam


def masked(request: Request, mask: Mask, info: dict[str, Any] | None = None) -> Setup:
    """Trains what the mask selects with MaskedAdam; every other entry stays bit-identical.

    Raises:
        TalosError: a mask of another model, or one that selects nothing.
    """
    names = mask.freeze(request.model)
    if not names:
        raise TalosError(f"the mask selects none of its {mask.numel} entries; nothing would train")
    parameters = dict(request.model.named_parameters())
    trained = {name: parameters[name] for name in names}
    origin = snapshot(trained)
    optimizer = MaskedAdam(
        list(trained.items()), lr=request.lr, weight_decay=request.weight_decay,
        masks={name: mask[name] for name in names}, fused=True,
    )  # fmt: skip
    return Setup(
        trained, optimizer, request.forward, lambda: differences(origin, trained), mask=mask, info=info or {}
    )  # fmt: skip
