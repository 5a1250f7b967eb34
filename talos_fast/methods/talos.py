"""TaLoS (Iurada et al. 2025): the entries of a mask, MaskedAdam; every other entry stays bit-identical."""

from talos_fast.errors import TalosError
from talos_fast.methods.base import Request, Setup
from talos_fast.optim import MaskedAdam


def talos(request: Request) -> Setup:
    """Trains what the mask selects and freezes the rest.

    Raises:
        TalosError: no mask, one of another model, or one that selects nothing.
    """
    mask = request.mask
    if mask is None:
        raise TalosError("method 'talos' needs mask=; make one with talos_fast.calibrate, or load one with Mask.load")
    names = mask.freeze(request.model)
    if not names:
        raise TalosError(f"the mask selects none of its {mask.numel} entries; nothing would train")
    parameters = dict(request.model.named_parameters())
    trained = {name: parameters[name] for name in names}
    masks = {name: mask[name] for name in names}
    optimizer = MaskedAdam(
        list(trained.items()), lr=request.lr, weight_decay=request.weight_decay, masks=masks, fused=True
    )
    return Setup(trained, optimizer, request.forward)
