"""What a method is: it says what trains, with which optimizer, and through which forward."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from talos_fast.forward import Forward
from talos_fast.mask import Mask


@dataclass(frozen=True)
class Request:
    """What the user asked of a method.

    Args:
        model: the pre-trained model, on its device.
        forward: ``forward(model, batch) -> logits (N, K)``.
        mask: which entries may move, or None.
        lr: peak learning rate.
        weight_decay: AdamW's, towards zero, of whatever trains.
    """

    model: nn.Module
    forward: Forward
    mask: Mask | None
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Setup:
    """What the trainer runs.

    Args:
        trained: the parameters that move, by name in the model.
        optimizer: over exactly those.
        forward: what is differentiated.
    """

    trained: Mapping[str, Tensor]
    optimizer: Optimizer
    forward: Forward


Method = Callable[[Request], Setup]
