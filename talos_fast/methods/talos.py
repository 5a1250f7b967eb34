"""TaLoS (Iurada et al. 2025): the entries that a task is least sensitive to, found by `calibrate`."""

from talos_fast.errors import TalosError
from talos_fast.methods.base import Request, Setup
from talos_fast.methods.masked import masked


def talos(request: Request) -> Setup:
    """Trains what the mask selects and freezes the rest.

    Raises:
        TalosError: no mask, one of another model, or one that selects nothing.
    """
    if request.options.mask is None:
        raise TalosError("method 'talos' needs mask=; make one with talos_fast.calibrate, or load one with Mask.load")
    return masked(request, request.options.mask)
