"""Non-linear fine-tuning (Ilharco et al. 2023): every parameter that requires a gradient, AdamW."""

from torch.optim import AdamW

from talos_fast.methods.base import Request, Setup, differences, snapshot, trainable


def nonlinear(request: Request) -> Setup:
    """Trains the whole encoder.

    Raises:
        TalosError: nothing requires a gradient.
    """
    trained = trainable(request.model)
    origin = snapshot(trained)
    optimizer = AdamW(trained.values(), lr=request.lr, weight_decay=request.weight_decay, fused=True)
    return Setup(trained, optimizer, request.forward, export=lambda: differences(origin, trained))
