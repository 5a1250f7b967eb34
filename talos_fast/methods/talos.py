"""TaLoS (Iurada et al. 2025): the entries that a task is least sensitive to, found by `calibrate`."""

from talos_fast.errors import TalosError
from talos_fast.mask import Mask
from talos_fast.methods.base import Request, Setup
from talos_fast.methods.masked import masked


def talos(request: Request) -> Setup:
    """Trains what the mask selects and freezes the rest, raw parameters of the model included.

    The released code trains those densely (`talos_fast.methods.released`).

    Raises:
        TalosError: no mask, one of another model, or one that selects nothing.
    """
    return masked(request, talos_mask(request))


def talos_mask(request: Request) -> Mask:
    """The mask of a request.

    Raises:
        TalosError: there is none.
    """
    if request.options.mask is None:
        raise TalosError("method 'talos' needs mask=; make one with talos_fast.calibrate, or load one with Mask.load")
    return request.options.mask
