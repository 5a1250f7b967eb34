"""Linearized fine-tuning (Ortiz-Jimenez et al. 2023): every parameter, of the model's first-order expansion, AdamW."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import AdamW

from talos_fast.batch import Batch
from talos_fast.linear import Linearized
from talos_fast.methods.base import Request, Setup, differences, snapshot, trainable


def linearized(request: Request) -> Setup:
    """Trains θ in f(x, θ0) + J_θ f(x, θ0)(θ - θ0), f being what the model returns.

    As in the released code, the expansion is that of the network in evaluation mode and weight decay pulls θ to zero,
    not to θ0. Unlike there, f reaches to the logits and not to the features only, so the logits are linear in θ too.
    The model's parameters end at θ; they mean something only as θ - θ0, the vector.

    Raises:
        TalosError: nothing requires a gradient.
    """
    trained = trainable(request.model)
    origin = snapshot(dict(request.model.named_parameters()))

    def tangents() -> Mapping[str, Tensor]:
        return {name: p - origin[name] for name, p in trained.items()}

    expansion = Linearized(request.model, tangents, origin)

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        return expansion.logits(request.forward, batch)

    optimizer = AdamW(trained.values(), lr=request.lr, weight_decay=request.weight_decay, fused=True)
    return Setup(
        trained, optimizer, forward, export=lambda: differences(origin, trained), around=expansion.around,
        fixed=origin.values(), info={"linearized": True},
    )  # fmt: skip
