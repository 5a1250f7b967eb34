"""Non-linear fine-tuning (Ilharco et al. 2023): every parameter that requires a gradient, AdamW."""

from torch.optim import AdamW

from talos_fast.errors import TalosError
from talos_fast.methods.base import Request, Setup


def nonlinear(request: Request) -> Setup:
    """Trains the whole encoder.

    Raises:
        TalosError: a mask was given, or nothing requires a gradient.
    """
    if request.mask is not None:
        raise TalosError("method 'nonlinear' trains every entry; leave out mask=, or use method='talos'")
    trained = {name: p for name, p in request.model.named_parameters() if p.requires_grad}
    if not trained:
        raise TalosError(f"no parameter of {type(request.model).__name__} requires a gradient; nothing would train")
    optimizer = AdamW(trained.values(), lr=request.lr, weight_decay=request.weight_decay, fused=True)
    return Setup(trained, optimizer, request.forward)
